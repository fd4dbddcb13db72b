"""How far the candidates may move away from the best guess, layer by layer, before the input no longer fits.

Every layer alone is moved towards random faces, and the downscaling error that it adds is measured, e_l per unit of
movement squared. The spread is then s_l = min(limit, c / √e_l): each layer spends the same share of an error budget,
so fine layers, which the input cannot see, move far, and coarse ones hardly. c is the largest for which the
candidates' mean downscaling error stays within `budget` times that of the best guess.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data.operator import Downscale, downscaling_error
from models.encoder import Encoder
from models.generator import Generator

PROBE = 0.25


@torch.no_grad()
def calibrate_spread(
    encoder: Encoder, generator: Generator, faces: Tensor, budget: float = 1.6, limit: float = 1.0, seed: int = 0
) -> None:
    """Fills the encoder's `spread` for each of its LR sizes.

    Args:
        encoder: A trained encoder.
        generator: Its generator.
        faces: Faces to measure on (B, 3, R, R) in [-1, 1]; training faces will do.
        budget: Wanted ratio of the candidates' mean downscaling error to the best guesses'.
        limit: Largest movement of a layer; 1 adds the whole offset of a random face.
        seed: Of the random faces.
    """
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(rng.standard_normal((len(faces), 1, encoder.w_dim), dtype=np.float32))
    for row, size in enumerate(encoder.spread_sizes.tolist()):
        operator = Downscale(int(size))
        lr = operator(faces)
        best = encoder(lr)[:, 0]  # (B, L, D)
        base = _error(generator, best, lr, operator)

        def error_of(spread: Tensor, best: Tensor = best, lr: Tensor = lr, operator: Downscale = operator) -> float:
            return _error(generator, encoder.mix(best, noise, spread)[:, 1], lr, operator)

        added = [error_of(PROBE * torch.eye(encoder.num_ws)[i]) - base for i in range(encoder.num_ws)]
        shape = torch.tensor(added).clamp(min=1e-9).rsqrt() * PROBE  # movement that adds an error of 1
        low, high = 0.0, float(limit / shape.min())
        for _ in range(10):  # bisection
            middle = (low + high) / 2
            fits = error_of((middle * shape).clamp(max=limit)) <= budget * base
            low, high = (middle, high) if fits else (low, middle)
        encoder.spread[row] = (low * shape).clamp(max=limit)


def _error(generator: Generator, ws: Tensor, lr: Tensor, operator: Downscale) -> float:
    """The mean downscaling error of the faces that codes (B, L, D) draw."""
    images = torch.cat([generator.synthesis(part) for part in ws.split(32)]).clamp(-1, 1)
    return float(downscaling_error(images, lr, operator).mean())
