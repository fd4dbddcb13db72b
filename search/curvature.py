"""How strongly the LR picture depends on the codes, on average over faces: coordinates in which searches are short.

The derivative J of the residuals by the codes differs from face to face, but what JᵀJ weighs heavily is much the same:
a few directions of W+ decide the LR picture, most hardly touch it. In coordinates that undo the mean H = E[JᵀJ],

    w = w° + σ P x,      P = (δ / (H / λ₁ + δ))^(1/2),

with λ₁ the largest eigenvalue, gradients point nearly at the solution. H is estimated from probes g = Jᵀu with standard
normal u, since E[g gᵀ] = H, once for a generator and an LR size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.generator import SynthesisNetwork


@dataclass(frozen=True)
class Curvature:
    """P, as a change of the identity along a few directions.

    Attributes:
        directions: Eigenvectors of H (L · D, r), orthonormal.
        gains: P along them (r,), in (0, 1]; 1 along all others.
    """

    directions: Tensor
    gains: Tensor

    def scale(self, x: Tensor) -> Tensor:
        """P x for offsets (N, L, D)."""
        flat = x.flatten(1)  # (N, L · D)
        along = flat @ self.directions  # (N, r)
        return (flat + (along * (self.gains - 1)) @ self.directions.T).view_as(x)


def measure_curvature(
    synthesis: SynthesisNetwork,
    ws: Tensor,
    operator: Callable[[Tensor], Tensor],
    probes: int = 16,
    damping: float = 1e-3,
    rank: int = 512,
    seed: int = 0,
) -> Curvature:
    """Measures P.

    Args:
        synthesis: The network that draws.
        ws: Codes of typical faces (M, L, D), such as the encoder's; 96 will do.
        operator: The downscaling D.
        probes: Probes per face, each a backward pass.
        damping: δ; smaller means longer moves along directions that hardly show in the LR picture.
        rank: Directions r at most.
        seed: Of the probes.

    Returns:
        P.
    """
    rng = torch.Generator().manual_seed(seed)
    gradients = []
    with torch.inference_mode(False), torch.enable_grad():
        for part in ws.split(16):
            codes = part.clone().requires_grad_()
            downscaled = operator(synthesis(codes)).flatten(1)  # (m, M)
            for _ in range(probes):
                u = torch.randn(downscaled.shape, generator=rng).to(downscaled)
                (g,) = torch.autograd.grad(downscaled, codes, u, retain_graph=True)
                gradients.append(g.flatten(1))
        # H = GᵀG / n, so its eigenvectors are G's right singular vectors; only ratios of its eigenvalues count.
        _, singular, directions = torch.linalg.svd(torch.cat(gradients), full_matrices=False)
        eigenvalues = (singular[:rank] / singular[0]).square()
        return Curvature(directions[:rank].T.contiguous(), (damping / (eigenvalues + damping)).sqrt())
