"""The members of a zip, whose directory is read once for all processes that read from it.

Python's `zipfile` keeps an object for each member: for CelebAMask-HQ, with 450,000 masks, 384 MB and 2.4 s in every
worker of a data loader. Here a worker gets the places of the faces alone, and opens the file.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

LOCAL_HEADER = 30  # bytes before a member's name, which ends with the lengths of the name and of what follows it


class Member(NamedTuple):
    """Where a member lies, sizes in bytes."""

    offset: int  # of its local header
    size: int  # of what is stored
    crc: int  # checksum of its content
    method: int  # of its compression; -1 where only `zipfile` can read it, or say why not


@lru_cache(maxsize=4)
def read_directory(path: Path, modified_ns: int, wanted: Callable[[str], bool]) -> dict[str, Member]:
    """Reads which members a zip has whose names are wanted, sorted by name; anew if the file was modified.

    Raises:
        zipfile.BadZipFile: If it is no complete zip.
    """
    with zipfile.ZipFile(path) as archive:
        found = {info.filename: _member(info) for info in archive.infolist() if wanted(info.filename)}
    return dict(sorted(found.items()))


def _member(info: zipfile.ZipInfo) -> Member:
    plain = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not info.flag_bits & 1  # encrypted
    return Member(info.header_offset, info.compress_size, info.CRC, info.compress_type if plain else -1)


def read_member(file: BinaryIO, name: str, member: Member) -> io.BytesIO:
    """Reads the content of a member.

    Raises:
        zipfile.BadZipFile: If it is damaged.
        RuntimeError: If it is encrypted, or compressed in an unknown way.
    """
    if member.method < 0:
        with zipfile.ZipFile(file) as archive:
            return io.BytesIO(archive.read(name))
    file.seek(member.offset)
    header = file.read(LOCAL_HEADER)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no member begins where {name} should")
    file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), io.SEEK_CUR)
    content = file.read(member.size)
    if member.method == zipfile.ZIP_DEFLATED:
        content = zlib.decompress(content, -zlib.MAX_WBITS)
    if zlib.crc32(content) != member.crc:
        raise zipfile.BadZipFile(f"Bad CRC-32 for file {name!r}")
    return io.BytesIO(content)
