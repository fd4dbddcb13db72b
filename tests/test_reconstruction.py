"""A grown generator reconstructs the photos that its predecessor's encoder reads, and learns from them."""

from __future__ import annotations

import pytest
import torch
from small_runs import CHANNELS, D, PixelDistance

import training.reconstruction
from data.operator import Downscale
from models.generator import Generator
from models.layers import upsample_2x, upsampling_filter
from training.reconstruction import Reconstruction
from training.start import start_generator


@pytest.fixture
def reconstruction(tiny_bundle, monkeypatch) -> Reconstruction:
    monkeypatch.setattr(training.reconstruction, "LPIPS", PixelDistance)
    return Reconstruction(str(tiny_bundle))


def test_grown_generator_starts_with_the_bundles_reconstructions_enlarged(reconstruction, bundle, tiny_bundle) -> None:
    grown = Generator(64, (*CHANNELS, 8), D, D, 2)
    start_generator(grown, str(tiny_bundle / "generator.safetensors"))
    photos = torch.rand(2, 3, 64, 64) * 2 - 1
    encoding = bundle.encode(Downscale(32)(photos))
    enlarged = upsample_2x(bundle.generate(encoding)[:, 0], upsampling_filter())
    made = reconstruction(grown.synthesis, photos)
    torch.testing.assert_close(made.detach(), enlarged, rtol=1e-4, atol=1e-4)
    _, square = reconstruction.distance(made, torch.cat([photos, photos]))
    torch.testing.assert_close(square, (made - photos).square().mean(dim=(1, 2, 3)))


def test_only_the_generator_learns_and_nothing_is_saved(reconstruction) -> None:
    grown = Generator(64, (*CHANNELS, 8), D, D, 2)
    photos = torch.zeros(1, 3, 64, 64)
    sum(reconstruction.distance(reconstruction(grown.synthesis, photos), photos)).backward()
    assert grown.synthesis.blocks[-1].torgb.weight.grad.abs().sum() > 0
    assert not reconstruction.state_dict()
    assert not any(p.requires_grad for p in reconstruction.parameters())


def test_bundle_of_another_generator_is_refused(reconstruction) -> None:
    with pytest.raises(ValueError, match="reconstruction_bundle"):
        reconstruction(Generator(64, (*CHANNELS, 8), D, D + 1, 2).synthesis, torch.zeros(1, 3, 64, 64))
