"""The stochastic encoder, its noise, the deterministic ones beside it, and the batches they learn from."""

from __future__ import annotations

import math

import pytest
import torch

from data.operator import Downscale
from models.bundle import make_encoder
from models.encoder import Encoder
from models.encoder_base import EncoderBase, Encoding, face_noise
from models.generator import Generator
from models.latents import LatentStatistics, gaussianize, ungaussianize
from training.batches import BatchRandom, deal_sizes, downscale_groups, faces_from_bytes, lr_sizes_of, random_sizes

D = 16
CHANNELS = (16, 12, 8, 8)


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(3)
    return Generator(32, CHANNELS, z_dim=D, w_dim=D, mapping_layers=2).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=["amortized", "psp", "propulse"])
def encoder(request, generator) -> EncoderBase:
    torch.manual_seed(4)
    config = {"variant": request.param, "resolution": 32, "num_ws": generator.num_ws, "w_dim": D}
    more = {
        "amortized": {"channels": CHANNELS, "width": 16, "hidden": 32, "head_rank": 8},
        "psp": {"widths": [16] * 5},
        "propulse": {"width": 16},
    }
    encoder = make_encoder(config | more[request.param]).eval().requires_grad_(False)
    encoder.latents.fit(generator, samples=2000)
    for name, parameter in encoder.named_parameters():
        if name.startswith("details") and name.endswith("out.weight"):  # zero before training
            torch.nn.init.normal_(parameter, std=0.1)
    return encoder


def faces(batch: int, size: int) -> torch.Tensor:
    bytes_ = torch.randint(0, 256, (batch, 3, size, size), generator=torch.Generator().manual_seed(size))
    return bytes_ / 127.5 - 1


def encode(encoder: EncoderBase, lr: torch.Tensor, k: int, seed: int = 0) -> Encoding:
    return encoder(lr, face_noise(lr, k, encoder.noise_dim, seed))


@pytest.mark.parametrize("size", [4, 5, 16, 31, 32])
def test_shapes(encoder, generator, size):
    ws, details = encode(encoder, faces(2, size), 3)
    assert ws.shape == (2, 3, generator.num_ws, D)
    assert all(d.shape[:2] == (2, 3) and d.shape[3:] == (r, r) for r, d in details.items())
    images = generator.synthesis(ws.flatten(0, 1), details={r: d.flatten(0, 1) for r, d in details.items()})
    assert images.shape == (6, 3, 32, 32)


def test_the_point_estimate_comes_first_and_needs_no_noise(encoder):
    lr = faces(3, 8)
    point = encoder(lr)
    for k, seed in ((1, 5), (4, 0)):
        ws, details = encode(encoder, lr, k, seed)
        torch.testing.assert_close(ws[:, :1], point.ws)
        assert all(torch.allclose(details[r][:, :1], d, atol=1e-5) for r, d in point.details.items())


def test_samples_differ_from_each_other_and_follow_the_seed(encoder):
    lr = faces(2, 8)
    one, same, other = (encode(encoder, lr, 4, seed).ws for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one[:, 1:], other[:, 1:])
    assert torch.cdist(one[0].flatten(1), one[0].flatten(1))[~torch.eye(4, dtype=bool)].min() > 1e-4


def test_noise_at_one_place_changes_the_details_around_it_alone(generator):
    torch.manual_seed(0)
    encoder = Encoder(32, generator.num_ws, D, CHANNELS, width=8, hidden=16).eval()
    for head in encoder.details:
        torch.nn.init.normal_(head.out.weight)
    noise = torch.zeros(1, 2, encoder.noise_dim)
    noise[0, 1, encoder.noise_widths[0] + 3 * 8 + 2] = 1  # row 3, column 2 of the first plane of 8 px
    ws, details = encoder(faces(1, 8), noise)
    moved = (details[8][0, 1] - details[8][0, 0]).abs().amax(dim=0)
    assert torch.equal(ws[0, 0], ws[0, 1]) and torch.equal(details[16][0, 0], details[16][0, 1])
    assert moved[1:6, 0:5].min() > 0 and moved.count_nonzero() == 25


def test_samples_depend_on_neither_batch_nor_k(encoder):
    lr = faces(3, 11)
    alone = torch.cat([encode(encoder, face[None], 2).ws for face in lr])
    torch.testing.assert_close(encode(encoder, lr, 4).ws[:, :2], alone, rtol=1e-4, atol=1e-5)


def test_mixed_sizes_on_one_canvas_equal_single_calls(encoder):
    images = faces(4, 32)
    groups = downscale_groups(images, [4, 9])
    canvas = torch.cat([encoder.on_canvas(group.faces) for group in groups])
    sizes = lr_sizes_of(groups)
    together = encoder.point(encoder.read(canvas, sizes, torch.zeros(4)))
    features = [encoder.read(encoder.on_canvas(g.faces), lr_sizes_of([g]), torch.zeros(2)) for g in groups]
    torch.testing.assert_close(together, torch.cat([encoder.point(f) for f in features]), rtol=1e-4, atol=1e-5)


def test_size_and_noise_are_known_to_the_network(generator):
    torch.manual_seed(0)
    encoder = Encoder(32, generator.num_ws, D, CHANNELS, width=8, hidden=16, head_rank=0).eval()
    grey = torch.zeros(1, 3, 16, 16)
    assert not torch.allclose(encoder(torch.zeros(1, 3, 4, 4)).ws, encoder(grey).ws)
    assert not torch.allclose(encoder(grey, sigma=torch.tensor([25.0])).ws, encoder(grey).ws)


def test_the_noise_estimator_learns_to_tell_noise(generator):
    torch.manual_seed(0)
    estimator = Encoder(32, generator.num_ws, D, CHANNELS, width=8, hidden=16).noise_estimator
    adam = torch.optim.Adam(estimator.parameters(), 3e-3)
    octave, truth = torch.zeros(32), torch.linspace(0, 50, 32)
    for _ in range(150):
        lr = truth[:, None, None, None] / 127.5 * torch.randn(32, 3, 16, 16)
        loss = (estimator(lr, octave) - (1 + truth).log()).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    guessed = estimator(truth[:, None, None, None] / 127.5 * torch.randn(32, 3, 16, 16), octave).expm1()
    assert (guessed - truth).abs().mean() < 5


@pytest.mark.parametrize(
    "lr",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(1, 1, 8, 8),
        torch.zeros(1, 3, 8, 9),
        torch.zeros(1, 3, 3, 3),
        torch.zeros(1, 3, 33, 33),
    ],
)
def test_refuses_other_shapes(encoder, lr):
    with pytest.raises(ValueError, match="Expected"):
        encoder(lr)


@pytest.mark.parametrize("arguments", [{"resolution": 48}, {"canvas": 16}, {"variant": "e4e"}, {"feedback": 4}])
def test_refuses_other_settings(arguments):
    with pytest.raises(ValueError, match="Expected"):
        make_encoder({"resolution": 32, "num_ws": 8, "w_dim": D, "channels": CHANNELS} | arguments)


def test_the_noise_of_a_face_is_frozen():
    """A seed means the same samples on every machine and in every release."""
    noise = face_noise(torch.zeros(1, 3, 4, 4), 3, 4, seed=7)
    assert torch.equal(noise[0, 0], torch.zeros(4))
    samples = face_noise(faces(64, 4), 65, 32, seed=1)[:, 1:]
    assert abs(float(samples.mean())) < 0.01 and abs(float(samples.std()) - 1) < 0.01


# ---------------------------------------------------------------- latent statistics


def test_gaussianize_is_undone():
    w = torch.randn(5, D)
    torch.testing.assert_close(ungaussianize(gaussianize(w)), w)


def test_latent_statistics_sample_like_the_generator(generator):
    latents = LatentStatistics(D)
    latents.fit(generator, samples=20_000)
    ours = latents.sample(torch.randn(20_000, D))
    theirs = generator.mapping(torch.randn(20_000, D))[:, 0]
    torch.testing.assert_close(ours.mean(dim=0), theirs.mean(dim=0), atol=0.1, rtol=0)


# ---------------------------------------------------------------- batches


def test_bytes_become_mirrored_faces():
    batch = torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8)
    plain = faces_from_bytes(batch)
    mirrored = faces_from_bytes(batch, BatchRandom(torch.Generator().manual_seed(0)))
    flipped = [torch.equal(m, p.flip(2)) for m, p in zip(mirrored, plain, strict=True)]
    assert 16 < sum(flipped) < 48
    assert all(f or torch.equal(m, p) for f, m, p in zip(flipped, mirrored, plain, strict=True))


def test_random_sizes_are_uniform_in_their_logarithm():
    sizes = torch.tensor(random_sizes(4000, 4, 64, (), 0.0, torch.Generator().manual_seed(0)))
    assert sizes.min() == 4 and sizes.max() == 64
    assert abs(float((sizes < 16).float().mean()) - math.log(15.5 / 3.5) / math.log(64.5 / 3.5)) < 0.03
    often = random_sizes(1000, 4, 64, (16, 8), 1.0, torch.Generator().manual_seed(0))
    assert set(often) == {8, 16}


def test_groups_cover_the_batch_on_the_8_bit_grid():
    images = faces(5, 32)
    groups = downscale_groups(images, [8, 16])
    assert [g.rows for g in groups] == [slice(0, 3), slice(3, 5)]
    grid = (groups[0].faces + 1) * 127.5
    torch.testing.assert_close(grid, grid.round())
    assert (groups[0].faces - Downscale(8)(images[:3]).clamp(-1, 1)).abs().max() <= 0.5 / 127.5 + 1e-6


@pytest.mark.parametrize(("world", "parts"), [(1, 1), (2, 1), (1, 8), (2, 2)])
def test_a_step_is_the_same_in_any_number_of_processes_and_micro_batches(world, parts):
    count, sizes = 8 // (world * parts), [4, 8, 16, 32]
    numbers, dealt = torch.zeros(8), [0] * 8
    for part in range(parts):
        for rank in range(world):
            random = BatchRandom(torch.Generator().manual_seed(0), rank, world, part, parts)
            places = random.positions(count)
            numbers[places] = random.rand(count)
            for place, size in zip(places, deal_sizes(sizes, count, random), strict=True):
                dealt[place] = size
    assert torch.equal(numbers, torch.rand(8, generator=torch.Generator().manual_seed(0)))
    assert dealt == [4, 4, 8, 8, 16, 16, 32, 32]
