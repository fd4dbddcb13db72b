"""What is wanted of a backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Wanted:
    """How faces are to be sampled; see `pipeline.Upsampler.__call__`.

    Attributes:
        k: Samples per face, at least 1.
        seed: From 0.
        fidelity: From 0 to 1.
        noise_sigma: Grey levels from 0 to 255, None to estimate it.
        edit: Added to the codes (L, D), None for no edit.
        preserve_lr: Whether edited faces are to downscale to the input as well.

    Raises:
        ValueError: If a number is out of range.
    """

    k: int = 4
    seed: int = 0
    fidelity: float = 1.0
    noise_sigma: float | None = None
    edit: np.ndarray | None = None
    preserve_lr: bool = False

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if self.k < 1 or self.seed < 0:
            raise ValueError(f"Expected k from 1 and a seed from 0, got {self.k} and {self.seed}.")
        if not 0 <= self.fidelity <= 1:
            raise ValueError(f"Expected a fidelity from 0 to 1, got {self.fidelity}.")
        if self.noise_sigma is not None and not 0 <= self.noise_sigma <= 255:
            raise ValueError(f"Expected a noise_sigma from 0 to 255 grey levels, got {self.noise_sigma}.")
