"""What comes out of the pipeline: k samples for each face, and how well they fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

PERFECT = 1e-10  # mean squared error on [0, 1] that counts as none, 100 dB


@dataclass(frozen=True)
class Samples:
    """k samples for each of B faces; arrays, or tensors where tensors went in.

    Attributes:
        images: Faces (B, k, 3, R, R) in [-1, 1], on the 8-bit grid; the first of each is the point estimate.
        ws: Their style codes (B, k, L, D).
        lr_psnr: How well each downscales to its input, in dB of the 8-bit picture (B, k).
        residual: Mean square of y − D(G(w)) on [0, 1] before the projection (B, k), which says how much of the input
            the generator could not explain.
        sigma: Standard deviation of the noise that the inputs were taken to have, in grey levels (B,).
    """

    images: Any
    ws: Any
    lr_psnr: Any
    residual: Any
    sigma: Any

    @classmethod
    def join(cls, parts: Sequence[Samples]) -> Samples:
        """Puts arrays of several batches together."""
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def __len__(self) -> int:
        """The number of faces B."""
        return len(self.images)

    def __getitem__(self, index: int) -> Samples:
        """The samples of one face: images (k, 3, R, R) and so on."""
        return Samples(*(getattr(self, field.name)[index] for field in fields(self)))


def psnr(error: np.ndarray) -> np.ndarray:
    """Turns mean squared errors on [0, 1] into dB, −10 log₁₀ e; 100 at most."""
    return -10 * np.log10(np.maximum(error, PERFECT))
