"""Pictures, read and written. All that reads a picture file in this project reads it here, as the same pixels.

Pillow and numpy alone, so that it runs without torch. Files hold pictures in a dozen layouts; inside the project an
image is float32 RGB in [-1, 1]. What is done with each:

| kind | what becomes of it |
|---|---|
| 8 bit: RGB, grey, palette, 1 bit, CMYK | value / 255; CMYK and grey become RGB |
| alpha, or a transparent colour | laid over white |
| EXIF orientation | applied |
| ICC profile | converted to sRGB; a broken one is ignored |
| several frames | the first |
| 16-bit colour | the high byte; TIFF stretched to SMaxSampleValue where it is given |
| grey of 12, 16, 32 bit | (value − low) / (high − low) with the range that the file gives, see below |
| grey TIFF where white is zero | turned round |

The range is TIFF's SMinSampleValue to SMaxSampleValue, else all that BitsPerSample and SampleFormat allow; of floats
the first of [0, 1], [-1, 1], [0, 255], [0, 65535] that holds them all; 0 to 65535 in PNG, JPEG 2000 and PGM. A picture
that uses less than a quarter of it is reported in the log: its file may claim too much.

What cannot be read is refused by one exception, whose message can be shown as it is.
"""

from __future__ import annotations

import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError, features

from data.files import printable
from data.signatures import describe_bytes

# Named, because Pillow's other readers include some that start programs (EPS calls Ghostscript).
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"]
FORMATS += ["JPEG2000"] if features.check("jpg_2000") else []
FORMATS += ["AVIF"] if "avif" in features.modules and features.check("avif") else []
FORMATS_IN_WORDS = "PNG, JPEG, WebP, AVIF, JPEG 2000, BMP, TIFF, GIF or PPM"
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jfif", ".mpo", ".webp", ".avif", ".jp2", ".j2k", ".jpx", ".bmp", ".tif", ".tiff",
    ".gif", ".ppm", ".pgm", ".pnm",
)  # fmt: skip
RESULT = "amortized-pulse/overview/1"  # in the overviews that we write, under "Software"
MAX_PIXELS = 64_000_000
MIN_SIDE = 4
LEAST_RANGE = 0.25  # of a deep picture's range that it should use
_FLOAT_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (0.0, 65535.0))
_BITS, _WHITE_IS_ZERO, _SAMPLE_FORMAT, _SMALLEST, _LARGEST = 258, 262, 339, 340, 341  # tags of TIFF
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3  # values of SampleFormat
_log = logging.getLogger(__name__)


class UnreadableImage(ValueError):
    """A picture was refused; the message says what was wrong and what to do."""


def is_result(path: Path) -> bool:
    """Says whether a PNG is an overview that we wrote, by its header; False if it cannot be read."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get("Software") == RESULT
    except Exception:  # decoders raise whatever they stumble over
        return False


def read_image(source: Path | str | BinaryIO, name: str = "") -> np.ndarray:
    """Reads a picture of any common kind as RGB, see the table above.

    Args:
        source: A file of at least 4 px a side and at most 64 megapixels; its path, or the file opened.
        name: What to call it in messages; its path if empty.

    Returns:
        Image (3, H, W), float32 in [-1, 1].

    Raises:
        UnreadableImage: If there is no such file or it is no whole picture of such a size. The size is checked before
            the pixels are decoded.
    """
    pixels = _read(source, name)
    if pixels.dtype == np.uint8:
        return from_uint8(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) * 2 - 1


def read_bytes(source: Path | str | BinaryIO, name: str = "") -> np.ndarray:
    """Reads a picture as bytes (H, W, 3): `to_uint8(read_image(…))`, quicker for pictures of 8 bit.

    Raises:
        UnreadableImage: See `read_image`.
    """
    pixels = _read(source, name)
    return pixels if pixels.dtype == np.uint8 else to_uint8(pixels * 2 - 1)


def _read(source: Path | str | BinaryIO, name: str) -> np.ndarray:
    """Decodes a picture: (H, W, 3), uint8, or float32 in [0, 1] where 8 bit would not hold it."""
    if isinstance(source, Path | str):
        name, source = name or str(source), Path(source)
        _check_file(source, name)
    with _named_errors(source, name), warnings.catch_warnings():
        # Our own limit is lower than Pillow's, so its warning would only repeat our refusal.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(source, formats=FORMATS) as image:
            _check_size(name, *image.size)
            image.load()
            tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
            upright = _upright(image)
            if image.mode == "F" or image.mode.startswith("I") or (image.mode == "L" and _signed(tags)):
                return _deep_grey(upright, tags, name)
            pixels = _colours(upright)
            bits = tags.get(_BITS, (8,))
            return _deep_colour(pixels, tags, name) if isinstance(bits, tuple) and max(bits) > 8 else pixels


def _colours(image: Image.Image) -> np.ndarray:
    """Gives the colours (H, W, 3) of 8 bit: uint8, or float32 in [0, 1] where they are mixed with white."""
    transparent = image.has_transparency_data
    alpha = image.convert("RGBA").getchannel("A") if transparent else None
    pixels = np.asarray(_in_srgb(image))
    if alpha is None:
        return pixels
    weights = np.asarray(alpha, np.float32)[..., None] / 255  # (H, W, 1)
    return pixels.astype(np.float32) / 255 * weights + (1 - weights)


def _in_srgb(image: Image.Image) -> Image.Image:
    """Converts a picture to RGB, by its colour profile if it has a usable one."""
    given = colour_profile(image.info.get("icc_profile"))
    if given is not None:
        # Only these modes have profiles; a palette's colours, or those with an alpha channel, are RGB or grey.
        plain = {"L": "L", "LA": "L", "CMYK": "CMYK", "1": "L"}.get(image.mode, "RGB")
        try:
            intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
            converted = ImageCms.profileToProfile(image.convert(plain), given, srgb_profile(), intent, "RGB")
            return converted or image.convert("RGB")
        except (ImageCms.PyCMSError, ValueError):  # such as a profile of other colours
            pass
    return image.convert("RGB")


def colour_profile(content: bytes | None) -> ImageCms.ImageCmsProfile | None:
    """Reads an ICC profile; None if there is none, or it is broken or sRGB, so that nothing is to be converted."""
    if not content:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        return None if "sRGB" in ImageCms.getProfileDescription(profile) else profile
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


@cache
def srgb_profile() -> ImageCms.ImageCmsProfile:
    """Gives the profile of sRGB."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _deep_grey(image: Image.Image, tags: Mapping[int, Any], name: str) -> np.ndarray:
    """Brings grey of more than 8 bit, or with a sign, to [0, 1] (H, W, 3)."""
    kind = _number(tags, _SAMPLE_FORMAT) or (_FLOAT if image.mode == "F" else _UNSIGNED)
    bits = int(_number(tags, _BITS) or 16)
    values = np.asarray(image)
    if bits in (8, 32) and kind != _FLOAT:  # Pillow gives 8 bits without a sign, and 32 bits with one
        values = values.astype(f"{'i' if kind == _SIGNED else 'u'}{bits // 8}")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinite values")
    low, high = _range(values, int(kind), bits, tags)
    _warn_of_range(values.min(), values.max(), low, high, name)
    shares = ((values - low) / (high - low)).clip(0, 1)
    shares = 1 - shares if tags.get(_WHITE_IS_ZERO) == 0 else shares
    return np.repeat(shares.astype(np.float32)[..., None], 3, axis=-1)


def _range(values: np.ndarray, kind: int, bits: int, tags: Mapping[int, Any]) -> tuple[float, float]:
    """Gives the values of black and white."""
    smallest, largest = _number(tags, _SMALLEST), _number(tags, _LARGEST)
    if largest is not None and largest > (smallest or 0.0):
        return smallest or 0.0, largest
    if kind == _FLOAT:
        for low, high in _FLOAT_RANGES:
            if low <= values.min() and values.max() <= high:
                return low, high
        raise ValueError(
            f"its numbers go from {values.min():g} to {values.max():g}; floats must lie in [0, 1], [-1, 1], [0, 255] "
            "or [0, 65535], or the file must say their range (SMinSampleValue, SMaxSampleValue)"
        )
    return (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1) if kind == _SIGNED else (0.0, 2.0**bits - 1)


def _deep_colour(pixels: np.ndarray, tags: Mapping[int, Any], name: str) -> np.ndarray:
    """Stretches the colours of a TIFF of 16 bit, of which Pillow gives the high byte, to the white of the file."""
    largest = _number(tags, _LARGEST)
    if pixels.dtype == np.uint8 and largest and 255 < largest < 65535:
        return (pixels.astype(np.float32) * np.float32(257 / largest)).clip(0, 1)
    scale = 1 if pixels.dtype != np.uint8 else 255
    _warn_of_range(float(pixels.min()), float(pixels.max()), 0, scale, name)
    return pixels


def _warn_of_range(smallest: float, largest: float, low: float, high: float, name: str) -> None:
    share = (largest - smallest) / (high - low)
    if share < LEAST_RANGE:
        _log.warning(
            "%s: uses %.1f %% of the range from %g to %g that its file gives; if it looks flat, save it as 8 bit or "
            "with SMaxSampleValue.",
            *(printable(name), 100 * share, low, high),
        )


def _signed(tags: Mapping[int, Any]) -> bool:
    return _number(tags, _SAMPLE_FORMAT) == _SIGNED


def _number(tags: Mapping[int, Any], tag: int) -> float | None:
    """Gives a tag's number, the first if there is one for each channel; None if there is none."""
    value = tags.get(tag)
    value = value[0] if isinstance(value, tuple) and value else value
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def orientation_of(image: Image.Image) -> int:
    """Gives the EXIF orientation of an opened picture, 1 to 8; 1, as it lies, if it has none or its block is broken."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # see `_upright`
        return 1


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; a picture whose EXIF block is broken stays as it lies."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # The EXIF block is as arbitrary as the pixels, but no reason to refuse them.
        return image


def _check_file(path: Path, name: str) -> None:
    """Refuses what is not a regular file with something in it, before Pillow opens it."""
    try:
        if path.is_dir():
            raise UnreadableImage(f"{name}: is a folder; name the pictures in it.")
        if not path.exists():
            raise UnreadableImage(f"{name}: no such file; check the path.")
        if not path.is_file():
            raise UnreadableImage(f"{name}: is not a regular file; copy the picture into one.")
        if path.stat().st_size == 0:
            raise UnreadableImage(f"{name}: the file is empty; copy or download it again.")
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        if isinstance(error, UnreadableImage):
            raise
        raise UnreadableImage(f"{name}: cannot be looked at ({error}); check the path and its permissions.") from error


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnreadableImage(
            f"{name}: {width} x {height} px is more than {MAX_PIXELS // 10**6} megapixels; crop or shrink the picture."
        )
    if min(width, height) < MIN_SIDE:
        raise UnreadableImage(
            f"{name}: {width} x {height} px is too small; at least {MIN_SIDE} px on each side are needed."
        )


@contextmanager
def _named_errors(source: Path | BinaryIO, name: str) -> Iterator[None]:
    """Turns whatever decoders raise into one exception that names the picture."""
    try:
        yield
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:
        limit = MAX_PIXELS // 10**6
        raise UnreadableImage(
            f"{name}: the header claims far more than {limit} megapixels; crop or shrink the picture."
        ) from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{name}: {_what_else(source, name)}.") from error
    except PermissionError as error:
        raise UnreadableImage(f"{name}: may not be read; check its permissions.") from error
    except MemoryError as error:
        raise UnreadableImage(f"{name}: there is not enough memory for it; shrink the picture.") from error
    # Decoders meet arbitrary bytes and raise whatever they stumble over (OSError, SyntaxError, struct.error, …).
    except Exception as error:
        raise UnreadableImage(
            f"{name}: truncated, damaged or of an unknown kind ({error}); download it again, or save it anew as PNG."
        ) from error


def _what_else(source: Path | BinaryIO, name: str) -> str:
    """Says what a file is that Pillow does not know."""
    if isinstance(source, Path):
        with source.open("rb") as file:
            head = file.read(512)
    else:
        source.seek(0)
        head = source.read(512)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "a TIFF of a kind that is not read, or a damaged one; save it as 8-bit RGB"
    return describe_bytes(head, name) or (
        f"not a picture, or a damaged one; expected {FORMATS_IN_WORDS}, convert or download it again"
    )


def centre_square(height: int, width: int) -> tuple[slice, slice]:
    """Gives the rows and columns of the largest square in the centre of a picture."""
    size = min(height, width)
    top, left = (height - size) // 2, (width - size) // 2
    return slice(top, top + size), slice(left, left + size)


def to_uint8(images: Any) -> Any:
    """Converts images (…, 3, H, W) to bytes, round(127.5 (x + 1)), clamped, halves to even; a tensor or an array.

    Raises:
        ValueError: If the images are not floating point, since bytes taken for [-1, 1] would all turn white.
    """
    if not isinstance(images, np.ndarray):  # a tensor; torch itself is not needed here
        if not images.is_floating_point():
            raise ValueError(
                f"Expected floating-point images in [-1, 1], got {images.dtype}; use from_uint8 for bytes."
            )
        return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().byte()
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"Expected floating-point images in [-1, 1], got {images.dtype}; use from_uint8 for bytes.")
    clamped = images.astype(np.float32, copy=False).clip(-1, 1)
    return np.rint(clamped * np.float32(127.5) + np.float32(127.5)).astype(np.uint8)


def from_uint8(images: Any) -> Any:
    """Converts bytes (…, 3, H, W) to images, float32 x / 127.5 - 1; to_uint8 gives the same bytes back.

    Raises:
        ValueError: If the images are not uint8.
    """
    if str(images.dtype).removeprefix("torch.") != "uint8":
        raise ValueError(f"Expected uint8 images, got {images.dtype}.")
    if isinstance(images, np.ndarray):
        return images.astype(np.float32) / np.float32(127.5) - 1
    return images.float() / 127.5 - 1


def to_picture(image: np.ndarray) -> Image.Image:
    """Makes a Pillow picture of one image (3, H, W) in [-1, 1], clamped."""
    return Image.fromarray(np.ascontiguousarray(to_uint8(image).transpose(1, 2, 0)))


def write_image(image: Any, path: Path | str) -> None:
    """Writes an image (3, H, W) in [-1, 1] as an 8-bit PNG, the same bytes for the same image.

    Raises:
        ValueError: If image is not (3, H, W), or holds NaN.
    """
    image = np.asarray(image if isinstance(image, np.ndarray) else image.detach().cpu().numpy())
    if image.ndim != 3 or image.shape[0] != 3 or not math.prod(image.shape):
        raise ValueError(f"Expected one image (3, H, W), got shape {tuple(image.shape)}.")
    if np.isnan(image).any():
        raise ValueError("Expected an image in [-1, 1], got NaN; the method that made it has diverged.")
    to_picture(image).save(path, format="PNG")
