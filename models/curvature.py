"""How strongly the LR picture depends on the codes, on average over faces: coordinates in which it changes evenly.

The derivative J of the LR picture by the codes differs from face to face, but what JᵀJ weighs heavily is much the same:
a few directions of W+ decide the LR picture, most hardly touch it. In coordinates x that undo the mean H = E[JᵀJ],

    w = w° + σ P x,      P = (δ / (H / λ₁ + δ))^(1/2),

with λ₁ the largest eigenvalue and σ the standard deviation of w, searches are short (gradients point nearly at the
solution), and a network whose output is x learns fast (no output moves the picture a hundred times as much as
another). H is estimated from probes g = Jᵀu with standard normal u, since E[g gᵀ] = H, once for a generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


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
        # `linear` multiplies by the transpose: an ONNX export then stores the directions once.
        return (flat + F.linear(along * (self.gains - 1), self.directions)).view_as(x)


def measure_curvature(
    synthesis: Callable[[Tensor], Tensor],
    ws: Tensor,
    operators: Sequence[Callable[[Tensor], Tensor]],
    probes: int = 16,
    damping: float = 1e-3,
    rank: int = 512,
    seed: int = 0,
) -> Curvature:
    """Measures P.

    Args:
        synthesis: The network that draws.
        ws: Codes of typical faces (M, L, D), such as the encoder's; 96 will do.
        operators: Downscalings D, for which P is the mean.
        probes: Probes per face, each a backward pass; the operators take turns.
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
            images = synthesis(codes)
            for i in range(probes):
                downscaled = operators[i % len(operators)](images).flatten(1)  # (m, M)
                u = torch.randn(downscaled.shape, generator=rng).to(downscaled) / downscaled.shape[1] ** 0.5
                (g,) = torch.autograd.grad(downscaled, codes, u, retain_graph=True)
                gradients.append(g.flatten(1))
        # H = GᵀG / n, so its eigenvectors are G's right singular vectors; only ratios of its eigenvalues count.
        _, singular, directions = torch.linalg.svd(torch.cat(gradients), full_matrices=False)
        eigenvalues = (singular[:rank] / singular[0]).square()
        return Curvature(directions[:rank].T.contiguous(), (damping / (eigenvalues + damping)).sqrt())
