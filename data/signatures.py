"""Names what a file is by its first bytes, for messages about a file that is not what was expected."""

from __future__ import annotations

from pathlib import Path

AGAIN = "download the file itself"

# First bytes, what such a file is, and what to do.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file it points to",
        "run `git lfs pull`",
    ),
    (b"<!doctype html", "a web page", f"{AGAIN}: the address led to a page about it, a login or an error"),
    (b"<html", "a web page", f"{AGAIN}: the address led to a page about it, a login or an error"),
    (b"<?xml", "an XML text", f"{AGAIN}: servers answer so when they refuse"),
    (b"{", "a JSON text", f"{AGAIN}: servers answer so when they refuse"),
    (b"\x1f\x8b", "a gzip archive", "unpack it with `gunzip` or `tar xzf`"),
    (b"bzh", "a bzip2 archive", "unpack it with `bunzip2` or `tar xjf`"),
    (b"\xfd7zxz", "an xz archive", "unpack it with `unxz` or `tar xJf`"),
    (b"(\xb5/\xfd", "a Zstandard archive", "unpack it with `unzstd`"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"rar!", "a RAR archive", "unpack it"),
    (b"\x89hdf", "an HDF5 file, as Keras writes", "save the weights from PyTorch with torch.save(G.state_dict(), …)"),
    (b"\x93numpy", "a NumPy array", "save a generator's tensors by name with torch.save(G.state_dict(), …)"),
    (b"%pdf", "a PDF document", "convert its picture to PNG or JPEG"),
    (b"#!", "a script", AGAIN),
)
# The brand at byte 8 of the containers that begin with an `ftyp` box.
_BRANDS = {
    b"heic": "an HEIC picture (HEVC)",
    b"heix": "an HEIC picture (HEVC)",
    b"hevc": "an HEIC sequence (HEVC)",
    b"mif1": "an HEIF picture",
    b"crx ": "a raw picture of a Canon camera (CR3)",
    b"mp42": "an MP4 video",
    b"isom": "an MP4 video",
    b"qt  ": "a QuickTime video",
}
_RAW = {
    ".arw": "Sony",
    ".cr2": "Canon",
    ".cr3": "Canon",
    ".dng": "DNG",
    ".nef": "Nikon",
    ".orf": "Olympus",
    ".raf": "Fuji",
}


def describe_bytes(head: bytes, name: str = "") -> str | None:
    """Names a file by its first 300 bytes, and for raw pictures of cameras its suffix; None if nothing is known.

    It says what it is and what to do, as "a web page; download the file itself".
    """
    if not head:
        return "an empty file; copy or download it again"
    suffix = Path(name).suffix.lower()
    if head[4:8] == b"ftyp" and head[8:12] in _BRANDS:
        what = _BRANDS[head[8:12]]
        return f"{what}; {'take single pictures' if 'video' in what else 'convert it to JPEG or PNG'}"
    if suffix in _RAW:
        return f"a raw picture of a camera ({suffix[1:].upper()}); convert it to TIFF, JPEG or PNG"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it with `tar xf`"
    start = head.lstrip(b" \t\r\n\xef\xbb\xbf").lower()
    return next((f"{what}; {advice}" for magic, what, advice in _SIGNATURES if start.startswith(magic)), None)


def describe_file(path: Path) -> str | None:
    """Names a file on disk that should hold weights; see `describe_bytes`."""
    with open(path, "rb") as file:
        head = file.read(512)
    picture = head.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM")) or head[8:12] == b"WEBP"
    return "a picture; expected weights" if picture else describe_bytes(head, path.name)
