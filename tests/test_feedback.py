"""Learned feedback: the network, what is scaled around it, and passes that never make a face worse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.operator import Downscale, downscaling_error
from models.adapted import additions
from models.bundle import load_bundle, save_bundle
from models.curvature import Curvature, measure_curvature
from models.encoder import Encoder
from models.feedback import Feedback, on_canvas, take_passes
from models.generator import Generator
from models.latents import LatentStatistics

D = 8


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(3)
    return Generator(32, (16, 12, 8, 8), z_dim=D, w_dim=D, mapping_layers=2).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def encoder(generator) -> Encoder:
    torch.manual_seed(4)
    encoder = Encoder(32, generator.num_ws, D, backbone="test_resnet", width=8, feedback=2, rank=5).eval()
    encoder.latents.fit(generator, samples=2000)
    torch.nn.init.normal_(encoder.feedback.out.weight, std=0.05)
    return encoder.requires_grad_(False)


def faces(count: int, size: int) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(size)) * 2 - 1


@pytest.mark.parametrize("resolution", [32, 64, 256])
@pytest.mark.parametrize("size", [4, 7, 16, 32])
def test_a_correction_has_the_shape_of_codes(resolution, size):
    encoder = Encoder(resolution, 8, D, backbone="test_resnet", width=8, feedback=1).eval()
    ws = torch.randn(2, 8, D)
    assert encoder.correct(faces(2, size), faces(2, resolution), ws).shape == ws.shape


def test_the_correction_scales_with_the_residual():
    """ρ N(r / ρ): a residual of a third asks for a third of the move, but for what ρ itself tells the network."""
    torch.manual_seed(0)
    network = Feedback(32, 6, D).eval()
    torch.nn.init.normal_(network.out.weight)
    with torch.no_grad():
        network.stem.weight[:, -1] = 0  # the plane with log ρ
    lr, images, size, codes = faces(2, 16), faces(2, 32), torch.full((2,), 8.0), torch.randn(2, 6, D)
    residual = 0.2 * torch.randn(2, 3, 16, 16)
    whole = network(lr, residual, images, size, codes)
    torch.testing.assert_close(network(lr, residual / 3, images, size, codes), whole / 3)
    tiny = network(lr, residual * 1e-9, images, size, codes)  # ρ is held at its smallest, and nothing is divided by 0
    assert tiny.isfinite().all()


def test_faces_of_a_batch_do_not_see_each_other(encoder):
    lr, images, ws = faces(3, 8), faces(3, 32), torch.randn(3, encoder.num_ws, D)
    single = [encoder.correct(*(x[i : i + 1] for x in (lr, images, ws))) for i in range(3)]
    torch.testing.assert_close(encoder.correct(lr, images, ws), torch.cat(single), rtol=1e-4, atol=1e-5)


def test_mixed_sizes_on_one_canvas_equal_single_calls(encoder):
    images, ws, canvas = faces(2, 32), torch.randn(2, encoder.num_ws, D), encoder.feedback.canvas
    lrs = [faces(1, 5), faces(1, 12)]
    single = [encoder.correct(lr, images[i : i + 1], ws[i : i + 1]) for i, lr in enumerate(lrs)]
    on = torch.cat([on_canvas(lr, canvas) for lr in lrs])
    missing = [on_canvas(lr - Downscale(lr.shape[3])(images[i : i + 1]), canvas) for i, lr in enumerate(lrs)]
    together = encoder.correct_on_canvas(on, torch.cat(missing), images, torch.tensor([5, 12]), ws)
    torch.testing.assert_close(together, torch.cat(single), rtol=1e-4, atol=1e-5)


def test_additions_are_for_small_faces_alone():
    torch.manual_seed(0)
    plain, made = Feedback(64, 6, D), Feedback(64, 6, D, small_rank=2)
    for weight in additions(made):
        torch.nn.init.normal_(weight, std=0.03)
    assert not made.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    size = torch.tensor([64.0, 16.0, 12.0, 8.0, 4.0])
    inputs = faces(5, 32), 0.1 * torch.randn(5, 3, 32, 32), faces(5, 64), size, torch.randn(5, 6, D)
    with torch.no_grad():
        before, after = plain(*inputs), made(*inputs)
        torch.testing.assert_close(after[:2], before[:2])
        assert torch.equal(made(*(x[:2] for x in inputs)), plain(*(x[:2] for x in inputs)))
        changes = (after - before).square().mean(dim=(1, 2))
        assert 0 < changes[2] < changes[3]
        single = torch.cat([made(*(x[i : i + 1] for x in inputs)) for i in range(5)])
    torch.testing.assert_close(after, single, rtol=1e-4, atol=1e-5)


def test_an_encoder_without_feedback_says_so():
    with pytest.raises(ValueError, match="feedback"):
        Encoder(32, 8, D, backbone="test_resnet", width=8).correct(faces(1, 8), faces(1, 32), torch.zeros(1, 8, D))


@pytest.mark.parametrize("passes", [0, 1, 4])
def test_passes_never_make_a_face_worse(encoder, generator, passes):
    """The network is not trained, so most of its corrections do harm."""
    lr, ws = faces(6, 8), generator.mapping(torch.randn(6, D, generator=torch.Generator().manual_seed(1))).clone()
    drawn: list[int] = []

    def synthesis(codes):
        drawn.append(len(codes))
        return generator.synthesis(codes)

    found, images = take_passes(encoder.correct, synthesis, lr, ws, passes)
    assert drawn == [6] * (passes + 1)
    torch.testing.assert_close(images, generator.synthesis(found), rtol=0, atol=1e-5)
    before, after = (
        downscaling_error(generator.synthesis(codes).clamp(-1, 1), lr, Downscale(8)) for codes in (ws, found)
    )
    assert (after <= before + 1e-7).all()
    if passes == 0:
        assert torch.equal(found, ws)


def test_a_step_that_does_harm_is_taken_back_and_halved():
    """In one dimension, x = w: corrections that overshoot threefold still arrive, each half the last."""

    def synthesis(ws):
        return ws.mean(dim=(1, 2))[:, None, None, None].expand(-1, 3, 32, 32)

    def correct(lr, images, ws):
        return ws + 3 * (lr.mean() - ws.mean(dim=(1, 2), keepdim=True))

    lr, ws = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 4, D)
    assert torch.equal(take_passes(correct, synthesis, lr, ws, 1).ws, ws)  # 1.5 is clamped to 1, as bad as 0
    second = take_passes(correct, synthesis, lr, ws, 2).ws
    torch.testing.assert_close(second, torch.full_like(ws, 0.75))


def test_coordinates_are_those_of_the_measured_curvature(generator):
    """σ P x against the dense matrix, from the eigenvectors of the mean of JᵀJ that autograd gives."""
    ws = generator.mapping(torch.randn(4, D, generator=torch.Generator().manual_seed(2))).clone()
    operator, n = Downscale(4), ws[0].numel()
    jacobians = [torch.func.jacrev(lambda c: operator(generator.synthesis(c[None])).flatten())(w) for w in ws]
    mean = torch.stack([(j.flatten(1).T @ j.flatten(1)) for j in jacobians]).mean(dim=0)
    eigenvalues, vectors = torch.linalg.eigh(mean)
    dense = vectors @ torch.diag((1e-3 / (eigenvalues / eigenvalues.max() + 1e-3)).sqrt()) @ vectors.T
    found = measure_curvature(generator.synthesis, ws, [operator], probes=2000, rank=n)
    x = torch.randn(3, *ws.shape[1:], generator=torch.Generator().manual_seed(3))
    latents = LatentStatistics(D, generator.num_ws, rank=n)
    latents.set_curvature(found)
    latents.sigma.fill_(2.0)
    expected = 2 * (x.flatten(1) @ dense).view_as(x)
    torch.testing.assert_close(latents.unscale(x), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


def test_room_for_more_directions_than_there_are(generator):
    latents = LatentStatistics(D, 2, rank=6)
    latents.set_curvature(Curvature(torch.eye(2 * D)[:, :3], torch.tensor([0.1, 0.2, 0.5])))
    x = torch.ones(1, 2, D)
    assert latents.unscale(x).flatten().tolist()[:5] == pytest.approx([0.1, 0.2, 0.5, 1, 1])


def test_a_bundle_takes_the_passes_that_it_is_asked_for(generator, encoder, tmp_path):
    encoder.latents.set_curvature(Curvature(torch.zeros(encoder.num_ws * D, 1), torch.ones(1)))
    torch.nn.init.normal_(encoder.feedback.out.weight, std=1e-3)  # small steps: some do good
    save_bundle(tmp_path / "b", generator, encoder, {"name": "t", "licence": "l", "training_data": "d"})
    bundle, lr = load_bundle(tmp_path / "b"), faces(8, 8)
    none, two, default = (bundle.encode(lr, 2, np.random.default_rng(0), passes=passes) for passes in (0, 2, None))
    assert torch.equal(two, default) and not torch.equal(none, default)

    def error(ws):
        return downscaling_error(
            bundle.generate(ws).flatten(0, 1).clamp(-1, 1), lr.repeat_interleave(2, 0), Downscale(8)
        )

    assert (error(two) <= error(none) + 1e-7).all()
