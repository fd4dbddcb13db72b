"""Randomness that depends on the step alone, so that an interrupted run goes on exactly."""

from __future__ import annotations

import numpy as np
import torch


def step_rng(seed: int, step: int, rank: int, device: torch.device | str) -> torch.Generator:
    """Makes the source of all random choices of one training step.

    Args:
        seed: Seed of the run.
        step: Step of the run; negative numbers for draws outside the steps, such as a fixed grid.
        rank: This process among several.
        device: Where the numbers are needed.

    Returns:
        A generator seeded by a hash of the three, so that neighbouring seeds, steps and ranks do not overlap. Hashing
        also keeps draws apart from weights that were initialised from the bare seed.
    """
    words = np.random.SeedSequence((seed, step % 2**32, rank)).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
