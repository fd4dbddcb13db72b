"""The preconditioner of searches in W+: coordinates in which the LR picture changes evenly.

The derivative J of the LR picture by the codes differs from face to face, but what JᵀJ weighs heavily is much the same:
a few directions of W+ decide the LR picture, most hardly touch it. In coordinates x that undo the mean H = E[JᵀJ],

    w = w° + σ P x,      P = (δ / (H / λ₁ + δ))^(1/2),

with λ₁ the largest eigenvalue and σ the standard deviation of w, searches are short, because gradients point nearly at
the solution. H is estimated from probes g = Jᵀu with standard normal u, since E[g gᵀ] = H, once for a generator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.operator import Downscale
from models.generator import Generator
from models.memory import faces_at_once

FACES, PROBES, TRUNCATION = 96, 16, 0.8  # a probe is a backward pass for a face
LR_SIZES = (8, 12, 16, 24)  # in px, of a 64 px generator; the probes take turns


@dataclass(frozen=True)
class Preconditioner:
    """P, as a change of the identity along a few directions.

    Attributes:
        directions: Eigenvectors of H (L · D, r), orthonormal.
        gains: P along them (r,), in (0, 1]; 1 along all others.
    """

    directions: Tensor
    gains: Tensor

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

    Returns:
        P.
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
