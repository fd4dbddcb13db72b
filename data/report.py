"""What is written for one face: pictures, latents and the report, complete or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data.pictures import face_sheet
from data.reading import write_png

EPSILON = 1e-3
REPORT = "report.json"

_OWN_FILES = re.compile(r"([1-9]|[1-5]\d|6[0-4])\.png|(grid|input)\.png|latents\.npz|(report|timing)\.json")
_RESERVED = {"overview.png"}


def folder_names(paths: Sequence[Path], reserved: set[str] = _RESERVED) -> list[str]:
    """Gives every input a folder name of its own: its stem, or "stem-2", "stem-3" … if another input has it already.

    Names that differ in case alone count as the same, as they do on macOS and Windows.

    Args:
        paths: The inputs.
        reserved: Names that are not given, in small letters.

    Returns:
        One name per input, which depends on the names and order of the inputs alone.
    """
    # "...png" has the stem "..", which must not become a folder outside.
    stems = [path.stem.strip(". ") or "face" for path in paths]
    taken = set(reserved)
    names: list[str | None] = []
    for stem in stems:  # a file that is itself called face-2.png has the first right to that name
        names.append(None if stem.casefold() in taken else stem)
        taken.add(stem.casefold())
    for i, name in enumerate(names):
        number = 2
        while name is None:
            candidate = f"{stems[i]}-{number}"
            name = None if candidate.casefold() in taken else candidate
            number += 1
        taken.add(name.casefold())
        names[i] = name
    return [name for name in names if name is not None]


def make_report(errors: Sequence[float], notes: Mapping[str, Any]) -> dict[str, Any]:
    """Builds the content of report.json.

    Args:
        errors: The downscaling error of each candidate, mean squared in units of [0, 1] pictures.
        notes: What else is to be told, such as input, seed and bundle.

    Returns:
        The notes with "k", "epsilon" and "candidates".
    """
    candidates = [
        {"file": f"{i}.png", "downscaling_error": round(error, 9), "within_epsilon": error <= EPSILON}
        for i, error in enumerate(errors, start=1)
    ]
    return {**notes, "k": len(candidates), "epsilon": EPSILON, "candidates": candidates}


def write_face(folder: Path, lr: Tensor, images: Tensor, ws: Tensor, report: Mapping[str, Any]) -> None:
    """Writes everything about one face but timing.json.

    Args:
        folder: An existing folder.
        lr: The low-resolution face (3, s, s) in [-1, 1].
        images: Candidates (k, 3, R, R) in [-1, 1].
        ws: Their codes (k, L, D).
        report: From `make_report`.
    """
    write_png(lr, folder / "input.png")
    for i, image in enumerate(images, start=1):
        write_png(image, folder / f"{i}.png")
    errors = [candidate["downscaling_error"] for candidate in report["candidates"]]
    face_sheet(lr, images, errors).save(folder / "grid.png")
    np.savez(folder / "latents.npz", ws=ws.cpu().numpy().astype(np.float32))
    write_json(report, folder / REPORT)


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Writes JSON with sorted keys in ASCII, the same bytes for the same content."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="ascii")


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuses to write where something is.

    Args:
        folder: The folder to be.
        overwrite: An existing folder is welcome.

    Raises:
        ValueError: If the folder exists and is not to be overwritten, or if it is a file.
    """
    if folder.is_dir() and not overwrite:
        raise ValueError(f"{folder} exists; --overwrite replaces the results in it, --out names another place")
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; move it away, or name another place with --out")


@contextmanager
def complete_or_nothing(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Gives a temporary folder beside `folder`, which takes its place if the block ends without an error.

    If `folder` exists, the results of an earlier call in it are replaced and other files stay. Its report leaves first
    and the new one comes last: a folder without a report is not complete.

    Args:
        folder: The folder to be.
        overwrite: It may exist.

    Yields:
        The temporary folder, empty.

    Raises:
        ValueError: See `check_free`.
    """
    check_free(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".partial-{os.getpid()}")
    try:
        partial.mkdir()
        yield partial
        check_free(folder, overwrite)  # another process may have been faster
        if folder.is_dir():
            _replace(folder, partial)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(folder: Path, partial: Path) -> None:
    """Moves the files in `partial` into `folder`, after taking away the results that lie there."""
    own = [path for path in folder.iterdir() if _OWN_FILES.fullmatch(path.name)]
    for path in sorted(own, key=lambda path: path.name != REPORT):
        path.unlink()
    for path in sorted(partial.iterdir(), key=lambda path: path.name == REPORT):
        path.replace(folder / path.name)
