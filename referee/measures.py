"""What is measured, as functions of pictures and their errors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from data.operator import EPSILON
from data.reading import to_uint8
from losses.perceptual import LPIPS


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Measures the peak signal-to-noise ratio, −10 log₁₀ of the mean squared error in [0, 1].

    Args:
        images: Images (B, C, H, W) in [-1, 1].
        truth: Images of the same shape.

    Returns:
        Ratios (B,) in dB, inf for equal images.
    """
    return -10 * ((images - truth) / 2).square().mean(dim=(1, 2, 3)).log10()


def candidates_that_count(errors: Tensor) -> Tensor:
    """Says which candidates explain the LR picture about as well as the best guess, e_j ≤ 2 e_0.

    Args:
        errors: Downscaling errors (B, k), the best guess first.

    Returns:
        Truth values (B, k); the best guess always counts.
    """
    return errors <= 2 * errors[:, :1]


def candidates_within(errors: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Says which candidates explain the LR picture, e_j ≤ 2 ε: a measure that is the same for all methods.

    Args:
        errors: Downscaling errors (B, k).
        epsilon: ε.

    Returns:
        Truth values (B, k).
    """
    return errors <= 2 * epsilon


def diversity(lpips: LPIPS, features: Sequence[Tensor], counts: Tensor) -> Tensor:
    """Measures the mean pairwise LPIPS among the candidates that count.

    Args:
        lpips: The distance.
        features: Its features of the candidates, each (B, k, C_l, H_l, W_l).
        counts: Which candidates count (B, k).

    Returns:
        Distances (B,), 0 where fewer than two candidates count.
    """
    total = torch.zeros(len(counts), device=counts.device)  # (B,)
    pairs = torch.zeros_like(total)
    for i, j in itertools.combinations(range(counts.shape[1]), 2):
        both = counts[:, i] & counts[:, j]  # (B,)
        total += both * lpips.distance([f[:, i] for f in features], [f[:, j] for f in features])
        pairs += both
    return total / pairs.clamp(min=1)


def as_written(images: Tensor, batch: int, resolution: int) -> Tensor:
    """Clamps candidates (B, c, 3, R, R) and rounds them to 8 bit.

    Args:
        images: What a method returned.
        batch: Faces B that it was given.
        resolution: Size R that they must have.

    Returns:
        Pictures (B, c, 3, R, R), uint8.

    Raises:
        ValueError: If the method returned another shape, or numbers that are not finite.
    """
    expected = (batch, images.shape[1] if images.ndim == 5 else 1, 3, resolution, resolution)
    if images.shape != expected or images.shape[1] < 1:
        raise ValueError(f"Expected candidates (B, c, 3, R, R) like {expected}, got {tuple(images.shape)}.")
    if not images.isfinite().all():
        raise ValueError("Expected finite pictures, got NaN or inf; look at the weights of the method.")
    return to_uint8(images.flatten(0, 1)).unflatten(0, images.shape[:2])
