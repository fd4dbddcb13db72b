"""The picture that goes with the table: the first faces, as every method sees and upsamples them."""

from __future__ import annotations

from collections.abc import Mapping

from PIL import Image, ImageDraw
from torch import Tensor

CELL = 128  # px, at least


def figure(truth: Tensor, lr: Tensor, shown: Mapping[str, Tensor]) -> Image.Image:
    """Plots the first faces, one per row: LR input, the first samples of each method, truth.

    Args:
        truth: Faces (n, 3, R, R), uint8.
        lr: Their LR pictures (n, 3, s, s), uint8.
        shown: By method, samples (n, c, 3, R, R), uint8, the point estimate first.
    """
    columns = [(f"input {lr.shape[-1]} px", lr)]
    for method, samples in shown.items():
        for number, pictures in enumerate(samples.unbind(dim=1), start=1):
            columns.append((method if number == 1 else f"{method}, {number}", pictures))
    columns.append(("truth", truth))
    cell, gap, head = max(CELL, truth.shape[-1]), 4, 18
    canvas = Image.new("RGB", (len(columns) * (cell + gap), head + len(truth) * (cell + gap)), "white")
    draw = ImageDraw.Draw(canvas)
    for x, (title, pictures) in enumerate(columns):
        draw.text((x * (cell + gap) + 2, 3), title, fill="black")
        for y, picture in enumerate(pictures):
            image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
            image = image.resize((cell, cell), Image.Resampling.NEAREST)  # shows the pixels as they are
            canvas.paste(image, (x * (cell + gap), head + y * (cell + gap)))
    return canvas
