"""How the codes w are distributed: their mean, and the Gaussian that they follow after undoing the mapping's last ReLU.

The mapping network ends in a leaky ReLU with slope 0.2. Its inverse, a leaky ReLU with slope 5, makes W nearly
Gaussian (Menon et al. 2020, section 3.3), v = lrelu₅(w) ~ N(μ, F Fᵀ), where PULSE keeps a diagonal F and we keep all.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.curvature import Curvature
from models.generator import Generator


def gaussianize(w: Tensor) -> Tensor:
    """Undoes the leaky ReLU: v = max(w, 0) + 5 min(w, 0), for codes (…, D)."""
    return F.leaky_relu(w, 5.0)


def ungaussianize(v: Tensor) -> Tensor:
    """The inverse of `gaussianize`: w = lrelu₀.₂(v), for (…, D)."""
    return F.leaky_relu(v, 0.2)


class LatentStatistics(nn.Module):
    """The mean of w and the Gaussian of v, as buffers; and coordinates of W+ in which the LR picture changes evenly.

    Args:
        w_dim: Width D of w.
        num_ws: Styles L of W+, for the coordinates.
        rank: Directions r in which they differ from W+ itself, see `models.curvature`; 0 for none.
    """

    w_avg: Tensor
    mean: Tensor
    factor: Tensor
    sigma: Tensor
    directions: Tensor
    gains: Tensor

    def __init__(self, w_dim: int, num_ws: int = 1, rank: int = 0) -> None:
        super().__init__()
        self.rank = rank
        self.register_buffer("w_avg", torch.zeros(w_dim))
        self.register_buffer("mean", torch.zeros(w_dim))
        self.register_buffer("factor", torch.eye(w_dim))
        if rank:
            self.register_buffer("sigma", torch.ones(()))
            self.register_buffer("directions", torch.zeros(num_ws * w_dim, rank))
            self.register_buffer("gains", torch.ones(rank))

    @torch.no_grad()
    def fit(self, generator: Generator, samples: int = 100_000, seed: int = 0) -> None:
        """Measures the statistics on mapped samples.

        Args:
            generator: Whose mapping network is sampled.
            samples: Number of codes.
            seed: Of the samples.
        """
        rng = np.random.default_rng((seed, samples))
        parts = []
        for start in range(0, samples, 10_000):
            z = rng.standard_normal((min(10_000, samples - start), generator.z_dim), dtype=np.float32)
            parts.append(generator.mapping(torch.from_numpy(z).to(self.mean.device))[:, 0].double())
        w = torch.cat(parts)  # (N, D)
        v = gaussianize(w)
        jitter = 1e-6 * torch.eye(w.shape[1], dtype=w.dtype, device=w.device)
        self.w_avg.copy_(w.mean(dim=0))
        self.mean.copy_(v.mean(dim=0))
        self.factor.copy_(torch.linalg.cholesky(torch.cov(v.T) + jitter))
        if self.rank:
            self.sigma.copy_((w - w.mean(dim=0)).square().mean().sqrt())

    @property
    def curvature(self) -> Curvature | None:
        """P of `models.curvature`, if there is one."""
        return Curvature(self.directions, self.gains) if self.rank else None

    @torch.no_grad()
    def set_curvature(self, curvature: Curvature) -> None:
        """Takes over P; where it has fewer directions than there is room for, the others stay as they are in W+."""
        found = len(curvature.gains)
        self.directions.zero_()
        self.gains.fill_(1.0)
        self.directions[:, :found].copy_(curvature.directions[:, : self.rank])
        self.gains[:found].copy_(curvature.gains[: self.rank])

    def unscale(self, x: Tensor) -> Tensor:
        """Maps offsets x (N, L, D) in the coordinates of P to W+, σ P x; without P, x is in W+ already."""
        return x if not self.rank else self.sigma * Curvature(self.directions, self.gains).scale(x)

    def offsets(self, ws: Tensor) -> Tensor:
        """Gives (w − w̄) / σ for codes (N, L, D)."""
        return (ws - self.w_avg) / self.sigma if self.rank else ws - self.w_avg

    def whiten(self, w: Tensor) -> Tensor:
        """Maps codes w (…, D) to u = F⁻¹ (lrelu₅(w) − μ) (…, D), nearly standard normal; `sample` is the inverse."""
        centred = (gaussianize(w) - self.mean).unsqueeze(-1)
        return torch.linalg.solve_triangular(self.factor, centred, upper=False)[..., 0]

    def sample(self, noise: Tensor) -> Tensor:
        """Maps standard normal noise (…, D) to codes w (…, D) that are distributed as the generator's."""
        return ungaussianize(self.mean + noise @ self.factor.T)
