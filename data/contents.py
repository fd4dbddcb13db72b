"""The files of a data set, wherever they lie: in a folder, a zip or a Parquet table; without torch."""

from __future__ import annotations

import io
import os
import re
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from data.archive import Member, read_directory, read_member
from data.files import ROOT
from data.image_io import IMAGE_SUFFIXES, UnreadableImage
from data.packed import ARRAY, PackedFaces
from data.parquet import ParquetPictures

MAPPING = "CelebA-HQ-to-CelebA-mapping.txt"  # of CelebAMask-HQ
# Of CelebAMask-HQ, which has 400,000 of them besides its 30,000 faces: the folder, and the names where it was renamed.
MASK_FOLDER = "CelebAMask-HQ-mask-anno"
MASK = re.compile(
    r"\d{5}_(skin|nose|mouth|cloth|hair|hat|eye_g|ear_r|neck|neck_l|[lr]_(brow|eye|ear)|[ul]_lip)\.png", re.IGNORECASE
)
# zipfile tells of encrypted members and unknown compressions by RuntimeError, of broken ones by the others.
_UNREADABLE = (OSError, RuntimeError, zipfile.BadZipFile, zlib.error, EOFError, ValueError)


def data_folders() -> list[Path]:
    """Lists the folders in which data is looked for, in order."""
    own = os.environ.get("AMORTIZED_PULSE_DATA")
    folders = [Path.cwd(), *([Path(own).expanduser()] if own else [])]
    return [*folders, ROOT / "datasets", ROOT.parent / "shared" / "data"]


def find_data(name: str | Path) -> Path:
    """Finds a zip, a folder or a Parquet file by path or by name.

    The path itself comes first, then the name in the folder named by AMORTIZED_PULSE_DATA, in `datasets/` of the
    repository, and in `../shared/data` next to it.

    Raises:
        FileNotFoundError: If there is none; the message says what to put where.
    """
    name = Path(name).expanduser()
    for folder in data_folders():
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(
        f"Expected faces at {name}: a zip, a folder or a Parquet file of square pictures, not found. "
        f"Put it into {ROOT / 'datasets'}, or name its folder in AMORTIZED_PULSE_DATA. "
        "CelebA comes from its authors (search: 'Large-scale CelebFaces Attributes (CelebA) Dataset'), for "
        "non-commercial research; CelebA-HQ is made from it. Crop the faces as FFHQ does."
    )


def is_face_file(name: str) -> bool:
    """Tells pictures by their paths from hidden files, what macOS adds to zips, and the masks of CelebAMask-HQ."""
    path = PurePosixPath(name)
    hidden = any(part[0] == "." or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden and _is_no_mask(name)


def _is_no_mask(name: str) -> bool:
    """Tells everything else from a mask of CelebAMask-HQ."""
    return f"{MASK_FOLDER}/" not in name and MASK.fullmatch(name.rpartition("/")[2]) is None


class Contents:
    """The files of a data set, a zip, a folder with its subfolders or a table, without the masks of CelebAMask-HQ.

    Args:
        source: See `find_data`.

    Raises:
        FileNotFoundError: If the source does not exist.
        ValueError: If it is none of them.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = find_data(source)
        self._members: dict[str, Member] = {}
        self.files: list[str] = []
        self._opened: tuple[int, BinaryIO] | None = None
        self._table: ParquetPictures | None = None
        self.packed = PackedFaces(self.source) if PackedFaces.is_one(self.source) else None
        if self.source.is_dir():
            files = (path.relative_to(self.source).as_posix() for path in self.source.rglob("*"))
            self.files = sorted(filter(_is_no_mask, files))
            return
        if self.source.suffix == ".parquet":
            self._table = ParquetPictures(self.source)
            return
        try:
            self._members = read_directory(self.source, self.source.stat().st_mtime_ns, _is_no_mask)
            self.files = list(self._members)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{self.source}: neither a folder nor a complete zip ({error}).") from error

    def __getstate__(self) -> dict:
        """Leaves the open zip behind: every worker opens its own."""
        return {**self.__dict__, "_opened": None}

    @property
    def pictures(self) -> list[str]:
        """The pictures by name, without hidden files and what macOS adds to zips."""
        if self._table is not None:
            return list(self._table.rows)
        return self.packed.names if self.packed else list(filter(is_face_file, self.files))

    def open(self, name: str) -> io.BytesIO | Path:
        """Gives a file of the data set: where it lies, or what the zip or the table holds.

        Raises:
            UnreadableImage: If that is damaged.
        """
        if self.source.is_dir():
            return self.source / name
        try:
            if self._table is not None:
                return io.BytesIO(self._table[name])
            if self._opened is None or self._opened[0] != os.getpid():  # a forked process would move our place in it
                self._opened = os.getpid(), self.source.open("rb")
            return read_member(self._opened[1], name, self._members[name])
        except _UNREADABLE as error:
            raise UnreadableImage(f"{self.source}: {name}: cannot be read ({error}); remove it.") from error

    def size(self, name: str) -> int:
        """Gives the bytes of a picture as they are stored; where that is in one file with others, those of the file."""
        if self.packed or self._table is not None:
            return (self.source / ARRAY if self.packed else self.source).stat().st_size
        return self._members[name].size if self._members else (self.source / name).stat().st_size

    def companion(self, name: str) -> bytes:
        """Reads a text that belongs to the data set: from within it, next to it, or where data is looked for.

        Raises:
            FileNotFoundError: If there is none; says what to put where.
        """
        inside = [file for file in self.files if Path(file).name == name]
        if inside:
            file = self.open(inside[0])
            return file.read_bytes() if isinstance(file, Path) else file.getvalue()
        beside = self.source.resolve().parent
        for folder in (beside, beside.parent, *data_folders()):
            if (folder / name).is_file():
                return (folder / name).read_bytes()
        origin = " It comes with CelebAMask-HQ (https://github.com/switchablenorms/CelebAMask-HQ)." * (name == MAPPING)
        raise FileNotFoundError(
            f"Expected {name} in {self.source}, next to it, or in {ROOT / 'datasets'}; not found.{origin} Put it there."
        )
