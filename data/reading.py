"""Pictures as tensors: reading those that users bring, writing, and the way to and from bytes.

Files hold 8- or 16-bit pictures in a dozen colour layouts; inside the project an image is float32 RGB in [-1, 1]. The
decoding is in `data.picture_files`, which knows arrays alone and runs without torch.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from data.finding import IMAGE_SUFFIXES, Found, find_images
from data.picture_files import MAX_PIXELS, MIN_SIDE, UnreadableImage, centre_square, read_pixels, write_pixels

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "MIN_SIDE",
    "Found",
    "UnreadableImage",
    "find_images",
    "from_uint8",
    "read_image",
    "square",
    "to_uint8",
    "write_png",
]


def read_image(path: Path | str) -> Tensor:
    """Reads a picture of any common kind as RGB.

    8 and 16 bit, grey, colour, palette, CMYK and 1-bit pictures are converted; transparent parts are laid over white;
    the EXIF rotation is applied; of animated files the first frame is taken. Colour profiles are not applied.

    Args:
        path: A PNG, JPEG, WebP, BMP, TIFF, GIF or PPM file of at least 4 px a side and at most 64 megapixels.

    Returns:
        Image (3, H, W), float32 in [-1, 1].

    Raises:
        UnreadableImage: If there is no such file or it is no whole picture of such a size. The size is checked before
            the pixels are decoded.
    """
    return torch.from_numpy(read_pixels(path))


def square(image: Tensor) -> tuple[Tensor, bool]:
    """Crops the centre of a picture to a square.

    Args:
        image: Image (3, H, W).

    Returns:
        Image (3, S, S) with S = min(H, W), and whether anything was cut off.

    Raises:
        ValueError: If image is not (C, H, W).
    """
    if image.ndim != 3:
        raise ValueError(f"Expected one image (3, H, W), got shape {tuple(image.shape)}.")
    height, width = image.shape[-2:]
    rows, columns = centre_square(height, width)
    return image[:, rows, columns].contiguous(), height != width


def to_uint8(images: Tensor) -> Tensor:
    """Converts images to bytes, round(127.5 (x + 1)), clamped, halves to even.

    Args:
        images: Images (…, 3, H, W), floating point in [-1, 1].

    Returns:
        Images of the same shape, uint8.

    Raises:
        ValueError: If the images are not floating point, since bytes taken for [-1, 1] would all turn white.
    """
    if not images.is_floating_point():
        raise ValueError(f"Expected floating-point images in [-1, 1], got {images.dtype}; use from_uint8 for bytes.")
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """Converts bytes to images, x / 127.5 - 1.

    Args:
        images: Images (…, 3, H, W), uint8.

    Returns:
        Images of the same shape, float32 in [-1, 1]; to_uint8 gives the same bytes back.

    Raises:
        ValueError: If the images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"Expected uint8 images, got {images.dtype}.")
    return images.float() / 127.5 - 1


def write_png(image: Tensor, path: Path | str) -> None:
    """Writes one image as an 8-bit PNG, the same bytes for the same image.

    Args:
        image: Image (3, H, W) in [-1, 1], clamped.
        path: The file; its folder must exist.

    Raises:
        ValueError: If image is not (3, H, W), or holds NaN.
    """
    write_pixels(image.detach().cpu().numpy(), path)
