"""Mild changes of colour for training faces, by albumentations.

Mirroring is not done here: training mirrors whole batches on the device, at no cost (`training.batches`).
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.faces import Faces

AUGMENTATIONS = ("flip", "flip-colour")
# Little more than what cameras and their automatic settings make of the same person: skin keeps its colour.
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.1, 0.1, 0.15, 0.01


class ColourJitter(Dataset[Tensor]):
    """Faces, uint8 (3, R, R), whose brightness, contrast, saturation and hue differ a little in every epoch.

    The change follows from seed, epoch and picture alone: whichever worker makes it, and whether or not the run was
    interrupted before, it is the same.
    """

    def __init__(self, faces: Faces, seed: int = 0) -> None:
        self.faces = faces
        self.seed = seed
        self._jitter: Any = None

    def __len__(self) -> int:
        """The number of faces."""
        return len(self.faces)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        """Gives a face, uint8 (3, R, R), by epoch and index, as `ResumableSampler` gives them with `epochs`."""
        epoch, index = key
        if self._jitter is None:
            self._jitter = _make_jitter()
        self._jitter.set_random_seed(int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]))
        pixels = self.faces[index].permute(1, 2, 0).contiguous().numpy()  # (R, R, 3)
        return torch.from_numpy(self._jitter(image=pixels)["image"]).permute(2, 0, 1).contiguous()

    def __getstate__(self) -> dict:
        """Leaves albumentations' objects behind: every worker makes its own."""
        return {**self.__dict__, "_jitter": None}


def _make_jitter() -> Any:
    """Makes the transform; here, because the import takes two seconds and must not ask the network for releases."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    return albumentations.ColorJitter(
        brightness=(1 - BRIGHTNESS, 1 + BRIGHTNESS), contrast=(1 - CONTRAST, 1 + CONTRAST),
        saturation=(1 - SATURATION, 1 + SATURATION), hue=(-HUE, HUE), p=1.0,
    )  # fmt: skip
