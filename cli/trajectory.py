"""The trajectory of a search as a moving picture: its samples step by step, for `infer.py --save-trajectory`."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from data.image_io import to_uint8
from data.operator import Downscale
from search.loop import SearchState

FRAMES = 60  # at most, with the first and the last one
CELL = 128  # px that a face is shown at, at least
GAP = 4
FRAME_MS, LAST_MS = 80, 2000


class TrajectoryRecorder:
    """Keeps the faces that a search of N samples passes through; used as its callback.

    Samples that have converged stay as they were then. Large faces are kept at 256 px.
    """

    def __init__(self, samples: int) -> None:
        self.pictures: list[dict[int, np.ndarray]] = [{} for _ in range(samples)]  # by the number of the step

    def __call__(self, state: SearchState) -> None:
        """Keeps the faces of a step, if it is one of those that are shown."""
        every = max(1, math.ceil(state.steps / (FRAMES - 1)))
        wanted = [bool(done) or state.number % every == 0 for done in state.done.tolist()]
        if not any(wanted):
            return
        images = state.images.clamp(-1, 1)
        if images.shape[-1] > 2 * CELL:
            images = Downscale(2 * CELL)(images)
        pixels = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()  # (n, h, h, 3)
        for sample, picture, keep in zip(state.indices.tolist(), pixels, wanted, strict=True):
            if keep:
                self.pictures[sample][state.number] = picture

    def frames(self, lr: Tensor, samples: slice = slice(None)) -> list[Image.Image]:
        """Puts the pictures of some samples together, from the first step to the last, with their input on the left."""
        given = to_uint8(lr[None])[0].permute(1, 2, 0).cpu().numpy()
        shown = self.pictures[samples]
        numbers = sorted({number for own in shown for number in own})
        return [self._frame([given, *(_until(own, number) for own in shown)]) for number in numbers]

    def _frame(self, pictures: list[np.ndarray]) -> Image.Image:
        cell = max(CELL, *(len(picture) for picture in pictures[1:]))
        frame = Image.new("RGB", (len(pictures) * (cell + GAP) - GAP, cell), "white")
        for column, picture in enumerate(pictures):
            image = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            frame.paste(image, (column * (cell + GAP), 0))
        return frame

    def save(self, path: Path, lr: Tensor, samples: slice = slice(None)) -> None:
        """Writes `frames` as an animated WebP, which repeats and pauses on the last frame."""
        first, *others = self.frames(lr, samples)
        durations = [FRAME_MS] * len(others) + [LAST_MS]
        first.save(path, save_all=True, append_images=others, duration=durations, loop=0, quality=85, method=4)


def _until(pictures: dict[int, np.ndarray], number: int) -> np.ndarray:
    """Gives the picture of the latest step up to a number."""
    return pictures[max(own for own in pictures if own <= number)]
