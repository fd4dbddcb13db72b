"""Files that appear as a whole or not at all, and the owner's rule: nothing is replaced that we did not write.

What we wrote into a folder is listed in its ledger, a JSON file with the SHA-256 of each file. A file is replaced only
if the ledger knows its content, so that one which somebody changed since is theirs, and only if the user said
--overwrite or the same job continues. All commands write through `owned_file` and `owned_folder`.
"""

from __future__ import annotations

import codecs
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[1]  # of the checkout
LEDGER = ".amortized-pulse.json"
FORMAT = "amortized-pulse/files/1"
PARTIAL = ".amortized-pulse-partial-"  # begins the names of temporary folders


def printable(text: str) -> str:
    r"""Writes escapes for characters that would break a line, steer the terminal or turn the direction of writing.

    Args:
        text: Any text, such as a file's name or what a file says about itself.

    Returns:
        The text in printable characters, "\n" for a line break and so on.
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def read_names(path: Path) -> list[str]:
    """Reads a file of names, one in each line, whatever the other bytes of a name are."""
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape").split("\n")
    return [line.removesuffix("\r") for line in lines if line.strip()]


def write_names(path: Path, names: Sequence[str]) -> None:
    """Writes what `read_names` reads."""
    path.write_bytes("".join(f"{name}\n" for name in names).encode("utf-8", "surrogateescape"))


def check_names(names: Sequence[str]) -> None:
    """Refuses names that no list of lines can hold.

    Raises:
        ValueError: If there is one; names it.
    """
    for name in names:
        if "\n" in name or name.endswith("\r") or not name.strip():
            raise ValueError(f"Expected names of pictures without line breaks, got {name!r}; rename it.")


def sha256_of(path: str | Path) -> str:
    """Gives the sha256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Lets a file be written elsewhere; it takes the place of `path` when the block ends without an error.

    For files inside what is ours anyway, such as caches; `owned_file` asks whose the older file is.

    Args:
        path: Where the file belongs; its folder is made if it is not there.

    Yields:
        The path to write to: of the same name, in a temporary folder next to `path`, which is removed in the end.
        Nobody but the user may look into that folder, but the file has the permissions of any new file.
    """
    path = Path(path)
    with _next_to(path) as partial:
        yield partial
        partial.replace(path)


@contextmanager
def atomic_folder(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """Lets a folder be made elsewhere; it takes the place of `path` when the block ends without an error.

    Args:
        path: Where the folder belongs.
        replace: Whether the new one takes the place of an older one, which is there, whole, until then.

    Yields:
        The folder to fill, empty, in a temporary one next to `path`.

    Raises:
        OSError: If something is there that must not be replaced.
    """
    path = Path(os.path.abspath(path))
    with _next_to(path) as partial:
        partial.mkdir()
        yield partial
        if not (replace and path.exists()):
            partial.rename(path)
        elif not _exchange(partial, path):
            old = path.with_name(f"{path.name}.old-{os.getpid()}")  # in sight, for a kill may come now
            path.rename(old)
            try:
                partial.rename(path)
            except BaseException:
                old.rename(path)
                raise
            old.rename(partial)


@contextmanager
def owned_file(
    path: str | Path, overwrite: bool = False, job: str = "", ours: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Lets a file be written elsewhere, which then takes the place of `path`, if the owner's rule allows it.

    Args:
        path: Where the file belongs; its folder is made if it is not there.
        overwrite: Whether the user allows to replace what an earlier call wrote.
        job: What the file is made of. What the same job wrote may be replaced without `overwrite`.
        ours: Tells by a file's own header that we wrote it, for kinds of files that have one; they need no ledger.

    Yields:
        The path to write to, see `atomic_write`.

    Raises:
        ValueError: If something is there that must not be replaced; before the block, and again after it.
    """
    path = Path(path)
    check_replaceable(path, overwrite, job, ours and ours(path))
    with _next_to(path.parent / "files") as partial:
        partial.mkdir()
        yield partial / path.name
        with locked(path.parent):
            check_replaceable(path, overwrite, job, ours and ours(path))  # another process may have been faster
            if ours is None:
                _publish(partial, path.parent, LEDGER, job, _read_ledger(path.parent, LEDGER))
            else:
                (partial / path.name).replace(path)


@contextmanager
def owned_folder(
    folder: str | Path, overwrite: bool = False, ledger: str = LEDGER, names: Iterable[str] = (), job: str = ""
) -> Iterator[Path]:
    """Lets a folder's files be written elsewhere; then all of them take their places, if the owner's rule allows it.

    In a folder that exists, what an earlier call wrote is replaced, or goes where this call wrote no such file; other
    people's files stay. The ledger comes last.

    Args:
        folder: The folder to be.
        overwrite: Whether the user allows to replace what an earlier call wrote.
        ledger: Name of the ledger. If the block writes a JSON file of that name, the ledger is kept in it, as "files".
        names: Files that will be written, as far as they are known, to be refused before the work.
        job: What the files are made of, see `owned_file`.

    Yields:
        The temporary folder, empty.

    Raises:
        ValueError: If something is there that must not be replaced; before the block, and again after it.
    """
    folder = Path(os.path.abspath(folder))
    check_folder(folder, overwrite, ledger, names, job)
    with _next_to(folder) as partial:
        partial.mkdir()
        yield partial
        names = [path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file()]
        if os.path.lexists(folder):
            with locked(folder):
                check_folder(folder, overwrite, ledger, names, job)  # another process may have been faster
                _publish(partial, folder, ledger, job)
        else:
            _publish(partial, folder, ledger, job)


def check_writable(folder: Path) -> None:
    """Makes a folder if need be; ValueError if nothing can be written into it, now and not after an hour of work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"expected a folder to write into, got {folder} ({error}); name another one") from error


def check_replaceable(path: str | Path, overwrite: bool = False, job: str = "", ours: bool | None = None) -> None:
    """Refuses to write where something is that the owner's rule protects.

    Args:
        path: Where a file is to be written.
        overwrite: See `owned_file`.
        job: See `owned_file`.
        ours: Whether the file's own header says that we wrote it; None asks the ledger.

    Raises:
        ValueError: If it must not be written.
    """
    path = Path(path)
    if not path.name:
        raise ValueError("expected the name of a file, got an empty one")
    if not os.path.lexists(path):
        return
    if not path.is_file() or not (is_ours(path) if ours is None else ours):
        raise ValueError(f"{path} exists, and no earlier call wrote it as it is now; move it, or name another place")
    if not overwrite and not (job and is_ours(path, job)):
        raise ValueError(f"{path} exists; --overwrite replaces it, or name another place")


def is_ours(path: str | Path, job: str | None = None) -> bool:
    """Says whether we wrote a file, and nobody changed it since.

    Args:
        path: The file.
        job: If not None, it must also have been written by this job.

    Returns:
        Whether it is so.
    """
    path = Path(path)
    entry = _read_ledger(path.parent, LEDGER).get(path.name)
    return entry is not None and job in (None, entry.get("job")) and _is_unchanged(path, entry)


def ledger_names(folder: Path, ledger: str = LEDGER) -> set[str]:
    """Names the files that a folder's ledger lists; none if it has none."""
    return set(_read_ledger(folder, ledger))


def is_complete(folder: Path, ledger: str, job: str) -> bool:
    """Says whether all that a job was to write into a folder is there, and nobody changed it since.

    Args:
        folder: The folder.
        ledger: Name of its ledger.
        job: The job, see `owned_folder`.

    Returns:
        Whether it is so; False as well if the job was cut while its files took their places.
    """
    entries = _read_ledger(folder, ledger)
    return bool(entries) and all(
        entry.get("job") == job and len(entry["sha256"]) == 1 and _is_unchanged(folder / name, entry)
        for name, entry in entries.items()
    )


def check_folder(folder: Path, overwrite: bool, ledger: str = LEDGER, names: Iterable[str] = (), job: str = "") -> None:
    """Refuses to write into a folder where something is that the owner's rule protects.

    Args:
        folder: The folder to be.
        overwrite: See `owned_folder`.
        ledger: See `owned_folder`.
        names: Files that are to be written.
        job: See `owned_folder`.

    Raises:
        ValueError: If they must not be written.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; move it away, or name another place")
    known = _read_ledger(folder, ledger)
    there = [name for name in {*names, ledger} if os.path.lexists(folder / name) and not (name == ledger and known)]
    foreign = sorted(name for name in there if name not in known or not _is_unchanged(folder / name, known[name]))
    if foreign:
        raise ValueError(
            f"{folder}: no earlier call wrote {', '.join(foreign[:5])} as it is now; move it, or name another place"
        )
    same = job and known and all(entry.get("job") == job for entry in known.values())
    if not overwrite and not same and any(folder.iterdir()):
        raise ValueError(f"{folder} exists; --overwrite replaces the results in it, or name another place")


def _publish(
    partial: Path, folder: Path, ledger: str, job: str, others: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Moves the files in `partial` into a folder; what its ledger lists besides them and the others goes."""
    files = {path.relative_to(partial).as_posix(): path for path in sorted(partial.rglob("*")) if path.is_file()}
    files.pop(ledger, None)
    new = {name: {"sha256": [sha256_of(path)], **({"job": job} if job else {})} for name, path in files.items()}
    _write_ledger(partial, ledger, {**(others or {}), **new})
    if not folder.exists():
        partial.rename(folder)
        return
    old = _read_ledger(folder, ledger)
    if others is None and _holds_only(folder, old, ledger):
        shutil.copymode(folder, partial)
        if _exchange(partial, folder):  # all at once, where nothing else is in the folder
            return
    if old:  # a kill may come before a file's move or after it: until all have moved, both contents are ours
        known = {name: entry["sha256"] for name, entry in old.items()}
        both = {name: {**entry, "sha256": [*entry["sha256"], *known.get(name, [])]} for name, entry in new.items()}
        _write_ledger(folder, ledger, {**old, **both})
    for name, path in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        path.replace(folder / name)
    for name in old.keys() - new.keys() - (others or {}).keys():
        if _is_unchanged(folder / name, old[name]):
            (folder / name).unlink()
    (partial / ledger).replace(folder / ledger)


def _holds_only(folder: Path, entries: Mapping[str, dict[str, Any]], ledger: str) -> bool:
    """Says whether nothing is in a folder but its ledger and what that lists."""
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = {path.relative_to(folder).as_posix() for path in files} - {ledger}
    return names <= entries.keys() and all(_is_unchanged(folder / name, entries[name]) for name in names)


def _read_ledger(folder: Path, ledger: str) -> dict[str, dict[str, Any]]:
    """Gives what a folder's ledger says of each file; nothing if there is none, or it is damaged."""
    try:
        content = json.loads((folder / ledger).read_bytes())
        files = content["files"] if content["format"].startswith("amortized-pulse/") else {}
        return {name: entry for name, entry in files.items() if ".." not in Path(name).parts and list(entry["sha256"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _write_ledger(folder: Path, ledger: str, entries: Mapping[str, dict[str, Any]]) -> None:
    """Writes the ledger, or puts it into the JSON file of its name that is there already."""
    content: dict[str, Any] = {"format": FORMAT}
    with suppress(OSError):
        content = json.loads((folder / ledger).read_bytes())
    with atomic_write(folder / ledger) as partial:
        partial.write_text(json.dumps({**content, "files": entries}, indent=2, sort_keys=True) + "\n", encoding="ascii")


def _is_unchanged(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and not path.is_symlink() and sha256_of(path) in entry["sha256"]


def _exchange(new: Path, path: Path) -> bool:
    """Lets two folders change places in one step; False where the system, its libraries or the disk know none."""
    library: Any = ctypes.CDLL(None) if os.name == "posix" else None
    a, b = os.fsencode(new), os.fsencode(path)
    if hasattr(library, "renameat2"):
        return not library.renameat2(-100, a, -100, b, 2)  # AT_FDCWD, RENAME_EXCHANGE
    return hasattr(library, "renamex_np") and not library.renamex_np(a, b, 2)  # macOS: RENAME_SWAP


@contextmanager
def _next_to(path: Path) -> Iterator[Path]:
    """Gives a path of the same name in a temporary folder next to `path`, which goes with what is left in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_partials_once(path.parent)
    with ExitStack() as stack:
        folder = None
        while folder is None or not folder.exists():  # another process may have removed it before it was locked
            holder = tempfile.TemporaryDirectory(prefix=PARTIAL, dir=path.parent, ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(holder))
            with suppress(FileNotFoundError):
                stack.enter_context(locked(folder))  # while it is in use
        yield folder / path.name


def remove_partials(folder: Path) -> None:
    """Removes what killed processes left of files that they were writing into a folder, where the system tells it."""
    for path in folder.glob(f"{PARTIAL}*") if fcntl else ():
        with suppress(OSError), locked(path, wait=False):
            shutil.rmtree(path)


_remove_partials_once = lru_cache(maxsize=64)(remove_partials)  # a folder may hold very many files, a run folders


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Lets one process at a time change what is in a folder, where the system can do that.

    Args:
        folder: The folder.
        wait: Wait for the one that does, instead of raising OSError.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # some network file systems have no locks
            if not wait:
                raise
        yield
    finally:
        os.close(handle)
