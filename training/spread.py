"""How far the candidates may move away from the best guess, layer by layer, before the input no longer fits.

Every layer alone is moved towards random faces, and the downscaling error that it adds is measured, e_l per unit of
movement squared. The spread is then s_l = min(limit, c / √e_l): each layer spends the same share of an error budget,
so fine layers, which the input cannot see, move far, and coarse ones hardly. c is the largest for which the
candidates' mean downscaling error stays within `budget` times that of the best guess.

Samples of a posterior know what the input shows, but only if all layers follow them alike: there, s_l = s for all l,
the largest up to `limit` that keeps to the budget. Both errors are measured after the encoder's feedback passes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from data.operator import Downscale, downscaling_error
from models.encoder_base import EncoderBase
from models.feedback import take_passes
from models.generator import Generator

PROBE = 0.25
CALIBRATION_FACES = 48  # photos that are enough


@torch.no_grad()
def calibrate_spread(
    encoder: EncoderBase,
    generator: Generator,
    faces: Tensor,
    budget: float = 1.6,
    limit: float = 1.0,
    seed: int = 0,
    below: float = math.inf,
) -> None:
    """Fills the encoder's `spread` for each of its LR sizes.

    Args:
        encoder: A trained encoder.
        generator: Its generator.
        faces: Faces to measure on (B, 3, R, R) in [-1, 1]; training faces will do.
        budget: Wanted ratio of the candidates' mean downscaling error to the best guesses'.
        limit: Largest movement of a layer; 1 adds the whole offset of a random face.
        seed: Of the random faces.
        below: LR sizes from this one on, in pixels, keep the spread that they have.
    """
    rng = np.random.default_rng(seed)
    noise = torch.from_numpy(rng.standard_normal((len(faces), 1, encoder.noise_dim), dtype=np.float32))
    for row, size in enumerate(encoder.spread_sizes.tolist()):
        if size >= below:
            continue
        operator = Downscale(int(size))
        lr = operator(faces)
        canvas, sizes = encoder.on_canvas(lr), torch.full((len(lr),), size)

        def codes_of(spread: Tensor, canvas: Tensor = canvas, sizes: Tensor = sizes) -> Tensor:
            return torch.cat(
                [
                    encoder.candidates(*part, spread)
                    for part in zip(canvas.split(16), sizes.split(16), noise.split(16), strict=True)
                ]
            )

        def error_of(ws: Tensor, lr: Tensor = lr) -> float:
            return _error(encoder, generator, ws, lr)

        start = codes_of(torch.ones(encoder.num_ws))
        best, move = start[:, 0], start[:, 1] - start[:, 0]  # candidates are linear in the spread
        base = error_of(best)
        if encoder.posterior is None:
            probes = PROBE * torch.eye(encoder.num_ws)[:, :, None]
            added = [error_of(best + probe * move) - base for probe in probes]
            shape = torch.tensor(added).clamp(min=1e-9).rsqrt() * PROBE  # movement that adds an error of 1
        else:
            shape = torch.ones(encoder.num_ws)
        low, high = 0.0, float(limit / shape.min())
        for _ in range(10):  # bisection
            middle = (low + high) / 2
            spread = (middle * shape).clamp(max=limit)
            low, high = (middle, high) if error_of(best + spread[:, None] * move) <= budget * base else (low, middle)
        encoder.spread[row] = (low * shape).clamp(max=limit)


def _error(encoder: EncoderBase, generator: Generator, ws: Tensor, lr: Tensor) -> float:
    """The mean downscaling error of the faces that codes (B, L, D) draw, after feedback."""
    errors = []
    for part, target in zip(ws.split(32), lr.split(32), strict=True):
        passes = encoder.passes(None)
        images = take_passes(encoder.correct, generator.synthesis, target, part, passes).images
        errors.append(downscaling_error(images.clamp(-1, 1), target, Downscale(lr.shape[3])))
    return float(torch.cat(errors).mean())
