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


def gaussianize(w: Tensor) -> Tensor:
    """Undoes the leaky ReLU: v = max(w, 0) + 5 min(w, 0), for codes (…, D)."""
    return F.leaky_relu(w, 5.0)


def ungaussianize(v: Tensor) -> Tensor:
    """The inverse of `gaussianize`: w = lrelu₀.₂(v), for (…, D)."""
    return F.leaky_relu(v, 0.2)


class LatentStatistics(nn.Module):
    """The mean of w and the Gaussian of v, as buffers.

    Args:
        w_dim: Width D of w.
    """

    w_avg: Tensor
    mean: Tensor
    factor: Tensor

    def __init__(self, w_dim: int) -> None:
        super().__init__()
        self.register_buffer("w_avg", torch.zeros(w_dim))
        self.register_buffer("mean", torch.zeros(w_dim))
        self.register_buffer("factor", torch.eye(w_dim))

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

    def sample(self, noise: Tensor) -> Tensor:
        """Maps standard normal noise (…, D) to codes w (…, D) that are distributed as the generator's."""
        return ungaussianize(self.mean + noise @ self.factor.T)
