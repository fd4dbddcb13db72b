"""The methods that are compared: each turns low-resolution pictures into candidates, and sees nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from data.operator import upscale_bicubic
from models.bundle import Bundle

Method = Callable[[Tensor, int, np.random.Generator], Tensor]
"""Maps LR pictures (B, 3, s, s) in [-1, 1], k and random numbers to candidates (B, c, 3, R, R), 1 ≤ c ≤ k."""


def make_bicubic(bundle: Bundle) -> Method:
    """Makes bicubic interpolation, the baseline; it has one candidate whatever k."""
    return lambda lr, k, rng: upscale_bicubic(lr, bundle.resolution)[:, None]


def make_mean(bundle: Bundle) -> Method:
    """Makes the floor of a method that invents: the generator's face at the mean latent, the same for everybody.

    It is drawn once, so that its seconds are those of handing it out.
    """
    generator = bundle.generator
    face = bundle.generate(generator.w_avg.expand(1, generator.num_ws, -1))  # (1, 3, R, R)
    return lambda lr, k, rng: face.expand(len(lr), -1, -1, -1)[:, None]


def make_ours(bundle: Bundle) -> Method:
    """Makes the bundle's encoder and generator."""
    return lambda lr, k, rng: bundle.upsample(lr, k, rng=rng)[0]


METHODS: dict[str, Callable[[Bundle], Method]] = {"bicubic": make_bicubic, "mean": make_mean, "ours": make_ours}
TITLES = {"mean": "mean face"}  # in tables, where it differs from the name
