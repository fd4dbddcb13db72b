"""What is written for one face: pictures, latents and the report, complete or not at all."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from data.figures import face_sheet
from data.image_io import write_image
from data.listing import Picture

FORMAT = "amortized-pulse/report/2"
REPORT = "report.json"
FACES = "faces.json"  # of a photo, in the folder that holds those of its faces
MAX_K = 64  # samples per face

_FORBIDDEN = re.compile(r'[<>:"|?*\\\x00-\x1f\x7f]')  # in names of files on Windows
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # which Windows opens by such names
_RESERVED = {"overview.png", "failed.jsonl"}


def folder_names(paths: Sequence[Picture], reserved: set[str] = _RESERVED) -> list[str]:
    """Gives every input a folder name of its own: its stem, or "stem-2", "stem-3" … if another input has it already.

    Names that differ in case or in the spelling of letters (NFC, NFD) alone count as the same, as they do on macOS and
    Windows. What Windows refuses in a name becomes "_".

    Args:
        paths: The inputs.
        reserved: Names that are not given, in small letters.

    Returns:
        One name per input, which depends on the names and order of the inputs alone.
    """
    stems = [_portable(path.stem) for path in paths]
    taken = set(reserved)
    names: list[str | None] = []
    for stem in stems:  # a file that is itself called face-2.png has the first right to that name
        names.append(None if _as_one(stem) in taken else stem)
        taken.add(_as_one(stem))
    numbers: dict[str, int] = {}  # a million inputs may have one stem
    for i, stem in enumerate(stems):
        while names[i] is None:
            number = numbers[stem] = numbers.get(stem, 1) + 1
            if _as_one(f"{stem}-{number}") not in taken:
                names[i] = f"{stem}-{number}"
                taken.add(_as_one(f"{stem}-{number}"))
    return [name for name in names if name is not None]


def _portable(stem: str) -> str:
    """Makes a stem a name that every system takes; that of "...png" is "..", which would be a folder outside."""
    name = _FORBIDDEN.sub("_", stem).strip(". ") or "face"
    return f"_{name}" if _DEVICE.fullmatch(name) else name


def _as_one(name: str) -> str:
    """Gives what is the same for names that some system takes for one."""
    return unicodedata.normalize("NFC", name).casefold()


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
        doubts = report.get("doubts")
        note = f"Doubtful: {', '.join(doubts)}." if doubts else ""
        face_sheet(lr, images, captions, note).save(folder / "grid.png")
    if "latents" in save:
        np.savez(folder / "latents.npz", ws=ws.astype(np.float32))
    write_json(report, folder / REPORT)


def _as_array(values: Any) -> np.ndarray:
    """Turns a tensor into an array without knowing torch, which programs that have arrays do not need."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Writes JSON with sorted keys in ASCII, the same bytes for the same content."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="ascii")
