"""How the codes w are distributed: their mean, and the Gaussian that they follow after undoing the mapping's last ReLU.

The mapping network ends in a leaky ReLU with slope 0.2. Its inverse, a leaky ReLU with slope 5, makes W nearly
Gaussian (Menon et al. 2020, section 3.3), v = lrelu₅(w) ~ N(μ, F Fᵀ), where PULSE keeps a diagonal F and we keep all.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.generator import Generator
from models.preconditioner import Preconditioner


def gaussianize(w: Tensor) -> Tensor:
    """Undoes the leaky ReLU: v = max(w, 0) + 5 min(w, 0), for codes (…, D)."""
    return F.leaky_relu(w, 5.0)


def ungaussianize(v: Tensor) -> Tensor:
    """The inverse of `gaussianize`: w = lrelu₀.₂(v), for (…, D)."""
    return F.leaky_relu(v, 0.2)


class LatentStatistics(nn.Module):
    """The mean of w, σ, the standard deviation over all its numbers, and the Gaussian of v; and P of the searches.

    Args:
        w_dim: Width D of w.
        num_ws: Styles L of W+, for P.
        rank: Directions r of P, see `models.preconditioner`; 0 for none, P = 1.
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
        self.register_buffer("sigma", torch.ones(()))
        if rank:
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
        self.sigma.copy_((w - w.mean(dim=0)).square().mean().sqrt())

    @property
    def preconditioner(self) -> Preconditioner | None:
        """P of `models.preconditioner`, if there is one."""
        return Preconditioner(self.directions, self.gains) if self.rank else None

    @torch.no_grad()
    def set_preconditioner(self, preconditioner: Preconditioner) -> None:
        """Takes over P; where it has fewer directions than there is room for, the others stay as they are in W+."""
        found = len(preconditioner.gains)
        self.directions.zero_()
        self.gains.fill_(1.0)
        self.directions[:, :found].copy_(preconditioner.directions[:, : self.rank])
        self.gains[:found].copy_(preconditioner.gains[: self.rank])

    def sample(self, noise: Tensor) -> Tensor:
        """Maps standard normal noise (…, D) to codes w (…, D) that are distributed as the generator's."""
        return ungaussianize(self.mean + noise @ self.factor.T)
