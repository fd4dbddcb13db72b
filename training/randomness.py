"""Randomness that depends on the step alone, so that an interrupted run goes on exactly."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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


class BatchRandom:
    """Random numbers of a batch that several processes share: each draws those of all samples and keeps its own.

    A step is thereby the same step on any number of processes. Process r of n has the samples r, r + n, r + 2n, …, as
    `DistributedSampler` deals them.

    Args:
        rng: Source of randomness, in the same state in every process.
        rank: This process, from 0.
        world_size: Number of processes.
    """

    def __init__(self, rng: torch.Generator, rank: int = 0, world_size: int = 1) -> None:
        self.rng = rng
        self.rank = rank
        self.world_size = world_size

    def rand(self, count: int, *shape: int) -> Tensor:
        """Draws from the uniform distribution on [0, 1), (count, …) for `count` samples of this process."""
        return self._own(torch.rand(count * self.world_size, *shape, device=self.rng.device, generator=self.rng))

    def randn(self, count: int, *shape: int) -> Tensor:
        """Draws from the standard normal distribution, (count, …)."""
        return self._own(torch.randn(count * self.world_size, *shape, device=self.rng.device, generator=self.rng))

    def _own(self, numbers: Tensor) -> Tensor:
        return numbers[self.rank :: self.world_size]
