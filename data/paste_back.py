"""Puts faces back where they were cut out of a photo; every pixel outside of their squares keeps its bits.

The photo is taken as its file stores it: its own colours, its own profile, its own orientation. A face is converted to
the photo's colours, turned and scaled by the inverse of the transform that cut it out, and blended in by a mask that
falls to 0 towards the border of the square. Where squares overlap, each pixel belongs to the face whose centre is
nearer, in units of its own square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms

from data.ffhq_crop import Square
from data.image_io import FORMATS, MAX_PIXELS, colour_profile, orientation_of, read_bytes, srgb_profile, to_picture
from data.resize import resize

FEATHER = 0.25  # of half the side: where the mask rises from 0 to 1
_MODES = {"1": "L", "L": "L", "LA": "LA", "P": "RGB", "PA": "RGBA", "RGB": "RGB", "RGBA": "RGBA"}  # nothing is lost
# How a stored picture is turned upright for each EXIF orientation, and how back.
_UPRIGHT = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_LEFT_RIGHT),
    3: (Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_180),
    4: (Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.FLIP_TOP_BOTTOM),
    5: (Image.Transpose.TRANSPOSE, Image.Transpose.TRANSPOSE),
    6: (Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_90),
    7: (Image.Transpose.TRANSVERSE, Image.Transpose.TRANSVERSE),
    8: (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_270),
}


@dataclass(frozen=True)
class Patch:
    """A face to be put back.

    Attributes:
        square: Where it was cut out of the upright photo.
        image: What is put there (3, R, R) in [-1, 1], sRGB.
    """

    square: Square
    image: np.ndarray


@dataclass(frozen=True)
class Photo:
    """A photo as its file stores it, turned upright.

    Attributes:
        picture: Its pixels: grey or RGB, with transparency or without, of 8 bit.
        orientation: The orientation, 1 to 8, that its EXIF block says and the file is to keep; 1 without such a block.
        exif: Its EXIF block, None if there is none.
        icc_profile: The profile of its colours, None if there is none.
        converted: What its colours were converted from, since PNG has no such; empty if they are as they were.
    """

    picture: Image.Image
    orientation: int
    exif: bytes | None
    icc_profile: bytes | None
    converted: str = ""


def read_photo(source: Path | BinaryIO) -> Photo:
    """Reads a photo without touching its colours; CMYK and pictures of more than 8 bit become sRGB.

    Args:
        source: The file, its path or opened, which `data.image_io.read_bytes` can read.

    Returns:
        The photo.

    Raises:
        UnreadableImage: See `data.image_io.read_bytes`.
    """
    with Image.open(source, formats=FORMATS) as image:
        exif, profile, orientation = image.info.get("exif"), image.info.get("icc_profile"), orientation_of(image)
        kept_turn = orientation if exif else 1
        mode = _MODES.get(image.mode)
        if mode is None or ";16" in str(image.tile):
            deep = image.mode if image.mode in ("CMYK", "YCbCr", "LAB", "HSV") else "more than 8 bit"
            if not isinstance(source, Path):
                source.seek(0)
            return Photo(Image.fromarray(read_bytes(source)), kept_turn, exif, None, deep)
        if image.has_transparency_data:
            mode = "LA" if mode in ("L", "LA") else "RGBA"
        picture = image.convert(mode)
        if orientation in _UPRIGHT:
            picture = picture.transpose(_UPRIGHT[orientation][0])
        return Photo(picture, kept_turn, exif, profile)


def paste_back(photo: Photo, patches: Sequence[Patch], scale: int = 1) -> Photo:
    """Enlarges a photo and puts faces into it.

    Args:
        photo: From `read_photo`.
        patches: The faces.
        scale: How much larger the photo becomes, by Lanczos; at 1 its pixels stay as they are.

    Returns:
        The new photo.

    Raises:
        ValueError: If it would be too large.
    """
    picture = photo.picture
    width, height = picture.width * scale, picture.height * scale
    if scale > 1:
        if width * height > 4 * MAX_PIXELS:
            raise ValueError(
                f"expected a photo of at most {4 * MAX_PIXELS} px, got {width} x {height}; enlarge it less"
            )
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.array(picture)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    squares = [patch.square.moved(np.zeros(2), scale) for patch in patches]
    for i, patch in enumerate(patches):
        _blend(pixels, patch.image, squares[i], squares[:i] + squares[i + 1 :], photo.icc_profile)
    return replace(photo, picture=Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels))


def write_photo(photo: Photo, path: Path) -> None:
    """Writes a photo as PNG, without loss, with its EXIF block and profile and in its own orientation.

    Args:
        photo: The photo.
        path: The file.
    """
    picture = photo.picture
    if photo.orientation in _UPRIGHT:
        picture = picture.transpose(_UPRIGHT[photo.orientation][1])
    picture.info.clear()
    notes = {"exif": photo.exif, "icc_profile": photo.icc_profile}
    picture.save(path, format="PNG", compress_level=3, **{name: note for name, note in notes.items() if note})


def _blend(
    pixels: np.ndarray, image: np.ndarray, square: Square, others: Sequence[Square], profile: bytes | None
) -> None:
    """Blends one face into the pixels (H, W, C) of a photo."""
    size = min(image.shape[-1], max(1, int(square.side)))
    face = _in_colours_of(to_picture(resize(image, size)), pixels.shape[-1], profile)
    low = np.maximum(np.floor(square.corners.min(axis=0)).astype(int), 0)
    high = np.minimum(np.ceil(square.corners.max(axis=0)).astype(int), pixels.shape[1::-1])
    if (low >= high).any():
        return
    square, others = square.moved(low, 1), [other.moved(low, 1) for other in others]
    # From the centre of a pixel of the box to that of the face's: p ↦ (p − top left) · axis / side² · size.
    across, down = _axes(square) * size
    corner = square.corners[0]
    affine = (*across, -across @ corner, *down, -down @ corner)
    box = (int(high[0] - low[0]), int(high[1] - low[1]))
    turned = np.asarray(face.transform(box, Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC))
    weights = _mask(square, others, *box)[..., None]
    there = pixels[low[1] : high[1], low[0] : high[0], : 3 if pixels.shape[-1] > 2 else 1]  # without transparency
    mixed = there + weights * (turned.reshape(there.shape).astype(np.float32) - there)
    there[:] = np.where(weights > 0, np.rint(mixed), there)


def _mask(square: Square, others: Sequence[Square], width: int, height: int) -> np.ndarray:
    """Gives the weights (H, W) of a face in a box: 1 inside its square, 0 outside and where other faces are nearer."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    places = np.stack([x, y], axis=-1)
    u, v = _depths(square, places)
    weights = _smooth(u / FEATHER) * _smooth(v / FEATHER)
    for other in others:
        weights = weights * _smooth((np.minimum(u, v) - np.minimum(*_depths(other, places))) / FEATHER + 0.5)
    return weights.astype(np.float32)


def _depths(square: Square, places: np.ndarray) -> np.ndarray:
    """Says how deep places (H, W, 2) lie in a square, across and down (2, H, W): 1 in its centre, 0 at the border."""
    return 1 - np.abs(np.moveaxis((places - square.centre) @ _axes(square).T, -1, 0)) * 2


def _axes(square: Square) -> np.ndarray:
    """Gives the directions (2, 2) to the right and down, of length 1 / side."""
    right = square.right / (2 * square.right @ square.right)
    return np.stack([right, [-right[1], right[0]]])


def _smooth(values: np.ndarray) -> np.ndarray:
    """Rises from 0 to 1 without a kink."""
    values = values.clip(0, 1)
    return values * values * (3 - 2 * values)


def _in_colours_of(face: Image.Image, channels: int, profile: bytes | None) -> Image.Image:
    """Converts an sRGB picture to the colours of a photo."""
    mode = "RGB" if channels > 2 else "L"
    target = colour_profile(profile)
    if target is None:
        return face.convert(mode)
    try:
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        return ImageCms.profileToProfile(face, srgb_profile(), target, intent, mode) or face.convert(mode)
    except (ImageCms.PyCMSError, ValueError):  # such as a profile of other colours than the picture's
        return face.convert(mode)
