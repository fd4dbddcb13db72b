"""What the commands that upsample faces have in common, without torch: lines for the user, inputs, the overview."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from data.files import atomic_write, check_replaceable, printable
from data.image_io import centre_square, from_uint8, is_result, read_image, to_uint8
from data.pictures import overview, save_overview
from data.taps import resize

if TYPE_CHECKING:
    from torch import Tensor

OVERVIEW_ROWS = 16
MAX_REASON = 600  # characters


@dataclass(frozen=True)
class LowResolution:
    """An input as it is upsampled.

    Attributes:
        image: The face (3, s, s) in [-1, 1], in steps of 8 bit as input.png holds it.
        origin: Width and height of the picture in pixels.
    """

    image: np.ndarray
    origin: tuple[int, int]


@dataclass(frozen=True)
class Face:
    """What one input became.

    Attributes:
        title: Its title in the overview.
        lr: The low-resolution face (3, s, s) in [-1, 1].
        images: Its samples (k, 3, R, R) in [-1, 1].
        lr_psnr: How well each downscales to the input, in dB.
        folder: Where they were written.
        converged: How many samples a search brought within its tolerance, None if nothing was searched.
    """

    title: str
    lr: np.ndarray | Tensor
    images: np.ndarray | Tensor
    lr_psnr: list[float]
    folder: Path
    converged: int | None = None


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


def warn_of_crop(path: Path | str, width: int, height: int) -> None:
    """Says that only the centre of a picture counts, if it is not square."""
    if width != height:
        size = min(width, height)
        complain(f"warning: {path}: {width} x {height} px is not square; only its centre of {size} x {size} px counts")


def low_resolution(path: Path | str, lr_sizes: tuple[int, int], downscale: int | None) -> LowResolution:
    """Reads a picture and makes it the low-resolution face that is upsampled.

    Args:
        path: The picture.
        lr_sizes: Smallest and largest size in pixels that the bundle takes.
        downscale: Size in pixels to downscale it to first, None to take it as it is.

    Returns:
        The face.

    Raises:
        ValueError: If the picture cannot be read, or is too small or too large.
    """
    image = read_image(path)
    height, width = image.shape[-2:]
    rows, columns = centre_square(height, width)
    image = image[:, rows, columns]
    check_size(width, height, lr_sizes, downscale)
    if downscale is not None:
        image = resize(image, downscale)
    return LowResolution(from_uint8(to_uint8(image)), (width, height))


def write_overview(faces: Sequence[Face], out: Path, overwrite: bool) -> bool:
    """Draws the overview of the faces that were written, and says what to look at.

    Args:
        faces: The first OVERVIEW_ROWS of them.
        out: The folder that gets overview.png.
        overwrite: Replace the overview of an earlier call.

    Returns:
        Whether all went well.
    """
    if not faces:
        return True
    target = out / "overview.png"
    first = faces[0].folder / "grid.png"
    finished = True
    try:
        if is_result(target) and not overwrite:
            complain(f"note: {target} is of an earlier call and stays; --overwrite replaces it")
        else:
            check_replaceable(target, overwrite, ours=is_result(target))
            with atomic_write(target) as partial:
                save_overview(overview([(face.title, face.lr, face.images) for face in faces]), partial)
            first = target if len(faces) > 1 else first
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        complain(f"{target}: could not be written ({reason_of(error)}); the faces are complete")
        finished = False
    say(f"Open {first}")
    return finished


def line_of(path: Path, face: Face) -> str:
    """Says in one line what became of an input."""
    shown = (
        " ".join(f"{db:.0f}" for db in face.lr_psnr)
        if len(face.lr_psnr) <= 4
        else (f"{min(face.lr_psnr):.0f} to {max(face.lr_psnr):.0f}")
    )
    search = "" if face.converged is None else f", {face.converged} of {len(face.lr_psnr)} converged"
    return f"{path.name}: {face.lr.shape[-1]} px, LR-PSNR {shown} dB{search} -> {face.folder}"


def reason_of(error: BaseException) -> str:
    """Says what went wrong in one line; some errors come without words, or with a page of them."""
    if isinstance(error, MemoryError):
        return "there is not enough memory; close other programs"
    text = " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
    return text if len(text) <= MAX_REASON else text[:MAX_REASON] + " …"


def until_interrupted(run: Callable[[], int]) -> int:
    """Runs a command, which Ctrl-C ends in good order.

    Args:
        run: Gives the exit status.

    Returns:
        That status, or 130 after Ctrl-C.
    """
    try:
        return run()
    except KeyboardInterrupt:
        complain("interrupted; the faces that were finished stay")
        return 130


def say(text: str) -> None:
    """Prints a line of results."""
    _print(text, sys.stdout)


def complain(text: str) -> None:
    """Prints a line about what went wrong."""
    _print(text, sys.stderr)


def text_option(text: str) -> str:
    """Reads the value of an option that must not be empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a text, got an empty one")
    return text


def number_option(text: str) -> int:
    """Reads a number of things, 1 or more."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def path_option(text: str) -> Path:
    """Reads the path that an option names; an empty one would be the current folder."""
    return Path(text_option(text))


def _print(text: str, stream: TextIO) -> None:
    """Prints a line, with escapes for what breaks it or the stream cannot show: file names may hold any bytes."""
    encoding = stream.encoding or "utf-8"
    text = printable(text)
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        if "tqdm" in sys.modules and sys.stderr.isatty():
            sys.modules["tqdm"].tqdm.write(text, file=stream)  # above the bar
        else:
            print(text, file=stream)
        stream.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough; the faces are written nevertheless
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
