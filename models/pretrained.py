"""Finds the weights of other people's networks: on this machine first, then where they are published."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "AMORTIZED_PULSE_WEIGHTS"


def weight_folders() -> list[Path]:
    """Lists the folders that are searched, in order.

    Returns:
        $AMORTIZED_PULSE_WEIGHTS if set, torch.hub's checkpoints, `weights/` in the repository, and the folders of a
        `shared/` directory beside it.
    """
    folders = [Path(os.environ[VARIABLE]).expanduser()] if os.environ.get(VARIABLE) else []
    shared = ROOT.parent / "shared"
    return [
        *folders,
        Path(torch.hub.get_dir()) / "checkpoints",
        ROOT / "weights",
        shared / "weights",
        shared / "torch_home" / "hub" / "checkpoints",
    ]


def find_weights(*names: str, url: str | None = None, source: str = "") -> Path:
    """Finds a file of weights, and downloads it where that is possible.

    A download whose name carries the first digits of its SHA-256 ("name-0123abcd.pth", torch.hub's convention) is
    checked against them. A file that is found may have been saved anew; see `check_tensors`.

    Args:
        names: File names, such as "mobilefacenet_y1.pt": those that serve alike, the most welcome first.
        url: Where the last of them is downloaded from if no folder has any; None if it has no stable address.
        source: Where the weights come from, in words, for the error message.

    Returns:
        The path of the file.

    Raises:
        FileNotFoundError: If it is nowhere and cannot be downloaded; says which file to put where.
        ValueError: If a download has another checksum than its name says.
    """
    folders = weight_folders()
    for name in names:
        for folder in folders:
            path = folder / name
            if path.is_file():
                return path
    if url is None:
        raise FileNotFoundError(_instructions(names, folders, url, source))
    return _download(names, url, source, folders)


def check_tensors(tensors: Mapping[str, Tensor], expected: str, path: Path | str, what: str) -> None:
    """Refuses tensors that are not the expected ones, whatever file they came in.

    Args:
        tensors: Tensors by name.
        expected: Their `tensors_sha256`.
        path: Where they were read from, for the error message.
        what: What they should be, for the error message.

    Raises:
        ValueError: If the checksum is another one.
    """
    found = tensors_sha256(tensors)
    if found != expected:
        raise ValueError(
            f"Expected {path} to hold {what} (SHA-256 over its tensors {expected}), got {found}: the file is damaged "
            "or another version. Delete or replace it."
        )


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Computes a checksum of tensors that does not depend on the file format they are kept in.

    The SHA-256 over name, number type, shape and bytes of each tensor, in the order of the names. The step counters
    of batch normalisation (`num_batches_tracked`) are left out: old files lack them, and evaluation never reads them.

    Args:
        tensors: Tensors by name, on any device.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digits_in(name: str) -> str | None:
    """Gives the first digits of the SHA-256 that a file name carries, if any."""
    match = re.search(r"-([0-9a-f]{8,})\.", name)
    return match[1] if match else None


def _download(names: tuple[str, ...], url: str, source: str, folders: list[Path]) -> Path:
    path = folders[0] / names[-1]
    digits = _digits_in(path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # torch.hub writes to a temporary file, and moves it here only once it is complete and its checksum is right.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digits, progress=sys.stderr.isatty())
    except OSError as error:  # URLError and HTTPError are OSErrors
        raise FileNotFoundError(f"{_instructions(names, folders, url, source)} ({error})") from error
    except RuntimeError as error:
        raise ValueError(
            f"Expected {url} to have the SHA-256 {digits}…, but what came has another ({error}); nothing was kept. "
            "Try again, or fetch the file by hand and compare."
        ) from error
    return path


def _instructions(names: tuple[str, ...], folders: list[Path], url: str | None, source: str) -> str:
    origin = "; ".join(part for part in (source, url) if part) or "no download address is known"
    wanted = " or ".join(repr(name) for name in names)
    places = " or ".join(str(folders[0] / name) for name in names)
    searched = ", ".join(str(folder) for folder in folders)
    return (
        f"Expected the weights {wanted}, found none in {searched}. Put the file at {places}, or into a folder of your "
        f"own named by ${VARIABLE}. It comes from: {origin}."
    )
