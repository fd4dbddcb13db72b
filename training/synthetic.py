"""A start without photos: faces that the generator draws, whose codes are known.

    L = ‖E(D g(w)) − w‖² / ‖w − w̄‖²

Nothing is propagated back through the generator, and no other network looks on, so that a step costs less than one on
photos. Half of the codes mix the styles of two faces, or W+ would be seen on its diagonal alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.encoder_base import EncoderBase
from models.generator import Generator
from training.batches import downscale_groups, lr_sizes_of


@torch.no_grad()
def mixed_codes(generator: Generator, count: int, rng: torch.Generator) -> Tensor:
    """Draws codes, every second one with the finer styles of another face.

    Args:
        generator: Whose mapping network is sampled.
        count: Number of codes B.
        rng: Source of randomness, on the generator's device.

    Returns:
        Codes (B, L, D).
    """
    z = torch.randn(2 * count, generator.z_dim, device=rng.device, generator=rng)
    first, second = generator.mapping(z).chunk(2)  # (B, L, D) each
    layers = generator.num_ws
    other = torch.randint(1, 2 * layers, (count, 1, 1), device=rng.device, generator=rng)  # from L on, none
    return torch.where(torch.arange(layers, device=rng.device)[:, None] < other, first, second)


def synthetic_loss(
    encoder: EncoderBase, generator: Generator, count: int, sizes: Sequence[int], rng: torch.Generator
) -> Tensor:
    """The share of the codes' variance that the best guess misses: 1 for an encoder that always says w̄.

    Args:
        encoder: Is trained.
        generator: Stays as it is.
        count: Number of faces.
        sizes: LR sizes in pixels, each for an equal part of the faces.
        rng: Source of randomness, on the generator's device.

    Returns:
        The loss, a scalar.
    """
    ws = mixed_codes(generator, count, rng)
    with torch.no_grad():
        images = generator.synthesis(ws).float().clamp(-1, 1)
    with torch.autocast(rng.device.type, enabled=False):  # LR faces lie on the 8-bit grid
        groups = downscale_groups(images, sizes)
        canvas = torch.cat([encoder.on_canvas(group.faces) for group in groups])
    guess = encoder.codes(encoder.read(canvas, lr_sizes_of(groups)))
    return (guess - ws).square().mean() / (ws - encoder.latents.w_avg).square().mean()
