"""How the codes w are distributed, and coordinates of W+ in which the LR picture changes evenly.

**Gaussian.** The mapping network ends in a leaky ReLU with slope 0.2. Its inverse, a leaky ReLU with slope 5, makes W
nearly Gaussian (Menon et al. 2020, section 3.3), v = lrelu₅(w) ~ N(μ, F Fᵀ), where PULSE keeps a diagonal F and we keep
all.

**Preconditioner.** The derivative J of the LR picture by the codes differs from face to face, but what JᵀJ weighs
heavily is much the same: a few directions of W+ decide the LR picture, most hardly touch it. In coordinates x that undo
the mean H = E[JᵀJ],

    w = w° + σ P x,      P = (δ / (H / λ₁ + δ))^(1/2),

with λ₁ the largest eigenvalue and σ the standard deviation of w, searches are short, because gradients point nearly at
the solution. H is estimated from probes g = Jᵀu with standard normal u, since E[g gᵀ] = H, once for a generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.operator import Downscale
from models.device import faces_at_once
from models.generator import Generator

FACES, PROBES, TRUNCATION = 96, 16, 0.8  # a probe is a backward pass for a face
LR_SIZES = (8, 12, 16, 24)  # in px, of a 64 px generator; the probes take turns


@dataclass(frozen=True)
class Preconditioner:
    """P, as a change of the identity along a few directions."""

    directions: Tensor  # eigenvectors of H (L · D, r), orthonormal
    gains: Tensor  # P along them (r,), in (0, 1]; 1 along all others

    def apply(self, x: Tensor) -> Tensor:
        """P x for offsets (N, L, D)."""
        flat = x.flatten(1)  # (N, L · D)
        along = flat @ self.directions  # (N, r)
        return (flat + F.linear(along * (self.gains - 1), self.directions)).view_as(x)


def measure_preconditioner(generator: Generator, rank: int, seed: int, damping: float = 1e-3) -> Preconditioner:
    """Measures P on faces of a generator, for LR pictures of several sizes.

    Args:
        generator: The generator.
        rank: Directions r at most.
        seed: Of faces and probes; the same on every process of a training.
        damping: δ; smaller means longer moves along directions that hardly show in the LR picture.
    """
    z = np.random.default_rng(seed).standard_normal((FACES, generator.z_dim), dtype=np.float32)
    operators = [Downscale(max(4, size * generator.resolution // 64)) for size in LR_SIZES]
    rng = torch.Generator().manual_seed(seed)
    gradients = []
    with torch.inference_mode(False), torch.enable_grad():
        ws = generator.mapping(torch.from_numpy(z).to(generator.w_avg.device), TRUNCATION).detach()
        for part in ws.split(faces_at_once(generator, gradient=True, most=16)):
            codes = part.clone().requires_grad_()
            images = generator.synthesis(codes)
            for i in range(PROBES):
                downscaled = operators[i % len(operators)](images).flatten(1)  # (m, M)
                u = torch.randn(downscaled.shape, generator=rng).to(downscaled) / downscaled.shape[1] ** 0.5
                (g,) = torch.autograd.grad(downscaled, codes, u, retain_graph=True)
                gradients.append(g.flatten(1))
        # H = GᵀG / n, so its eigenvectors are G's right singular vectors; only ratios of its eigenvalues count.
        _, singular, directions = torch.linalg.svd(torch.cat(gradients), full_matrices=False)
        eigenvalues = (singular[:rank] / singular[0]).square()
        return Preconditioner(directions[:rank].T.contiguous(), (damping / (eigenvalues + damping)).sqrt())


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
        rank: Directions r of P; 0 for none, P = 1.
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
        """Measures the statistics on so many codes that the generator's mapping network gives for a seed."""
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
        """P, if there is one."""
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
