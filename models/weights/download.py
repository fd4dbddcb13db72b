"""Downloads one large file: goes on where an earlier attempt was cut, and keeps nothing but the right file."""

from __future__ import annotations

import http.client
import json
import sys
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from models.weights.safetensors_files import sha256_of

TIMEOUT = 30  # seconds without a single byte
CHUNK = 1 << 20  # bytes
_AGAIN = "the same command goes on from there"


class CutError(ConnectionError):
    """A download that ended early: what came is kept, and the next call goes on with it."""


def download(url: str, path: Path, sha256: str | None = None) -> str:
    """Downloads a file, which appears under its name only once it is complete and its checksum is right.

    Until then it is `path` with ".partial" added. A later call goes on with such a file if the server can do that
    (HTTP Range) and the file there is still the same one (If-Range); else it starts again.

    Args:
        url: An https address; http serves for 127.0.0.1 alone.
        path: Where to put it.
        sha256: What the file should have, 64 hexadecimal digits; None if that is not known.

    Returns:
        The sha256 that it has.

    Raises:
        ValueError: If the address is of another kind, or what came is not the file; nothing is kept then.
        CutError: If it ended early.
        OSError: If the server cannot be reached, or refuses.
    """
    check_address(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    notes = path.with_name(path.name + ".partial.json")
    total = _receive(url, partial, notes, checked=sha256 is not None)
    size = partial.stat().st_size
    if total is not None and size < total:
        raise CutError(f"{url}: the connection was cut after {size} of {total} bytes; {_AGAIN}.")
    found = sha256_of(partial)
    problem = f"{total} bytes, got {size}" if total not in (None, size) else ""
    if sha256 is not None and found != sha256.lower():
        problem = f"the sha256 {sha256}, got {found}"
    notes.unlink(missing_ok=True)
    if problem:
        partial.unlink()
        raise ValueError(f"{url}: expected a file of {problem}; nothing was kept. Try again, or ask its publisher.")
    partial.replace(path)
    return found


def check_address(url: str) -> None:
    """Refuses addresses that anybody on the way could tamper with.

    Args:
        url: The address.

    Raises:
        ValueError: If it is neither https nor http on 127.0.0.1.
    """
    parts = urlsplit(url)
    if not (parts.scheme == "https" and parts.hostname or (parts.scheme, parts.hostname) == ("http", "127.0.0.1")):
        raise ValueError(f"Expected an https address, got {url!r}; download the file by hand if you trust it.")


class _SameScheme(HTTPRedirectHandler):
    """Follows redirections that stay with the scheme of the address."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        """Gives the next request; see `urllib.request.HTTPRedirectHandler`."""
        if urlsplit(newurl).scheme != urlsplit(req.full_url).scheme:
            raise ValueError(f"{req.full_url}: expected a redirection to the same scheme, got one to {newurl!r}.")
        check_address(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _receive(url: str, partial: Path, notes: Path, checked: bool) -> int | None:
    """Writes what the server sends to `partial`.

    Returns:
        The size of the whole file in bytes, None if the server does not say.
    """
    start, headers = _where_to_go_on(url, partial, notes, checked)
    try:
        response = build_opener(_SameScheme).open(Request(url, headers=headers), timeout=TIMEOUT)
    except http.client.HTTPException as error:
        raise ConnectionError(f"{url}: the server's answer is not HTTP ({error or type(error).__name__}).") from error
    except HTTPError as error:
        if error.code != 416 or not start:  # 416: there is nothing behind that position
            raise
        if error.headers.get("Content-Range") == f"bytes */{start}":  # only the last step was missing
            return start
        partial.unlink()
        return _receive(url, partial, notes, checked)
    with response:
        if response.headers.get_content_type() == "text/html":
            raise ValueError(f"{url}: expected a file of weights, got a web page; download it by hand.")
        begin, total = _span(response)
        if begin not in (0, start):
            raise ConnectionError(f"{url}: asked for what follows byte {start}, the server sent byte {begin}.")
        notes.write_text(json.dumps({"url": url, "validator": _validator(response)}), encoding="utf-8")
        try:
            with open(partial, "ab" if begin else "wb") as file, _bar(total, begin, url) as bar:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
        except (OSError, http.client.HTTPException) as error:
            size = partial.stat().st_size
            raise CutError(f"{url}: cut after {size} bytes ({error or type(error).__name__}); {_AGAIN}.") from error
    return total


def _where_to_go_on(url: str, partial: Path, notes: Path, checked: bool) -> tuple[int, dict[str, str]]:
    """Gives the number of bytes that are there already, 0 to start again, and the headers that ask for the rest."""
    headers = {"User-Agent": "amortized-pulse", "Accept-Encoding": "identity"}
    size = partial.stat().st_size if partial.is_file() else 0
    try:
        known = json.loads(notes.read_text(encoding="utf-8"))
        validator = known["validator"] if known["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        validator = None
    # Two versions of a file joined would pass for weights, unless a checksum tells.
    if not size or not (validator or checked):
        return 0, headers
    return size, {**headers, "Range": f"bytes={size}-", **({"If-Range": validator} if validator else {})}


def _validator(response: Any) -> str | None:
    """Gives what names this version of the file: If-Range takes strong tags and dates alone (RFC 9110, 13.1.5)."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _span(response: Any) -> tuple[int, int | None]:
    """Gives the position of the first byte that is sent, and the size of the whole file if the server says so."""
    length = response.headers.get("Content-Length", "")
    if response.status != 206:
        return 0, int(length) if length.isdigit() else None
    span, _, whole = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
    begin = span.partition("-")[0]
    return int(begin) if begin.isdigit() else -1, int(whole) if whole.isdigit() else None


def _bar(total: int | None, begin: int, url: str) -> Any:
    from tqdm import tqdm

    name = urlsplit(url).path.rpartition("/")[2]
    return tqdm(
        total=total,
        initial=begin,
        unit="B",
        unit_scale=True,
        desc=name,
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
    )
