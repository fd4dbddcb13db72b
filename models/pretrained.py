"""Finds the weights of other people's networks: on this machine first, then where they are published."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "AMORTIZED_PULSE_WEIGHTS"


def weight_folders() -> list[Path]:
    """Lists the folders that are searched, in order.

    Returns:
        $AMORTIZED_PULSE_WEIGHTS if set, torch.hub's checkpoints, `weights/` in the repository, and the folders of a
        `shared/` directory beside it.
    """
    folders = [Path(os.environ[VARIABLE])] if os.environ.get(VARIABLE) else []
    shared = ROOT.parent / "shared"
    return [
        *folders,
        Path(torch.hub.get_dir()) / "checkpoints",
        ROOT / "weights",
        shared / "weights",
        shared / "torch_home" / "hub" / "checkpoints",
    ]


def find_weights(name: str, url: str | None = None, sha256: str | None = None, source: str = "") -> Path:
    """Finds a file of weights, and downloads it where that is possible.

    Args:
        name: File name, such as "mobilefacenet_y1.pt".
        url: Where it is downloaded from if no folder has it; None if it has no stable address.
        sha256: Checksum in full, 64 hexadecimal digits; None accepts any file that is found, and checks a download
            against the first digits in its name if it has them ("name-0123abcd.pth", torch.hub's convention).
        source: Where the weights come from, in words, for the error message.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: If it is nowhere and cannot be downloaded; says which file to put where.
        ValueError: If a file that was found or downloaded has another checksum.
    """
    folders = weight_folders()
    for folder in folders:
        path = folder / name
        if path.is_file():
            _check(path, sha256)
            return path
    if url is None:
        raise FileNotFoundError(_instructions(name, folders, url, sha256, source))
    return _download(name, url, sha256, source, folders)


def _download(name: str, url: str, sha256: str | None, source: str, folders: list[Path]) -> Path:
    path = folders[0] / name
    in_name = re.search(r"-([0-9a-f]{8,})\.", name)
    prefix = sha256 or (in_name.group(1) if in_name else None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # torch.hub writes to a temporary file, and moves it here only once it is complete and its checksum is right.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix, progress=sys.stderr.isatty())
    except OSError as error:  # URLError and HTTPError are OSErrors
        raise FileNotFoundError(f"{_instructions(name, folders, url, sha256, source)} ({error})") from error
    except RuntimeError as error:
        raise ValueError(
            f"Expected {url} to have the SHA-256 {prefix}…, but what came has another ({error}); nothing was kept. "
            "Try again, or fetch the file by hand and compare."
        ) from error
    return path


def _check(path: Path, sha256: str | None) -> None:
    if sha256 is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(
            f"Expected {path} to have the SHA-256 {sha256}, got {found}: it is damaged or another version. "
            "Delete or replace it."
        )


def _instructions(name: str, folders: list[Path], url: str | None, sha256: str | None, source: str) -> str:
    origin = "; ".join(part for part in (source, url) if part) or "no download address is known"
    checksum = f" with the SHA-256 {sha256}" if sha256 else ""
    searched = ", ".join(str(folder) for folder in folders)
    return (
        f"Expected the weights {name!r}{checksum}, found none in {searched}. Put the file at {folders[0] / name}, "
        f"or into a folder of your own named by ${VARIABLE}. It comes from: {origin}."
    )
