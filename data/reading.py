"""Reading the pictures that users bring, and writing pictures.

Files hold 8- or 16-bit pictures in a dozen colour layouts; inside the project an image is float32 RGB in [-1, 1]. This
file is the border between the two. What cannot be read is refused by one exception whose message can be shown as it is.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
MAX_NAMED_SUFFIXES = 5
# Named, because Pillow's other readers include some that start programs (EPS calls Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
FORMATS_IN_WORDS = "PNG, JPEG, WebP, BMP, TIFF, GIF or PPM"
MAX_PIXELS = 64_000_000
MIN_SIDE = 4

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):
    """A picture was refused; the message says what was wrong and what to do."""


def _check_file(path: Path) -> None:
    """Refuses what is not a regular file with something in it, before Pillow opens it."""
    try:
        if path.is_dir():
            raise UnreadableImage(f"{path}: is a folder; name the pictures in it.")
        if not path.exists():
            raise UnreadableImage(f"{path}: no such file; check the path.")
        if not path.is_file():
            raise UnreadableImage(f"{path}: is not a regular file; copy the picture into one.")
        if path.stat().st_size == 0:
            raise UnreadableImage(f"{path}: the file is empty; copy or download it again.")
    except OSError as error:
        raise UnreadableImage(f"{path}: cannot be looked at ({error}); check the path and its permissions.") from error


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            f"{path}: {width} x {height} px is more than {MAX_PIXELS // 10**6} megapixels; crop or shrink the picture."
        )
    if min(width, height) < MIN_SIDE:
        raise UnreadableImage(
            f"{path}: {width} x {height} px is too small; at least {MIN_SIDE} px on each side are needed."
        )


def _decode(path: Path) -> Image.Image:
    """Opens, checks the size that the header gives, and only then decodes the first frame."""
    try:
        with warnings.catch_warnings():
            # Our own limit is lower than Pillow's, so its warning would only repeat our refusal.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                _check_size(path, *image.size)
                image.load()
                return image.copy()
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        limit = MAX_PIXELS // 10**6
        raise UnreadableImage(
            f"{path}: the header claims far more than {limit} megapixels; crop or shrink the picture."
        ) from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(
            f"{path}: not a picture, or a damaged one; expected {FORMATS_IN_WORDS}, convert or download it again."
        ) from error
    except PermissionError as error:
        raise UnreadableImage(f"{path}: may not be read; check its permissions.") from error
    # Decoders meet arbitrary bytes and raise whatever they stumble over (OSError, SyntaxError, struct.error, …).
    except Exception as error:
        raise UnreadableImage(
            f"{path}: truncated or damaged ({error}); download it again, or save it anew as PNG."
        ) from error


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF rotation; a picture whose EXIF block is broken stays as it lies."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # The EXIF block is as arbitrary as the pixels, but no reason to refuse them.
        return image
    return image if turn is None else image.transpose(turn)


def _deep_grey(image: Image.Image) -> Tensor:
    """Brings deep grey pictures (modes I, I;16, F) to [-1, 1].

    Integers are divided by 65535. Floats count as [0, 1] when none exceeds 1, and as 0 … 255 otherwise.

    Returns:
        Image (3, H, W), float32.
    """
    values = torch.from_numpy(np.asarray(image).astype(np.float32))  # (H, W)
    if not values.isfinite().all():
        raise ValueError("it holds NaN or infinite values")
    if image.mode != "F":
        values = values / 65535
    elif values.max() > 1:
        values = values / 255
    return (values.clamp(0, 1) * 2 - 1).expand(3, -1, -1).contiguous()


def _rgb(image: Image.Image) -> Tensor:
    """Brings any decoded picture to RGB in [-1, 1], transparent parts over white.

    Returns:
        Image (3, H, W), float32.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_grey(image)
    transparent = image.has_transparency_data
    pixels = torch.from_numpy(np.array(image.convert("RGBA" if transparent else "RGB")))  # (H, W, 4 or 3), uint8
    planes = pixels.permute(2, 0, 1).contiguous()
    if not transparent:
        return from_uint8(planes)
    alpha = planes[3:].float() / 255  # (1, H, W)
    return from_uint8(planes[:3]) * alpha + (1 - alpha)  # white is 1


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
    path = Path(path)
    _check_file(path)
    image = _decode(path)
    try:
        return _rgb(_upright(image))
    except Exception as error:  # Pillow lacks some conversions, and says so by several exceptions.
        raise UnreadableImage(f"{path}: cannot be made RGB ({error}); save it as an RGB PNG.") from error


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
    size = min(height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return image[:, top : top + size, left : left + size].contiguous(), height != width


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
    if image.ndim != 3 or image.shape[0] != 3 or not math.prod(image.shape):
        raise ValueError(f"Expected one image (3, H, W), got shape {tuple(image.shape)}.")
    if image.isnan().any():
        raise ValueError("Expected an image in [-1, 1], got NaN; the method that made it has diverged.")
    pixels = to_uint8(image.detach()).permute(1, 2, 0).contiguous().cpu().numpy()  # (H, W, 3)
    Image.fromarray(pixels).save(path, format="PNG")
