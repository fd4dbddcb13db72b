"""Pasting back: the inverse of cutting out, bits outside of the squares, and what a file holds besides pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from data.ffhq_crop import Square, cut_out
from data.image_io import from_uint8, read_bytes
from data.paste_back import Patch, Photo, paste_back, read_photo, write_photo

RNG = np.random.default_rng(0)


def square(centre: tuple[float, float], side: float, degrees: float = 0) -> Square:
    angle = np.radians(degrees)
    return Square(np.array(centre), side / 2 * np.array([np.cos(angle), np.sin(angle)]))


def waves(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A smooth picture known at every place, in [-1, 1]; (3, H, W)."""
    return np.stack([0.8 * np.sin(x / 9 + c) * np.cos(y / 11 - c) for c in range(3)]).astype(np.float32)


def grid(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    return np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)


def picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray((image * 127.5 + 127.5).round().astype(np.uint8).transpose(1, 2, 0))


def depth(where: Square, width: int, height: int) -> np.ndarray:
    """How deep pixels lie in a square, from its corners: the least distance to a side in sides, below 0 outside."""
    x, y = grid(width, height)
    corners = where.corners
    sides = []
    for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        along = (b - a) / np.hypot(*(b - a))
        sides.append((along[1] * (x - a[0]) - along[0] * (y - a[1])) / where.side)  # counter-clockwise as one sees it
    return np.min(sides, axis=0)


def plain(image: Image.Image) -> Photo:
    return Photo(image, 1, None, None)


@pytest.mark.parametrize("degrees", [0, 20, -75, 180])
@pytest.mark.parametrize(("side", "size", "scale"), [(50.0, 64, 1), (50.0, 64, 2), (50.3, 32, 1), (50.3, 32, 3)])
def test_pasting_is_the_inverse_of_cutting(degrees: float, side: float, size: int, scale: int) -> None:
    """A face whose pixels follow a formula, against that formula at the pixels of the photo."""
    where = square((61.3, 48.8), side, degrees)
    u, v = (np.stack(grid(size, size)) / size * 2 - 1)[:, None]
    down = np.array([-where.right[1], where.right[0]])
    x, y = (where.centre[c] + where.right[c] * u[0] + down[c] * v[0] for c in (0, 1))
    photo = plain(Image.new("RGB", (120, 100), "white"))
    pasted = paste_back(photo, [Patch(where, waves(x, y))], scale)
    assert pasted.picture.size == (120 * scale, 100 * scale)
    core = depth(where.moved(np.zeros(2), scale), 120 * scale, 100 * scale) > 0.15
    truth = np.asarray(picture(waves(*(g / scale for g in grid(120 * scale, 100 * scale))))).astype(int)
    error = np.abs(np.asarray(pasted.picture) - truth)[core]
    assert error.mean() < 1 and error.max() <= 6


def test_what_was_cut_out_changes_nothing() -> None:
    photo = picture(waves(*grid(120, 100)))
    where = square((60.2, 50.7), 48.6, 12)
    face = from_uint8(np.asarray(cut_out(photo, where, 48)).transpose(2, 0, 1))
    pasted = np.asarray(paste_back(plain(photo), [Patch(where, face)]).picture).astype(int)
    assert np.abs(pasted - np.asarray(photo)).max() <= 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA"])
@pytest.mark.parametrize("where", [square((60, 50), 40, 30), square((5, 95), 44, -10), square((300, 50), 40)])
def test_pixels_outside_keep_their_bits_and_the_centre_is_the_face(mode: str, where: Square) -> None:
    photo = Image.fromarray(RNG.integers(0, 256, (100, 120, 4), dtype=np.uint8)).convert(mode)
    colours = photo.convert("RGB" if mode in ("RGB", "RGBA") else "L")
    pasted = paste_back(plain(photo), [Patch(where, np.zeros((3, 64, 64), np.float32))]).picture
    assert pasted.mode == mode
    if "A" in mode:
        assert pasted.getchannel("A").tobytes() == photo.getchannel("A").tobytes()
    before, after = np.asarray(colours), np.asarray(pasted.convert(colours.mode))
    inside = depth(where, 120, 100)
    assert np.array_equal(before[inside < 0], after[inside < 0])
    assert (abs(after[inside > 0.15].astype(int) - 128) <= 1).all()
    assert (inside < 0).all() or (before != after).any()


def test_overlapping_faces_keep_their_centres() -> None:
    squares = [square((40, 50), 50), square((75, 50), 40, 10), square((60, 70), 20)]
    colours = (-1.0, 0.0, 1.0)
    patches = [Patch(s, np.full((3, 32, 32), c, np.float32)) for s, c in zip(squares, colours, strict=True)]
    pasted = paste_back(plain(Image.new("RGB", (120, 100), (64, 64, 64))), patches).picture
    for where, colour in zip(squares, (0, 128, 255), strict=True):
        assert pasted.getpixel(tuple(where.centre.astype(int).tolist())) == (colour,) * 3


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112], block[0x010F] = orientation, "a camera"
    return block.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_profile_orientation_and_pixels_are_kept(tmp_path: Path, orientation: int, suffix: str) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # not of its colours, kept nevertheless
    path, out = tmp_path / f"a.{suffix}", tmp_path / "out.png"
    photo = Image.fromarray(RNG.integers(0, 256, (30, 50, 3), dtype=np.uint8))
    photo.save(path, exif=exif(orientation), icc_profile=profile)
    face = Patch(square((12, 11), 14), np.full((3, 8, 8), -1, np.float32))
    write_photo(paste_back(read_photo(path), [face]), out)
    with Image.open(path) as before, Image.open(out) as after:
        assert after.info["exif"] == before.info["exif"] and after.info["icc_profile"] == profile
        same = (np.asarray(before) == np.asarray(after)).all(axis=-1)
        assert after.size == before.size and same.mean() > 0.85
    upright = read_bytes(out).astype(int)
    assert (upright[9:13, 10:14] == 0).all()  # the square lies in the photo as it is seen
    changed = np.argwhere((upright != read_bytes(path)).any(axis=-1))
    assert changed.min(axis=0).tolist() == [4, 5] and changed.max(axis=0).tolist() == [17, 18]


def test_face_takes_the_colours_of_the_photos_profile(tmp_path: Path) -> None:
    """sRGB with red and green exchanged is a profile whose conversion is known."""
    profile = swapped_profile()
    Image.new("RGB", (40, 40), (200, 50, 90)).save(tmp_path / "a.png", icc_profile=profile)
    face = np.stack([np.full((8, 8), c, np.float32) for c in (0.5, -0.25, 0.1)])
    write_photo(paste_back(read_photo(tmp_path / "a.png"), [Patch(square((20, 20), 30), face)]), tmp_path / "b.png")
    stored = np.asarray(Image.open(tmp_path / "b.png"))
    assert np.abs(stored[20, 20].astype(int) - (96, 191, 140)).max() <= 2
    assert np.abs(read_bytes(tmp_path / "b.png")[20, 20].astype(int) - (191, 96, 140)).max() <= 2
    assert tuple(stored[0, 0]) == (200, 50, 90)


def swapped_profile() -> bytes:
    """Gives an sRGB profile whose red primary is green and whose green primary is red."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    names = {bytes(content[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(content[131])}
    content[names[b"rXYZ"] : names[b"rXYZ"] + 4], content[names[b"gXYZ"] : names[b"gXYZ"] + 4] = b"gXYZ", b"rXYZ"
    return bytes(content).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize(
    ("mode", "kept"), [("1", True), ("P", True), ("PA", True), ("CMYK", False), ("I;16", False), ("F", False)]
)
def test_colours_that_png_lacks_are_converted_and_named(tmp_path: Path, mode: str, kept: bool) -> None:
    grey = Image.fromarray(RNG.integers(0, 256, (20, 30), dtype=np.uint8))
    image = grey.convert("P") if mode == "PA" else grey.convert(mode)
    path = tmp_path / "a.tif"
    image.save(path, **({"transparency": 3} if mode == "PA" else {}))
    photo = read_photo(path)
    assert (photo.converted == "") == kept
    write_photo(photo, tmp_path / "b.png")
    assert np.abs(read_bytes(tmp_path / "b.png").astype(int) - read_bytes(path)).max() <= 1


def test_too_large_enlargement_is_refused() -> None:
    with pytest.raises(ValueError, match="enlarge it less"):
        paste_back(plain(Image.new("L", (2000, 2000))), [], 10)
