"""A batch of a training step: its random numbers, mirrored faces, and low-resolution inputs of mixed sizes.

Random numbers depend on the step alone, so that an interrupted run resumes exactly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from lightning import LightningModule
from torch import Tensor

from data.operator import Downscale


def step_rng(seed: int, step: int, rank: int, device: torch.device | str) -> torch.Generator:
    """Makes the source of all random choices of one training step on one process.

    It is seeded by a hash of the three, so that neighbouring seeds, steps and ranks do not overlap, and numbers stay
    apart from weights that were initialised from the bare seed. Negative steps are for numbers outside of the run.
    """
    words = np.random.SeedSequence((seed, step % 2**32, rank)).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


class BatchRandom:
    """Random numbers of a batch that several processes share: each samples those of all samples and keeps its own.

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
        """Gives the numbers of a training step under Lightning's `accumulate_grad_batches`."""
        trainer = module.trainer
        rng, parts = step_rng(seed, module.global_step, 0, module.device), trainer.accumulate_grad_batches
        return cls(rng, trainer.global_rank, trainer.world_size, batch_idx % parts, parts)

    def rand(self, count: int, *shape: int) -> Tensor:
        """Samples from the uniform distribution on [0, 1), (count, …) for `count` samples of this process."""
        return self._own(torch.rand(self.total(count), *shape, device=self.rng.device, generator=self.rng))

    def randn(self, count: int, *shape: int) -> Tensor:
        """Samples from the standard normal distribution, (count, …)."""
        return self._own(torch.randn(self.total(count), *shape, device=self.rng.device, generator=self.rng))

    def total(self, count: int) -> int:
        """Gives the samples of the whole step, where this micro-batch of this process has `count`."""
        return count * self.world_size * self.parts

    def positions(self, count: int) -> list[int]:
        """Gives the places of this micro-batch's samples among all of the step."""
        return self._own(torch.arange(self.total(count))).tolist()

    def _own(self, numbers: Tensor) -> Tensor:
        return numbers.chunk(self.parts)[self.part][self.rank :: self.world_size]


def faces_from_bytes(batch: Tensor, random: BatchRandom | None = None) -> Tensor:
    """Turns faces, uint8 (B, 3, R, R), into images in [-1, 1], channels last, half of them mirrored by chance."""
    images = batch / 127.5 - 1
    if random is not None:
        mirrored = random.rand(len(images), 1, 1, 1) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    return images.contiguous(memory_format=torch.channels_last)


def random_sizes(
    count: int, smallest: int, largest: int, oversampled: Sequence[int], prob: float, rng: torch.Generator
) -> list[int]:
    """Samples LR sizes in pixels, uniform in their logarithm, or with probability `prob` one of those oversampled."""
    low, high = math.log(smallest - 0.5), math.log(largest + 0.5)
    u, choice, index = torch.rand(3, count, generator=rng, device=rng.device).tolist()
    return [
        oversampled[int(i * len(oversampled))] if oversampled and c < prob else round(math.exp(low + x * (high - low)))
        for x, c, i in zip(u, choice, index, strict=True)
    ]


def deal_sizes(sizes: Sequence[int], count: int, random: BatchRandom) -> list[int]:
    """Deals LR sizes out evenly over all faces of a step, in all its processes and micro-batches.

    Args:
        sizes: Sizes in pixels, the same in all of them.
        count: Number of faces in this micro-batch of this process.
        random: Says which faces of the step these are.
    """
    return [sizes[position * len(sizes) // random.total(count)] for position in random.positions(count)]


class LRGroup(NamedTuple):
    """A group of LR faces of one size, and where they came from in the batch."""

    rows: slice  # the part of the batch
    faces: Tensor  # LR faces (b, 3, s, s) in [-1, 1], on the 8-bit grid
    operator: Downscale  # what made them


def downscale_groups(images: Tensor, sizes: Sequence[int]) -> list[LRGroup]:
    """Downscales images (B, 3, R, R), each or in equal parts, to the sizes: one group for each run of equal sizes."""
    each = [sizes[i * len(sizes) // len(images)] for i in range(len(images))]
    groups, start = [], 0
    for size, same in itertools.groupby(each):
        rows = slice(start, start + len(list(same)))
        operator = Downscale(size)
        lr = ((operator(images[rows]) + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
        groups.append(LRGroup(rows, lr, operator))
        start = rows.stop
    return groups


def lr_sizes_of(groups: Sequence[LRGroup]) -> Tensor:
    """Gives the LR size of every face of the batch, in pixels (B,)."""
    sizes = [group.faces.shape[3] for group in groups for _ in range(len(group.faces))]
    return torch.tensor(sizes, device=groups[0].faces.device)
