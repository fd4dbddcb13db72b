"""Randomness that depends on the step alone, so that an interrupted run goes on exactly."""

from __future__ import annotations

import numpy as np
import torch
from lightning import LightningModule
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

    A step is thereby the same step on any number of processes, and in any number of micro-batches. Process r of n has
    the samples r, r + n, r + 2n, …, as `DistributedSampler` deals them; micro-batches are one after the other.

    Args:
        rng: Source of randomness, in the same state in every process and for every micro-batch.
        rank: This process, from 0.
        world_size: Number of processes.
        part: This micro-batch of the step, from 0.
        parts: Number of micro-batches.
    """

    def __init__(self, rng: torch.Generator, rank: int = 0, world_size: int = 1, part: int = 0, parts: int = 1) -> None:
        self.rng = rng
        self.rank = rank
        self.world_size = world_size
        self.part = part
        self.parts = parts

    @classmethod
    def of_step(cls, module: LightningModule, seed: int, batch_idx: int) -> BatchRandom:
        """Gives the numbers of a training step under Lightning's `accumulate_grad_batches`.

        Args:
            module: What is trained.
            seed: Seed of the run.
            batch_idx: Of `training_step`.

        Returns:
            The numbers of this process and micro-batch.
        """
        trainer = module.trainer
        rng, parts = step_rng(seed, module.global_step, 0, module.device), trainer.accumulate_grad_batches
        return cls(rng, trainer.global_rank, trainer.world_size, batch_idx % parts, parts)

    def rand(self, count: int, *shape: int) -> Tensor:
        """Draws from the uniform distribution on [0, 1), (count, …) for `count` samples of this process."""
        return self._own(torch.rand(self.total(count), *shape, device=self.rng.device, generator=self.rng))

    def randn(self, count: int, *shape: int) -> Tensor:
        """Draws from the standard normal distribution, (count, …)."""
        return self._own(torch.randn(self.total(count), *shape, device=self.rng.device, generator=self.rng))

    def total(self, count: int) -> int:
        """Gives the samples of the whole step, where this micro-batch of this process has `count`."""
        return count * self.world_size * self.parts

    def positions(self, count: int) -> list[int]:
        """Gives the places of this micro-batch's samples among all of the step."""
        return self._own(torch.arange(self.total(count))).tolist()

    def _own(self, numbers: Tensor) -> Tensor:
        return numbers.chunk(self.parts)[self.part][self.rank :: self.world_size]
