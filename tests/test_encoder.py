"""The encoder, its latent statistics, its candidates, and the batches it learns from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from training.spread import calibrate_spread

from data.operator import Downscale, downscaling_error
from models.encoder import Encoder, create_encoder
from models.generator import Generator
from models.latents import LatentStatistics, gaussianize, ungaussianize
from training.batches import downscale_groups, faces_from_bytes, lr_sizes_of, random_sizes

D = 16


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(3)
    return Generator(32, (16, 12, 8, 8), z_dim=D, w_dim=D, mapping_layers=2).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def encoder(generator) -> Encoder:
    torch.manual_seed(4)
    encoder = Encoder(32, generator.num_ws, D, width=16).eval()
    encoder.latents.fit(generator, samples=2000)
    return encoder


@pytest.mark.parametrize("resolution", [32, 64, 256])
@pytest.mark.parametrize("size", [4, 5, 16, 31, 32])
def test_shapes(resolution, size):
    encoder = create_encoder(resolution, w_dim=D).eval()
    ws = encoder(torch.rand(2, 3, size, size) * 2 - 1, k=3)
    assert ws.shape == (2, 3, 2 * int(math.log2(resolution)) - 2, D)


def test_best_guess_comes_first_and_needs_no_randomness(encoder):
    lr = torch.rand(3, 3, 8, 8) * 2 - 1
    best = encoder(lr)
    assert torch.equal(best, encoder(lr, rng=np.random.default_rng(5)))
    assert torch.equal(best[:, 0], encoder(lr, k=4)[:, 0])


def test_candidates_follow_the_seed(encoder):
    lr = torch.rand(2, 3, 8, 8) * 2 - 1
    encoder.spread.fill_(0.5)
    one, same, other = (encoder(lr, 4, np.random.default_rng(s)) for s in (1, 1, 2))
    encoder.spread.zero_()
    assert torch.equal(one, same)
    assert not torch.equal(one[:, 1:], other[:, 1:])
    assert len({tuple(ws.flatten().tolist()) for ws in one[0]}) == 4


def test_faces_of_a_batch_do_not_see_each_other(encoder):
    lr = torch.rand(3, 3, 11, 11) * 2 - 1
    single = torch.cat([encoder(face[None]) for face in lr])
    torch.testing.assert_close(encoder(lr), single, rtol=1e-4, atol=1e-5)


def test_mixed_sizes_on_one_canvas_equal_single_calls(encoder):
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    groups = downscale_groups(images, [4, 9])
    canvas = torch.cat([encoder.on_canvas(group.faces) for group in groups])
    together = encoder.best_guess(canvas, lr_sizes_of(groups))
    single = torch.cat([encoder(group.faces)[:, 0] for group in groups])
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-5)


def test_the_size_is_known_to_the_network(encoder):
    grey = [encoder(torch.zeros(1, 3, size, size)) for size in (4, 16)]
    assert not torch.allclose(grey[0], grey[1])


@pytest.mark.parametrize(
    ("shape", "k", "words"),
    [((1, 3, 3, 3), 1, "4 to 32"), ((1, 3, 33, 33), 1, "4 to 32"), ((1, 3, 8, 9), 1, "square"),
     ((1, 1, 8, 8), 1, "square"), ((1, 3, 8, 8), 0, "k ≥ 1")],
)  # fmt: skip
def test_refusals(encoder, shape, k, words):
    with pytest.raises(ValueError, match=words):
        encoder(torch.zeros(shape), k)


def test_unknown_variant():
    with pytest.raises(ValueError, match="base"):
        create_encoder(64, variant="other")


def test_gaussianize_inverts():
    v = torch.linspace(-3, 3, 13)
    torch.testing.assert_close(ungaussianize(gaussianize(v)), v)
    assert gaussianize(torch.tensor(-1.0)) == -5


def test_statistics_describe_the_generator(generator):
    """Samples of the fitted Gaussian have the mean and the covariance of fresh mapped codes."""
    latents = LatentStatistics(D)
    latents.fit(generator, samples=20_000)
    rng = torch.Generator().manual_seed(6)
    w = generator.mapping(torch.randn(20_000, D, generator=rng))[:, 0]
    drawn = latents.sample(torch.randn(20_000, D, generator=rng))
    spread = w.std(dim=0)
    assert ((latents.w_avg - w.mean(dim=0)).abs() / spread).max() < 0.05
    torch.testing.assert_close(torch.cov(gaussianize(drawn).T), torch.cov(gaussianize(w).T), rtol=0.15, atol=0.05)


@pytest.mark.parametrize("size", [4, 6, 8, 23, 32])
def test_spread_is_interpolated_between_octaves(encoder, size):
    encoder.spread.copy_(torch.arange(4.0)[:, None].expand(-1, encoder.num_ws))
    found = encoder.spread_at(size)
    encoder.spread.zero_()
    torch.testing.assert_close(found, torch.full_like(found, math.log2(size) - 2))


def test_calibrated_spread_keeps_to_the_budget(encoder, generator):
    faces = generator(torch.randn(8, D, generator=torch.Generator().manual_seed(7))).clamp(-1, 1)
    calibrate_spread(encoder, generator, faces, budget=1.5, limit=1.0)
    spread = encoder.spread.clone()
    assert (spread >= 0).all() and (spread <= 1).all() and (spread[1:].amax(dim=1) > 0).all()
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((8, 1, D), dtype=np.float32))
    for row, size in enumerate((4, 8, 16, 32)):
        operator = Downscale(size)
        lr = operator(faces)
        ws = encoder.candidates(encoder.on_canvas(lr), torch.full((8,), size), noise, spread[row])
        errors = [downscaling_error(generator.synthesis(ws[:, i]).clamp(-1, 1), lr, operator).mean() for i in (0, 1)]
        assert errors[1] <= 1.5 * errors[0] * 1.001
    encoder.spread.fill_(2.0)
    calibrate_spread(encoder, generator, faces, budget=1.5, limit=1.0, below=8)
    assert torch.equal(encoder.spread[0], spread[0]) and (encoder.spread[1:] == 2).all()
    encoder.spread.zero_()


def test_bytes_become_images():
    batch = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(64, 3, 16, 16)
    plain = faces_from_bytes(batch)
    assert plain.min() == -1 and plain.max() == 1
    mirrored = faces_from_bytes(batch, torch.Generator().manual_seed(0))
    kinds = [torch.equal(a, b) or (torch.equal(a, b.flip(2)) and None) for a, b in zip(mirrored, plain, strict=True)]
    assert set(kinds) == {True, None}  # each is as it was or mirrored, and both occur


def test_random_sizes():
    rng = torch.Generator().manual_seed(0)
    sizes = random_sizes(4000, 4, 64, [8, 16], 0.5, rng)
    assert min(sizes) == 4 and max(sizes) == 64
    assert 0.5 < np.mean([s in (8, 16) for s in sizes]) < 0.65
    octaves = np.histogram(np.log2(random_sizes(4000, 4, 64, [], 0.5, rng)), bins=[1.5, 3, 4, 5, 6.1])[0] / 4000
    assert octaves.min() > 0.15


def test_groups_are_what_a_saved_picture_would_be():
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    groups = downscale_groups(images, [8, 5])
    assert [g.rows for g in groups] == [slice(0, 3), slice(3, 5)]
    for group in groups:
        bytes_ = (group.faces + 1) * 127.5
        torch.testing.assert_close(bytes_, bytes_.round(), rtol=0, atol=1e-4)
        assert (group.faces - group.operator(images[group.rows])).abs().max() <= 1 / 255 + 1e-6
    assert lr_sizes_of(groups).tolist() == [8, 8, 8, 5, 5]


def test_faces_larger_than_the_canvas_are_shrunk():
    encoder = Encoder(64, 10, D, width=16, canvas=32).eval()
    assert encoder(torch.zeros(1, 3, 50, 50)).shape == (1, 1, 10, D)
    assert encoder.on_canvas(torch.ones(1, 3, 50, 50)).shape == (1, 3, 32, 32)


@pytest.mark.parametrize(("resolution", "canvas"), [(48, None), (16, None), (64, 40)])
def test_odd_canvases_are_refused(resolution, canvas):
    with pytest.raises(ValueError, match="power of two"):
        Encoder(resolution, 8, D, canvas=canvas)
