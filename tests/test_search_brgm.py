"""BRGM's estimate: its terms against the formula, and that it lowers what it minimises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import search.brgm
from data.operator import Downscale, downscaling_error
from models.generator import Generator
from search.brgm import PERCEPTUAL, PIXELS, PRIOR, brgm, cosine_term, cosine_weight

D, SIGMA = 8, 0.5


class PixelDistance(nn.Module):
    """In place of LPIPS."""

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        assert images.shape[-1] >= 16  # what SqueezeNet needs
        return (images,)

    def distance(self, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> Tensor:
        return (a[0] - b[0]).abs().flatten(1).mean(dim=1)


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    return Generator(32, channels=(16, 16, 8, 8), z_dim=D, w_dim=D, mapping_layers=2).eval().requires_grad_(False)


def codes(generator: Generator, seed: int) -> Tensor:
    z = torch.randn(16, D, generator=torch.Generator().manual_seed(seed))
    return generator.mapping(z)[:, 0].view(2, 8, D)


def test_numbers_are_the_published_ones() -> None:
    # 3 layers of 64 … 512 channels at 256, 128, 64, 32 and 16 px: what LPIPS compares on VGG16.
    features = sum(c * side**2 for c, side in ((64, 256), (128, 128), (256, 64), (512, 32), (512, 16)))
    assert PERCEPTUAL == pytest.approx(1e7 / features) and pytest.approx(65.025) == PIXELS and PRIOR == 100
    assert (cosine_weight(1024, 64), cosine_weight(1024, 32), cosine_weight(64, 4)) == (0.1, 1.0, 0.1)


def test_cosine_term() -> None:
    ws = torch.tensor([[[1.0, 0], [0, 3], [2, 0]], [[1, 1], [2, 2], [3, 3]], [[1, 0], [-1, 0], [1, 0]]])
    assert cosine_term(ws).tolist() == pytest.approx([4.0, 0.0, 8.0], abs=1e-5)  # of nine ordered pairs


def test_the_loss_is_the_formula(generator: Generator) -> None:
    ws, mean = codes(generator, 1), torch.randn(D, generator=torch.Generator().manual_seed(2))
    lr = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    problem = brgm(generator.synthesis, PixelDistance(), Downscale(8), mean, SIGMA, ws, weight=0.3).problem
    found, images, residuals = problem.evaluate({"ws": ws}, {}, lr)
    error = downscaling_error(images, lr, Downscale(8))
    perceptual = (Downscale(8)(images) - lr).abs().mean(dim=(1, 2, 3))
    prior = (ws - mean).square().mean(dim=(1, 2)) / (D * SIGMA**2)
    expected = 0.001 * 255**2 * error + PERCEPTUAL * perceptual + 100 * prior + 0.3 * cosine_term(ws)
    assert torch.allclose(problem.loss({"ws": ws}, found, residuals), expected, rtol=1e-4)


def test_the_prior_holds_the_codes(generator: Generator, monkeypatch) -> None:
    lr = Downscale(8)(generator.synthesis(codes(generator, 1)).clamp(-1, 1))
    start = codes(generator, 4).mean(dim=(0, 1)).expand(2, 8, -1)
    parts = generator.synthesis, PixelDistance(), Downscale(8), start[0, 0], SIGMA, start, 0.1
    held = brgm(*parts).run(lr, 15)
    monkeypatch.setattr(search.brgm, "PRIOR", 0.0)
    free = brgm(*parts).run(lr, 15)
    begin = downscaling_error(generator.synthesis(start).clamp(-1, 1), lr, Downscale(8))
    assert (held.residual <= begin + 1e-6).all() and (free.residual < 0.8 * begin).all()
    assert (held.ws - start).norm() < (free.ws - start).norm()
