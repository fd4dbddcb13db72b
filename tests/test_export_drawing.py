"""The form of the synthesis network that is exported: it draws what the network draws."""

from __future__ import annotations

import pytest
import torch

from export.drawing import draw
from models.generator import Generator

BATCH = 3


def tiny(conv_clamp: float | None = None) -> Generator:
    """A generator of 32 px whose every parameter counts."""
    torch.manual_seed(0)
    generator = Generator(32, (24, 16, 12, 8), z_dim=16, w_dim=16, mapping_layers=1, conv_clamp=conv_clamp).eval()
    for layer in generator.synthesis.layers:
        torch.nn.init.normal_(layer.bias)
        torch.nn.init.constant_(layer.noise_strength, 0.3)
    for block in generator.synthesis.blocks:
        torch.nn.init.normal_(block.torgb.bias)
    return generator.requires_grad_(False)


@pytest.mark.parametrize("noise_batch", [1, BATCH])
@pytest.mark.parametrize("conv_clamp", [None, 0.7])
def test_the_same_images(noise_batch: int, conv_clamp: float | None) -> None:
    synthesis = tiny(conv_clamp).synthesis
    rng = torch.Generator().manual_seed(1)
    ws = torch.randn(BATCH, synthesis.num_ws, synthesis.w_dim, generator=rng)  # another code for every layer
    noise = synthesis.make_noise(noise_batch, rng)
    wanted = synthesis(ws, noise=noise)
    torch.testing.assert_close(draw(synthesis, ws, noise), wanted, atol=1e-5, rtol=1e-5)
    if conv_clamp is not None:  # which bites
        assert not torch.allclose(wanted, draw(tiny().synthesis, ws, noise), atol=0.01)
