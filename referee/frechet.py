"""The Fréchet distance from features that come in parts.

d² = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)        (Heusel et al. 2017)
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and covariance of features, in double precision.

    Args:
        width: Numbers F per picture.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Takes in features (N, F)."""
        features = features.double()
        self.count += len(features)
        self.sum += features.sum(dim=0)
        self.products += features.T @ features

    @property
    def mean(self) -> Tensor:
        """μ (F,)."""
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        """Σ (F, F), with N − 1."""
        return (self.products - self.count * self.mean[:, None] * self.mean) / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Measures d² between two sets of features.

    Args:
        a: Moments of the first, two pictures or more.
        b: Of the second.

    Returns:
        d², 0 for equal moments.
    """
    apart = (a.mean - b.mean).square().sum()
    # Eigenvalues of Σ₁ Σ₂ are those of a positive semidefinite matrix; rounding may leave tiny imaginary parts.
    roots = torch.linalg.eigvals(a.covariance @ b.covariance).sqrt().real.sum()
    return float(apart + a.covariance.trace() + b.covariance.trace() - 2 * roots)
