"""What is written for one face: pictures, latents and the report, complete or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from data.image_io import write_image
from data.pictures import face_sheet

FORMAT = "amortized-pulse/report/2"
REPORT = "report.json"
MAX_K = 64  # samples per face

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


def make_report(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Builds the content of report.json.

    Args:
        notes: What is to be told: k, samples, input, seed, bundle and so on.

    Returns:
        The notes with "format".
    """
    return {**notes, "format": FORMAT}


def write_face(
    folder: Path, lr: ArrayLike, images: ArrayLike, ws: ArrayLike, report: Mapping[str, Any], save: Collection[str]
) -> None:
    """Writes everything about one face; from arrays, or from tensors wherever they are.

    Args:
        folder: An existing folder.
        lr: The low-resolution face (3, s, s) in [-1, 1].
        images: Samples (k, 3, R, R) in [-1, 1].
        ws: Their codes (k, L, D).
        report: From `make_report`; always written, since it says whose the folder is.
        save: What to write besides: "images", "grid", "latents".
    """
    lr, images, ws = _as_array(lr), _as_array(images), _as_array(ws)
    write_image(lr, folder / "input.png")
    if "images" in save:
        for i, image in enumerate(images, start=1):
            write_image(image, folder / f"{i}.png")
    if "grid" in save:
        captions = [f"{i}: {row['lr_psnr']:.0f} dB" for i, row in enumerate(report["samples"], start=1)]
        face_sheet(lr, images, captions).save(folder / "grid.png")
    if "latents" in save:
        np.savez(folder / "latents.npz", ws=ws.astype(np.float32))
    write_json(report, folder / REPORT)


def _as_array(values: Any) -> np.ndarray:
    """Turns a tensor into an array without knowing torch, which programs that have arrays do not need."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Writes JSON with sorted keys in ASCII, the same bytes for the same content."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="ascii")


def check_free(folder: Path, overwrite: bool, k: int) -> None:
    """Refuses to write where something is that infer.py did not write.

    Args:
        folder: The folder to be.
        overwrite: An earlier result of infer.py in it may be replaced.
        k: Samples to be written.

    Raises:
        ValueError: If the folder exists and is not to be overwritten, if it is a file, or if a file that would be
            replaced is not one of those that the report in it stands for.
    """
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; move it away, or name another place with --out")
    if not overwrite:
        raise ValueError(f"{folder} exists; --overwrite replaces the results in it, --out names another place")
    ours = _earlier_files(folder)
    strange = [name for name in file_names(k) if name not in ours and os.path.lexists(folder / name)]
    strange += [name for name in ours if (folder / name).is_dir()]
    if strange:
        raise ValueError(f"{folder}: {', '.join(strange)} is not a result of infer.py; move it or use --out")


def file_names(k: int) -> list[str]:
    """Names the files that may be in the folder of a face with k samples, the report last."""
    fixed = ["grid.png", "input.png", "sweep.png", "trajectory.webp", "latents.npz", REPORT]
    return [*(f"{i}.png" for i in range(1, k + 1)), *fixed]


def _earlier_files(folder: Path) -> list[str]:
    """Names the files that an earlier call wrote into a folder, by its report; none if there is no such report."""
    try:
        report = json.loads((folder / REPORT).read_bytes())
    except (ValueError, OSError, RecursionError):
        return []
    if not isinstance(report, dict) or report.get("format") != FORMAT or type(report.get("k")) is not int:
        return []
    return file_names(min(report["k"], MAX_K))


@contextmanager
def complete_or_nothing(folder: Path, overwrite: bool, k: int) -> Iterator[Path]:
    """Gives a temporary folder, which takes the place of `folder` if the block ends without an error.

    If `folder` exists, the results of an earlier call in it are replaced and other files stay. Its report leaves first
    and the new one comes last: a folder without a report is not complete.

    Args:
        folder: The folder to be.
        overwrite: It may exist.
        k: Samples to be written.

    Yields:
        The temporary folder, empty.

    Raises:
        ValueError: See `check_free`.
    """
    check_free(folder, overwrite, k)
    with _beside(folder) as partial:
        partial.mkdir()
        yield partial
        check_free(folder, overwrite, k)  # another process may have been faster
        if folder.is_dir():
            _replace(folder, partial)
        else:
            partial.rename(folder)


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Gives a temporary path, whose file takes the place of the file `path` if the block ends without an error.

    Args:
        path: The file to be; an older one is replaced.

    Yields:
        The temporary path.
    """
    with _beside(path) as partial:
        yield partial
        partial.replace(path)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Gives a path of the same name in a temporary folder beside `path`, which goes with what is left in it.

    Nobody but the user may look into such a folder, but what is made in it has the permissions of any new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent, ignore_cleanup_errors=True) as holder:
        yield Path(holder) / path.name


def _replace(folder: Path, partial: Path) -> None:
    """Moves the files in `partial` into `folder`, after taking away the results that lie there."""
    for name in reversed(_earlier_files(folder)):
        (folder / name).unlink(missing_ok=True)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == REPORT):
        path.replace(folder / path.name)
