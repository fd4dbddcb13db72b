"""The pictures that a command line names: files, folders, lists, patterns, zips and Parquet files; without torch."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath

from data.contents import Contents, is_face_file
from data.files import ledger_names, read_names
from data.image_io import IMAGE_SUFFIXES, is_result

ARCHIVES = (".zip", ".parquet")
LIST = ".txt"
_MAX_NAMED_SUFFIXES = 5


@dataclass(frozen=True, slots=True)
class Member:
    """A picture in a zip or a Parquet file; has what a path has, as far as a picture's name goes."""

    archive: Path  # as it was named
    contents: Contents
    key: str  # the picture's name in it

    def __str__(self) -> str:
        """What messages call it."""
        return f"{self.archive}/{self.key}"

    @property
    def name(self) -> str:
        """The picture's name without folders."""
        return PurePosixPath(self.key).name

    @property
    def stem(self) -> str:
        """The picture's name without folders and suffix."""
        return PurePosixPath(self.key).stem

    def open(self) -> BytesIO:
        """Reads the encoded picture.

        Raises:
            UnreadableImage: If it is damaged.
        """
        content = self.contents.open(self.key)
        assert isinstance(content, BytesIO)  # only folders give paths
        return content


Picture = Path | Member


@dataclass(frozen=True)
class ImageListing:
    """The pictures that a command line names.

    Attributes:
        images: In the order of the inputs, those of a folder by name, each once.
        problems: Inputs that gave none, each with the reason.
        skipped: Folders that hold other files too, each with a remark about them.
    """

    images: list[Picture] = field(default_factory=list)
    problems: list[tuple[Path, str]] = field(default_factory=list)
    skipped: list[tuple[Path, str]] = field(default_factory=list)


def find_images(inputs: Sequence[Path | str]) -> ImageListing:
    """Finds the pictures that a command line names.

    Args:
        inputs: Of these kinds:
            files, taken whatever their suffix;
            folders, of which the pictures directly inside are taken (those with a suffix in IMAGE_SUFFIXES) in the
            order of their names; if there are none, those in subfolders, without hidden ones and masks;
            lists, .txt with a file or folder in each line, sought from the current folder, then from the list's own;
            zips and Parquet files, see `data.contents.Contents`;
            patterns with * ? [ ], where no file is named so; ** stands for any number of folders.

    Returns:
        The pictures, and what is to be said about inputs that gave none, or gave not all that they hold.
    """
    found = ImageListing()
    images: dict[str, Picture] = {}  # path without links: path as given, so that a picture named twice is read once
    for path in inputs:
        for image in _look_at(path, found):
            # Unlike Path.resolve, realpath does not mind links that go round in circles.
            images.setdefault(os.path.realpath(str(image)), image)
    found.images.extend(images.values())
    return found


def _look_at(path: Path | str, found: ImageListing, lists: bool = True) -> Iterable[Picture]:
    """Gives the pictures of one input, and notes in `found` what there is to say about it."""
    if not str(path):
        found.problems.append((Path(path), "expected a file or folder, got an empty name; check the command"))
        return []
    path = Path(path)
    try:
        if path.is_dir():
            return _look_into(path, found)
        if not os.path.lexists(path):
            matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(str(path)) else []
            if not matches:
                found.problems.append((path, "no such file or folder; check the path"))
            return [image for match in matches for image in _look_at(match, found)]
        if path.suffix.lower() in ARCHIVES:
            contents = Contents(path)
            return [Member(path, contents, key) for key in contents.pictures]
        if path.suffix.lower() == LIST and lists:
            return [image for entry in _entries(path) for image in _look_at(entry, found, lists=False)]
    except OSError as error:
        found.problems.append((path, f"cannot be looked at ({error.strerror or error}); check its permissions"))
        return []
    except ValueError as error:
        found.problems.append((path, str(error)))
        return []
    return [path]  # a broken or circular link fails later, as a picture that cannot be read


def _entries(path: Path) -> Iterator[Path]:
    """Gives what the lines of a list name."""
    for line in read_names(path):
        yield Path(line) if os.path.lexists(line) else path.parent / line


def _look_into(folder: Path, found: ImageListing) -> list[Path]:
    """Gives the pictures of a folder."""
    images, others = _files_in(folder)
    images = images or _files_below(folder)
    if not images:
        remark = f"; {_remark(others)}" if others else ""
        found.problems.append((folder, f"a folder without images ({' '.join(IMAGE_SUFFIXES)}){remark}"))
    elif others:
        found.skipped.append((folder, _remark(others)))
    return images


def _files_in(folder: Path) -> tuple[list[Path], list[Path]]:
    """Lists pictures and other files directly in a folder by name, without hidden ones and our own results."""
    ours = ledger_names(folder, "report.json") | ledger_names(folder, "faces.json")
    files = sorted((p for p in folder.iterdir() if p.name[0] != "." and not p.is_dir()), key=lambda p: p.name)
    files = [p for p in files if p.name not in ours and not (p.name == "overview.png" and is_result(p))]
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    return images, [p for p in files if p.suffix.lower() not in IMAGE_SUFFIXES]


def _files_below(folder: Path) -> list[Path]:
    """Lists the pictures in all subfolders, as those of CelebA's or FFHQ's folder."""
    found = []
    for place, folders, _ in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [p for p in _files_in(Path(place))[0] if is_face_file(p.relative_to(folder).as_posix())]
    return found


def _remark(others: Sequence[Path]) -> str:
    """Says how many files are no pictures to us, and of which kinds."""
    suffixes = sorted({path.suffix.lower() or "no suffix" for path in others})
    named = ", ".join(suffixes[:_MAX_NAMED_SUFFIXES]) + (", …" if len(suffixes) > _MAX_NAMED_SUFFIXES else "")
    return f"{len(others)} other file{'s' if len(others) > 1 else ''} skipped ({named})"
