"""PULSE's geometry: the Gaussianised W, the sphere that its codes stay on, and the angles between styles.

A vector of D standard normal numbers lies near the sphere of radius √D. PULSE keeps every style there, at the radius
that it started with, in coordinates in which the generator's own codes are nearly standard normal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.latents import LatentStatistics, gaussianize, ungaussianize
from search.loop import Optimizer, Point, Rows

_INSIDE_ROOT = 1e-9  # as in the published code: keeps the gradients of norms finite at zero


@dataclass(frozen=True)
class GaussianMap:
    """PULSE's map from standard normal u to codes, w = lrelu₀.₂(σ u + μ), with μ and σ those of v = lrelu₅(w).

    Menon et al. 2020, section 3.3.
    """

    mean: Tensor  # μ (D,)
    std: Tensor  # σ (D,), above 0

    @classmethod
    def of(cls, statistics: LatentStatistics) -> GaussianMap:
        """Takes the mean and the diagonal of the covariance; `LatentStatistics.fit` measures both on mapped samples."""
        return cls(statistics.mean, statistics.factor.square().sum(dim=1).sqrt())

    def to_w(self, u: Tensor) -> Tensor:
        """Maps (…, D) to codes w (…, D)."""
        return ungaussianize(u * self.std + self.mean)

    def from_w(self, w: Tensor) -> Tensor:
        """The inverse of `to_w`."""
        return (gaussianize(w) - self.mean) / self.std


def radius(x: Tensor) -> Tensor:
    """The lengths √(Σ x² + 1e-9) of styles (N, L, D) or noise maps (N, 1, H, W), as (N, L, 1) or (N, 1, 1, 1)."""
    return (x.square().sum(dim=tuple(range(2, x.ndim)), keepdim=True) + _INSIDE_ROOT).sqrt()


class OnSphere:
    """Keeps every variable on the sphere of its start's own radius, x ← r₀ x / ‖x‖ after each step of an optimizer.

    The SphericalOptimizer of the published code.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def nfe(self) -> int:
        """That of the optimizer."""
        return self.optimizer.nfe

    def init(self, variables: Rows) -> Rows:
        """The optimizer's state, with the radii."""
        return self.optimizer.init(variables) | {f"radius {name}": radius(x) for name, x in variables.items()}

    def step(self, number: int, point: Point, state: Rows) -> tuple[Rows, Rows]:
        """Takes the optimizer's step and projects."""
        radii = {name: r for name, r in state.items() if name.startswith("radius ")}
        variables, state = self.optimizer.step(number, point, state)
        return {name: x / radius(x) * radii[f"radius {name}"] for name, x in variables.items()}, state | radii


def squared_angles(ws: Tensor) -> Tensor:
    """Measures θ = 2 atan2(‖a − b‖, ‖a + b‖) of any two styles of codes (N, L, D) of equal length: θ² (N, L, L)."""
    a, b = ws[:, :, None], ws[:, None]
    apart = ((a - b).square().sum(dim=3) + _INSIDE_ROOT).sqrt()
    together = ((a + b).square().sum(dim=3) + _INSIDE_ROOT).sqrt()
    return (2 * torch.atan2(apart, together)).square()


def geodesic_cross(ws: Tensor) -> Tensor:
    """GEOCROSS of codes (N, L, D) at the scale of the published code, 512 / 8 · mean of θ_ij² over all pairs (N,).

    The paper writes Σ_{i<j} θ_ij². The weight 0.05 belongs to this scale, in which a style and itself are a pair.
    """
    return squared_angles(ws).mean(dim=(1, 2)) * (512 / 8)
