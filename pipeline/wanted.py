"""What is wanted of a backend."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Wanted:
    """How faces are to be sampled; see `pipeline.Upsampler.__call__`. ValueError if a number is out of range."""

    k: int = 4  # samples per face, at least 1
    seed: int = 0  # from 0
    fidelity: float = 1.0  # from 0 to 1
    noise_sigma: float | None = None  # grey levels from 0 to 255, None to estimate it
    edit: np.ndarray | None = None  # added to the codes (L, D)
    preserve_lr: bool = False  # whether edited faces are to downscale to the input as well

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if self.k < 1 or self.seed < 0:
            raise ValueError(f"Expected k from 1 and a seed from 0, got {self.k} and {self.seed}.")
        if not 0 <= self.fidelity <= 1:
            raise ValueError(f"Expected a fidelity from 0 to 1, got {self.fidelity}.")
        if self.noise_sigma is not None and not 0 <= self.noise_sigma <= 255:
            raise ValueError(f"Expected a noise_sigma from 0 to 255 grey levels, got {self.noise_sigma}.")
