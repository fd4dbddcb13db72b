"""From bytes to training pairs: mirrored faces, and low-resolution inputs of mixed sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data.operator import Downscale
from training.randomness import BatchRandom


def faces_from_bytes(batch: Tensor, random: BatchRandom | None = None) -> Tensor:
    """Turns bytes into images and mirrors every second one, by chance.

    Args:
        batch: Faces uint8 (B, 3, R, R).
        random: Source of the mirroring, on the batch's device; none is mirrored if None.

    Returns:
        Images (B, 3, R, R) in [-1, 1], channels last.
    """
    images = batch / 127.5 - 1
    if random is not None:
        mirrored = random.rand(len(images), 1, 1, 1) < 0.5
        images = torch.where(mirrored, images.flip(3), images)
    return images.contiguous(memory_format=torch.channels_last)


def random_sizes(
    count: int, smallest: int, largest: int, often: Sequence[int], often_share: float, rng: torch.Generator
) -> list[int]:
    """Draws LR sizes, uniform in their logarithm, some sizes more often than others.

    Args:
        count: How many.
        smallest: Smallest size in pixels.
        largest: Largest size in pixels.
        often: Sizes that are drawn with probability `often_share` instead.
        often_share: Probability in [0, 1].
        rng: Source of randomness.

    Returns:
        Sizes in pixels; most make fractional factors.
    """
    low, high = math.log(smallest - 0.5), math.log(largest + 0.5)
    u, choice, index = torch.rand(3, count, generator=rng, device=rng.device).tolist()
    return [
        often[int(i * len(often))] if often and c < often_share else round(math.exp(low + x * (high - low)))
        for x, c, i in zip(u, choice, index, strict=True)
    ]


def deal_sizes(sizes: Sequence[int], count: int, random: BatchRandom) -> list[int]:
    """Deals LR sizes out evenly over all faces of a step, in all its processes and micro-batches.

    Args:
        sizes: Sizes in pixels, the same in all of them.
        count: Number of faces in this micro-batch of this process.
        random: Says which faces of the step these are.

    Returns:
        The size of each face (count,).
    """
    return [sizes[position * len(sizes) // random.total(count)] for position in random.positions(count)]


class LowResolution(NamedTuple):
    """A group of LR faces of one size, and where they came from in the batch.

    Attributes:
        rows: The part of the batch.
        faces: LR faces (b, 3, s, s) in [-1, 1], on the 8-bit grid like a picture that was saved.
        operator: What made them.
    """

    rows: slice
    faces: Tensor
    operator: Downscale


def downscale_groups(images: Tensor, sizes: Sequence[int]) -> list[LowResolution]:
    """Downscales the images of a batch to different sizes.

    Args:
        images: Images (B, 3, R, R) in [-1, 1].
        sizes: LR size of each image (B,), or of as many equal parts of the batch.

    Returns:
        One group for each run of equal sizes.
    """
    each = [sizes[i * len(sizes) // len(images)] for i in range(len(images))]
    groups, start = [], 0
    for size, same in itertools.groupby(each):
        rows = slice(start, start + len(list(same)))
        operator = Downscale(size)
        lr = ((operator(images[rows]) + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
        groups.append(LowResolution(rows, lr, operator))
        start = rows.stop
    return groups


def lr_sizes_of(groups: Sequence[LowResolution]) -> Tensor:
    """Gives the LR size of every face of the batch, in pixels (B,)."""
    sizes = [group.faces.shape[3] for group in groups for _ in range(len(group.faces))]
    return torch.tensor(sizes, device=groups[0].faces.device)
