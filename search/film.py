"""A search as a film: its candidates side by side, step after step, for `infer.py --save-steps`."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from data.image_io import to_uint8
from data.operator import Downscale
from search.loop import Step

FRAMES = 60  # at most, with the first and the last one
CELL = 128  # px that a face is shown at, at least
GAP = 4
FRAME_MS, LAST_MS = 80, 2000


class Film:
    """Collects what a search sees; used as its callback.

    A row that is done stays as it was then. Large faces are kept at 256 px.

    Args:
        rows: Candidates of the search.
    """

    def __init__(self, rows: int) -> None:
        self.pictures: list[dict[int, np.ndarray]] = [{} for _ in range(rows)]  # by the number of the step

    def __call__(self, step: Step) -> None:
        """Keeps the faces of a step, if it is one of those that are shown."""
        every = max(1, math.ceil(step.steps / (FRAMES - 1)))
        wanted = [bool(done) or step.number % every == 0 for done in step.done.tolist()]
        if not any(wanted):
            return
        images = step.images.clamp(-1, 1)
        if images.shape[-1] > 2 * CELL:
            images = Downscale(2 * CELL)(images)
        pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()  # (n, h, h, 3)
        for row, picture, keep in zip(step.rows.tolist(), pixels, wanted, strict=True):
            if keep:
                self.pictures[row][step.number] = picture

    def frames(self, lr: Tensor) -> list[Image.Image]:
        """Puts the pictures together.

        Args:
            lr: The input (3, s, s) in [-1, 1], shown on the left.

        Returns:
            Frames of one size, from the first step to the last.
        """
        given = to_uint8(lr[None])[0].permute(1, 2, 0).cpu().numpy()
        numbers = sorted({number for own in self.pictures for number in own})
        return [self._frame([given, *(_until(own, number) for own in self.pictures)]) for number in numbers]

    def _frame(self, pictures: list[np.ndarray]) -> Image.Image:
        cell = max(CELL, *(len(picture) for picture in pictures[1:]))
        frame = Image.new("RGB", (len(pictures) * (cell + GAP) - GAP, cell), "white")
        for column, picture in enumerate(pictures):
            image = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            frame.paste(image, (column * (cell + GAP), 0))
        return frame

    def save(self, lr: Tensor, path: Path) -> None:
        """Writes the film as an animated WebP, which runs for ever and rests on the last frame.

        Args:
            lr: See `frames`.
            path: The file, ends in .webp.
        """
        first, *others = self.frames(lr)
        durations = [FRAME_MS] * len(others) + [LAST_MS]
        first.save(path, save_all=True, append_images=others, duration=durations, loop=0, quality=85, method=4)


def _until(pictures: dict[int, np.ndarray], number: int) -> np.ndarray:
    """Gives the picture of the latest step up to a number."""
    return pictures[max(own for own in pictures if own <= number)]
