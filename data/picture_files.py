"""Reading and writing picture files as arrays: Pillow and numpy alone, for programs without torch.

Files hold 8- or 16-bit pictures in a dozen colour layouts; inside the project an image is float32 RGB in [-1, 1]. This
file is the border between the two. What cannot be read is refused by one exception whose message can be shown as it is.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

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


def _deep_grey(image: Image.Image) -> np.ndarray:
    """Brings deep grey pictures (modes I, I;16, F) to [-1, 1].

    Integers are divided by 65535. Floats count as [0, 1] when none exceeds 1, and as 0 … 255 otherwise.

    Returns:
        Image (3, H, W), float32.
    """
    values = np.asarray(image).astype(np.float32)  # (H, W)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite values")
    if image.mode != "F":
        values = values / np.float32(65535)
    elif values.max() > 1:
        values = values / np.float32(255)
    return np.repeat(values.clip(0, 1)[None] * 2 - 1, 3, axis=0)


def _rgb(image: Image.Image) -> np.ndarray:
    """Brings any decoded picture to RGB in [-1, 1], transparent parts over white.

    Returns:
        Image (3, H, W), float32.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        return _deep_grey(image)
    transparent = image.has_transparency_data
    pixels = np.asarray(image.convert("RGBA" if transparent else "RGB"))  # (H, W, 4 or 3), uint8
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    if not transparent:
        return from_bytes(planes)
    alpha = planes[3:].astype(np.float32) / 255  # (1, H, W)
    return from_bytes(planes[:3]) * alpha + (1 - alpha)  # white is 1


def read_pixels(path: Path | str) -> np.ndarray:
    """Reads a picture of any common kind as RGB; see `data.reading.read_image`.

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


def centre_square(height: int, width: int) -> tuple[slice, slice]:
    """Gives the rows and columns of the largest square in the centre of a picture."""
    size = min(height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return slice(top, top + size), slice(left, left + size)


def to_bytes(images: np.ndarray) -> np.ndarray:
    """Converts images to bytes, round(127.5 (x + 1)), clamped, halves to even; as `data.reading.to_uint8` for tensors.

    Args:
        images: Images (…, 3, H, W), floating point in [-1, 1].

    Returns:
        Images of the same shape, uint8.

    Raises:
        ValueError: If the images are not floating point, since bytes taken for [-1, 1] would all turn white.
    """
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"Expected floating-point images in [-1, 1], got {images.dtype}; use from_bytes for bytes.")
    clamped = images.astype(np.float32, copy=False).clip(-1, 1)
    return np.rint(clamped * np.float32(127.5) + np.float32(127.5)).astype(np.uint8)


def from_bytes(images: np.ndarray) -> np.ndarray:
    """Converts bytes to images, x / 127.5 - 1; as `data.reading.from_uint8` for tensors.

    Args:
        images: Images (…, 3, H, W), uint8.

    Returns:
        Images of the same shape, float32 in [-1, 1]; to_bytes gives the same bytes back.

    Raises:
        ValueError: If the images are not uint8.
    """
    if images.dtype != np.uint8:
        raise ValueError(f"Expected uint8 images, got {images.dtype}.")
    return images.astype(np.float32) / np.float32(127.5) - 1


def picture_of(image: np.ndarray) -> Image.Image:
    """Makes a Pillow picture of one image (3, H, W) in [-1, 1], clamped."""
    return Image.fromarray(np.ascontiguousarray(to_bytes(image).transpose(1, 2, 0)))


def write_pixels(image: np.ndarray, path: Path | str) -> None:
    """Writes one image as an 8-bit PNG, the same bytes for the same image.

    Args:
        image: Image (3, H, W) in [-1, 1], clamped.
        path: The file; its folder must exist.

    Raises:
        ValueError: If image is not (3, H, W), or holds NaN.
    """
    if image.ndim != 3 or image.shape[0] != 3 or not math.prod(image.shape):
        raise ValueError(f"Expected one image (3, H, W), got shape {tuple(image.shape)}.")
    if np.isnan(image).any():
        raise ValueError("Expected an image in [-1, 1], got NaN; the method that made it has diverged.")
    picture_of(image).save(path, format="PNG")
