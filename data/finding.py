"""Finding the pictures that a command line names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
MAX_NAMED_SUFFIXES = 5


@dataclass(frozen=True)
class Found:
    """The pictures that a command line names.

    Attributes:
        images: In the order of the inputs, those of a folder by name, each once.
        problems: Inputs that gave none, each with the reason.
        skipped: Folders that hold other files too, each with a remark about them.
    """

    images: list[Path] = field(default_factory=list)
    problems: list[tuple[Path, str]] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)


def _files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """Lists pictures and other files directly in a folder by name, without hidden ones such as macOS's ._face.png."""
    files = sorted((p for p in folder.iterdir() if p.name[0] != "." and not p.is_dir()), key=lambda p: p.name)
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    return images, [p for p in files if p.suffix.lower() not in IMAGE_SUFFIXES]


def _remark(others: Sequence[Path]) -> str:
    """Says how many files are no pictures to us, and of which kinds."""
    suffixes = sorted({path.suffix.lower() or "no suffix" for path in others})
    named = ", ".join(suffixes[:MAX_NAMED_SUFFIXES]) + (", …" if len(suffixes) > MAX_NAMED_SUFFIXES else "")
    return f"{len(others)} other file{'s' if len(others) > 1 else ''} skipped ({named})"


def _look_at(path: Path | str, found: Found) -> list[Path]:
    """Gives the pictures of one input, and notes in `found` what there is to say about it."""
    if not str(path):
        found.problems.append((Path(path), "expected a file or folder, got an empty name; check the command"))
        return []
    path = Path(path)
    try:
        if not path.is_dir():
            if os.path.lexists(path):  # a broken or circular link fails later, as a picture that cannot be read
                return [path]
            found.problems.append((path, "no such file or folder; check the path"))
            return []
        images, others = _files_in(path)
    except OSError as error:
        found.problems.append((path, f"cannot be looked at ({error.strerror}); check its permissions"))
        return []
    if not images:
        remark = f"; {_remark(others)}" if others else ""
        found.problems.append((path, f"a folder without images ({' '.join(IMAGE_SUFFIXES)}){remark}"))
    elif others:
        found.skipped.append((path, _remark(others)))
    return images


def find_images(inputs: Sequence[Path | str]) -> Found:
    """Finds the pictures that a command line names.

    Args:
        inputs: Files, taken whatever their suffix, and folders, of which the pictures directly inside are taken
            (those with a suffix in IMAGE_SUFFIXES) in the order of their names.

    Returns:
        The pictures, and what is to be said about inputs that gave none, or gave not all that they hold.
    """
    found = Found()
    images: dict[str, Path] = {}  # path without links: path as given, so that a picture named twice is read once
    for path in inputs:
        for image in _look_at(path, found):
            # Unlike Path.resolve, realpath does not mind links that go round in circles.
            images.setdefault(os.path.realpath(image), image)
    found.images.extend(images.values())
    return found
