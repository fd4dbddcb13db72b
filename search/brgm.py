"""BRGM's maximum a posteriori estimate (Marinescu et al. 2020), the other baseline of the regularized latent search.

    0.001 · 255² ‖D(G(w)) − y‖² + 1.25 LPIPS(D(G(w)), y) + 100 mean(((w − w̄) / s)²) + λ Σ_{l,m} (1 − cos(w_l, w_m))

with the mean square in units of [0, 1], s² = E‖w − w̄‖² over the generator's codes, λ = 0.1 up to a factor of 16 and 1
beyond; Adam at 0.1, 500 steps from the mean latent.

The numbers are those of the published code, whose perceptual term, 10⁷ times a mean over the 7,995,392 features of
LPIPS at 256 px, is 1.25 times its sum. Here LPIPS is the one on SqueezeNet instead of VGG16, on LR pictures enlarged to
64 px by repeated pixels where they are smaller, and noise maps are the generator's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.perceptual import LPIPS
from models.generator import SynthesisNetwork
from search.loop import Codes, Problem, Rows, Search
from search.optimizers import Adam, constant

LEARNING_RATE = 0.1
PIXELS, PERCEPTUAL, PRIOR = 0.001 * 255**2, 1e7 / 7_995_392, 100.0
LEAST_SIDE = 64  # px; smaller pictures are enlarged before LPIPS looks at them


def cosine_term(ws: Tensor) -> Tensor:
    """Sums 1 − cos over all ordered pairs of styles of codes (N, L, D): terms (N,)."""
    unit = F.normalize(ws, dim=2)
    return (1 - unit @ unit.mT).abs().sum(dim=(1, 2))


def cosine_weight(resolution: int, lr_size: int) -> float:
    """Gives λ for faces of R px from LR pictures of s px."""
    return 0.1 if resolution <= 16 * lr_size else 1.0


def _enlarged(pictures: Tensor) -> Tensor:
    side = pictures.shape[-1]
    if side >= LEAST_SIDE:
        return pictures
    return F.interpolate(pictures, size=LEAST_SIDE, mode="nearest-exact")


def brgm(
    synthesis: SynthesisNetwork,
    lpips: LPIPS,
    operator: Callable[[Tensor], Tensor],
    mean: Tensor,
    sigma: float,
    ws: Tensor,
    weight: float,
) -> Search:
    """States BRGM's estimate.

    Args:
        synthesis: The network, with its stored noise maps.
        lpips: The distance.
        operator: The downscaling D.
        mean: w̄ (D,).
        sigma: Standard deviation of w over all its numbers, s / √D.
        ws: Codes to start from (N, L, D); the mean latent in the published code.
        weight: λ, see `cosine_weight`.

    Returns:
        The search; its variable is "ws", and the last column of its residuals is LPIPS.
    """
    scale = sigma * math.sqrt(len(mean))  # s

    def loss(variables: Rows, codes: Codes, residuals: Tensor) -> Tensor:
        error, distance = residuals[:, :-1].square().sum(dim=1), residuals[:, -1]
        prior = ((codes.ws - mean) / scale).square().mean(dim=(1, 2))
        return PIXELS * error + PERCEPTUAL * distance + PRIOR * prior + weight * cosine_term(codes.ws)

    def perceptual(images: Tensor, downscaled: Tensor, target: Tensor, constants: Rows) -> Tensor:
        with torch.no_grad():
            wanted = lpips.features(_enlarged(target))
        return lpips.distance(lpips.features(_enlarged(downscaled)), wanted)[:, None]

    problem = Problem(lambda variables, constants: Codes(variables["ws"]), synthesis, operator, perceptual, loss)
    return Search(problem, {"ws": ws.float()}, {}, Adam(constant(LEARNING_RATE)))
