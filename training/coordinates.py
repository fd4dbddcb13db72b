"""Measures coordinates in which the LR picture changes evenly (`models.curvature`), on faces of the generator."""

from __future__ import annotations

import numpy as np
import torch

from data.operator import Downscale
from models.curvature import Curvature, measure_curvature
from models.encoder_base import EncoderBase
from models.generator import Generator

PROBED_FACES, PROBED_SIZES = 96, (8, 12, 16, 24)  # what they are measured on; sizes of a 64 px generator


def measure_coordinates(generator: Generator, rank: int, seed: int, encoder: EncoderBase | None = None) -> Curvature:
    """Measures P around typical codes.

    Every process of a training on several gets the same: all of them draw the same faces and probes.

    Args:
        generator: The generator.
        rank: Directions r at most.
        seed: Of faces and probes.
        encoder: Trained encoder whose point estimates are the typical codes, on the generator's device; None for
            the codes that the faces come from.

    Returns:
        P.
    """
    z = np.random.default_rng(seed).standard_normal((PROBED_FACES, generator.z_dim), dtype=np.float32)
    operators = [Downscale(max(4, size * generator.resolution // 64)) for size in PROBED_SIZES]
    with torch.no_grad():
        ws = generator.mapping(torch.from_numpy(z).to(generator.w_avg.device), 0.8)
        if encoder is not None:
            parts = generator.synthesis(ws).clamp(-1, 1).chunk(len(operators))
            ws = torch.cat([encoder(op(part)).ws[:, 0] for op, part in zip(operators, parts, strict=True)])
    return measure_curvature(generator.synthesis, ws, operators, rank=rank, seed=seed)
