"""The last exact step: what the downscaled face lacks of the LR picture is added back, band-limited."""

from __future__ import annotations

import torch
from torch import Tensor

from data.operator import resize_matrix


def make_consistent(images: Tensor, lr: Tensor) -> Tensor:
    """Adds the smallest picture that makes the faces downscale to the LR picture exactly.

    x' = x + A⁺ (y − A x Aᵀ) A⁺ᵀ with A⁺ = Aᵀ (A Aᵀ)⁻¹, the projection on {x : D(x) = y} for D(x) = A x Aᵀ.

    A⁺ spans no more than A's rows, so nothing is added that the LR picture could not show. It is exact for the
    floating-point picture; clamping to [-1, 1] and rounding to 8 bit come after it and leave a small error.

    Args:
        images: Faces (N, 3, R, R), about [-1, 1].
        lr: LR pictures (N, 3, s, s) in [-1, 1], or one (1, 3, s, s) for all; s ≤ R.

    Returns:
        Faces (N, 3, R, R), not clamped.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if images.ndim != 4 or lr.ndim != 4 or lr.shape[0] not in (1, len(images)) or lr.shape[-1] > images.shape[-1]:
        raise ValueError(
            f"Expected faces (N, 3, R, R) and LR pictures (N or 1, 3, s, s) with s ≤ R, got {tuple(images.shape)} and "
            f"{tuple(lr.shape)}."
        )
    matrix = resize_matrix(images.shape[-1], lr.shape[-1]).double()  # A (s, R)
    inverse = torch.linalg.solve(matrix @ matrix.T, matrix).T.to(images)  # A⁺ (R, s)
    matrix = matrix.to(images)
    return images + inverse @ (lr - matrix @ images @ matrix.T) @ inverse.T
