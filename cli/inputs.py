"""The pictures that are upsampled: checked and brought to the size that the bundle takes; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.console import print_error
from data.image_io import centre_square, from_uint8, read_image, to_uint8
from data.listing import Picture
from data.resize import resize


class Item(NamedTuple):
    """One input of a call."""

    number: int  # its place among all, from 0
    picture: Picture
    name: str  # of what it becomes, different for each


@dataclass(frozen=True)
class InputFace:
    """An input as it is upsampled.

    Attributes:
        image: The face (3, s, s) in [-1, 1], in steps of 8 bit as input.png holds it.
        origin: Width and height of the picture in pixels.
    """

    image: np.ndarray
    origin: tuple[int, int]


def check_size(width: int, height: int, lr_sizes: tuple[int, int], downscale: int | None) -> None:
    """Checks that a picture can be upsampled.

    Args:
        width: Of the picture in pixels.
        height: Of the picture in pixels.
        lr_sizes: Smallest and largest size in pixels that the bundle takes.
        downscale: Size in pixels that it is downscaled to first, None to take it as it is.

    Raises:
        ValueError: If its centre square is too small or too large.
    """
    size = min(width, height)
    smallest, largest = lr_sizes
    if size < smallest:
        raise ValueError(
            f"{width} x {height} px is less than the {smallest} px that this bundle takes; use a larger picture"
        )
    if downscale is None and size > largest:
        raise ValueError(
            f"{width} x {height} px is more than the {largest} px that this bundle takes; "
            "--downscale PX makes a low-resolution face of it first, such as --downscale 16"
        )
    if downscale is not None and size < downscale:
        raise ValueError(f"{width} x {height} px cannot be downscaled to {downscale} px; leave out --downscale for it")


def warn_of_crop(path: Picture, width: int, height: int) -> None:
    """Says that only the centre of a picture counts, if it is not square."""
    if width != height:
        size = min(width, height)
        print_error(
            f"warning: {path}: {width} x {height} px is not square; only its centre of {size} x {size} px counts"
        )


def read_picture(path: Picture) -> np.ndarray:
    """Reads a picture, see `data.image_io.read_image`."""
    return read_image(path) if isinstance(path, Path) else read_image(path.open(), str(path))


def to_face(image: np.ndarray, lr_sizes: tuple[int, int], downscale: int | None) -> InputFace:
    """Makes the centre square of a picture the low-resolution face that is upsampled.

    Args:
        image: The picture (3, H, W) in [-1, 1].
        lr_sizes: Smallest and largest size in pixels that the bundle takes.
        downscale: Size in pixels to downscale it to first, None to take it as it is.

    Returns:
        The face.

    Raises:
        ValueError: If the picture is too small or too large.
    """
    height, width = image.shape[-2:]
    rows, columns = centre_square(height, width)
    check_size(width, height, lr_sizes, downscale)
    image = image[:, rows, columns]
    if downscale is not None:
        image = resize(image, downscale)
    return InputFace(from_uint8(to_uint8(image)), (width, height))
