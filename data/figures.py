"""Pictures of results: one face with its samples and where they disagree, and an overview of many faces.

Images are arrays, or tensors on the CPU without gradient; torch itself is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from data.files import printable
from data.image_io import RESULT, to_picture

TILE = 160  # px; the least that a tile of a sheet measures
COLUMNS = 8
OVERVIEW_ROWS = 16
GAP = 8
TITLE = 20  # px above each tile

# Dark to light with nearly even steps of lightness (L* 0, 19, 40, 61, 81, 99), so that equal differences look equal.
_RAMP = np.array([(0, 0, 0), (64, 16, 112), (172, 36, 120), (242, 104, 72), (253, 190, 100), (255, 255, 235)])
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


def disagreement(images: ArrayLike) -> np.ndarray:
    """Measures where samples (k, 3, R, R) differ: the deviation over k, mean over colours, a map (R, R) on [0, 1]."""
    return (np.asarray(images).clip(-1, 1) / 2).std(axis=0).mean(axis=0)


def heat(values: ArrayLike, maximum: float) -> Image.Image:
    """Colours a map (H, W) from black (0) over purple, red and orange to nearly white (maximum and above)."""
    place = np.clip(np.asarray(values) / maximum, 0, 1) * (len(_RAMP) - 1)
    channels = [np.interp(place, np.arange(len(_RAMP)), _RAMP[:, c]) for c in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))


def face_sheet(lr: ArrayLike, images: ArrayLike, captions: Sequence[str], note: str = "") -> Image.Image:
    """Plots one face: the input, its samples with their captions, and where they disagree.

    Args:
        lr: The low-resolution face (3, s, s) in [-1, 1], enlarged without smoothing.
        images: Samples (k, 3, R, R) in [-1, 1].
        captions: One per sample.
        note: A line below all, in as many rows as it needs; empty for none.

    Returns:
        An RGB picture; more than eight tiles take further rows.
    """
    lr, images = np.asarray(lr), np.asarray(images)
    side = _side(images)
    spread = disagreement(images)
    largest = float(spread.max())
    tiles = [(f"input, {lr.shape[-1]} px", _tile(lr, side, Image.Resampling.NEAREST))]
    for image, caption in zip(images, captions, strict=True):
        tiles.append((caption, _tile(image, side, Image.Resampling.BICUBIC)))
    title = f"differ by 0 to {largest:.2f}" if len(images) > 1 else "a single sample"
    tiles.append((title, _enlarge(heat(spread, max(largest, 1 / 255)), side, Image.Resampling.BICUBIC)))
    rows = [tiles[i : i + COLUMNS] for i in range(0, len(tiles), COLUMNS)]
    return _with_note(_arrange(rows, side), note)


def overview(faces: Sequence[tuple[str, ArrayLike, ArrayLike]]) -> Image.Image:
    """Plots one row per face: the input, then its samples, seven at most.

    Args:
        faces: For each a title, the low-resolution face (3, s, s) and its samples (k, 3, R, R), in [-1, 1]; at
            least one, with the same R.
    """
    side = _side(np.asarray(faces[0][2]))
    rows = []
    for title, lr, images in faces:
        row = [(title, _tile(np.asarray(lr), side, Image.Resampling.NEAREST))]
        shown = enumerate(np.asarray(images)[: COLUMNS - 1], start=1)
        row += [(str(i), _tile(image, side, Image.Resampling.BICUBIC)) for i, image in shown]
        rows.append(row)
    return _arrange(rows, side)


def strip_sheet(titles: Sequence[str], images: ArrayLike, smooth: bool = True) -> Image.Image:
    """Plots faces (k, n, 3, R, R) in [-1, 1], k rows under n titles; enlarged smoothly, or pixel by pixel."""
    images, how = np.asarray(images), Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    side = _side(images)
    rows = [[(title, _tile(image, side, how)) for title, image in zip(titles, row, strict=True)] for row in images]
    return _arrange(rows, side)


def matrix_picture(pages: Sequence[tuple[str, ArrayLike]], rows: Sequence[str], columns: Sequence[str]) -> Image.Image:
    """Plots matrices of numbers in [-1, 1] below each other: red above 0, blue below, white at 0.

    Args:
        pages: A title and a matrix (rows, columns) each; from ±0.1 on cells bear their number.
        rows: Names of the rows.
        columns: Names of the columns, written upright.
    """
    cell, font = 34, ImageFont.load_default()
    left = int(max(font.getlength(name) for name in rows)) + 2 * GAP
    above = int(max(font.getlength(name) for name in columns)) + TITLE + 2 * GAP
    height = above + cell * len(rows) + GAP
    page = Image.new("RGB", (left + cell * len(columns) + GAP, height * len(pages)), _PAPER)
    pen = ImageDraw.Draw(page)
    for number, (title, matrix) in enumerate(pages):
        top = number * height
        pen.text((GAP, top + GAP), title, _INK, font)
        for x, name in enumerate(columns):
            strip = Image.new("RGB", (above - TITLE - GAP, 14), _PAPER)
            ImageDraw.Draw(strip).text((0, 1), name, _INK, font)
            page.paste(strip.rotate(90, expand=True), (left + x * cell + 10, top + TITLE + GAP))
        for y, (name, values) in enumerate(zip(rows, np.asarray(matrix), strict=True)):
            row = top + above + y * cell
            pen.text((GAP, row + 10), name, _INK, font)
            for x, value in enumerate(values.tolist()):
                corner = (left + x * cell, row)
                pen.rectangle((*corner, corner[0] + cell - 2, row + cell - 2), fill=_diverging(value))
                if abs(value) >= 0.1:
                    pen.text((corner[0] + 4, row + 10), f"{value:+.1f}", _INK if abs(value) < 0.6 else _PAPER, font)
    return page


def _diverging(value: float) -> tuple[int, int, int]:
    """Blue at -1, white at 0, red at 1."""
    share, end = min(1.0, abs(value)), (178, 24, 43) if value > 0 else (33, 102, 172)
    red, green, blue = (round(255 + share**0.7 * (part - 255)) for part in end)
    return red, green, blue


def save_overview(picture: Image.Image, path: Path) -> None:
    """Writes an overview as PNG, marked as one of ours for `data.image_io.is_result`."""
    notes = PngInfo()
    notes.add_text("Software", RESULT)
    picture.save(path, format="PNG", pnginfo=notes)


def _side(images: np.ndarray) -> int:
    """Gives the side of a tile in pixels: the least multiple of the faces' size that is no less than TILE."""
    return images.shape[-1] * -(-TILE // images.shape[-1])


def _tile(image: np.ndarray, side: int, resampling: Image.Resampling) -> Image.Image:
    return _enlarge(to_picture(image), side, resampling)


def _enlarge(picture: Image.Image, side: int, resampling: Image.Resampling) -> Image.Image:
    return picture.resize((side, side), resampling)


def _with_note(page: Image.Image, note: str) -> Image.Image:
    """Writes a note below a page."""
    font = ImageFont.load_default()
    lines = [""]
    for word in note.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= page.width - 2 * GAP else [*lines, word]
    if not note:
        return page
    taller = Image.new("RGB", (page.width, page.height + TITLE * len(lines)), _PAPER)
    taller.paste(page)
    pen = ImageDraw.Draw(taller)
    for i, line in enumerate(lines):
        pen.text((GAP, page.height + TITLE * i), line, _INK, font)
    return taller


def _arrange(rows: Sequence[Sequence[tuple[str, Image.Image]]], side: int) -> Image.Image:
    """Puts titled tiles on a white page."""
    step = (side + GAP, side + GAP + TITLE)
    columns = max(len(row) for row in rows)
    page = Image.new("RGB", (columns * step[0] + GAP, len(rows) * step[1] + GAP), _PAPER)
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default()
    for y, row in enumerate(rows):
        for x, (title, tile) in enumerate(row):
            left, top = GAP + x * step[0], GAP + y * step[1]
            # The default font knows few letters beyond ASCII, and some of its forms refuse the others.
            text = printable(title).encode("ascii", "replace").decode()
            while text and pen.textlength(text, font) > side:
                text = text[:-1]
            pen.text((left, top + 2), text, _INK, font)
            page.paste(tile, (left, top + TITLE))
    return page
