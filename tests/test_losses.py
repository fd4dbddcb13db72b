"""The losses, each against a closed form, autograd, or the package it reimplements."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from losses.adversarial import discriminator_loss, generator_loss, hinge_loss, r1_penalty
from losses.face_parts import FaceParts
from losses.feature_means import FeatureMeans
from losses.identity import identity_loss
from losses.latent import mean_latent_distance
from losses.path_length import path_lengths
from losses.perceptual import LPIPS, TRUNK
from models.pretrained import weight_folders

TRUNK_FOLDER = next((folder for folder in weight_folders() if (folder / TRUNK).is_file()), None)
needs_trunk = pytest.mark.skipif(TRUNK_FOLDER is None, reason=f"{TRUNK} is not on this machine")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- adversarial ---


def test_generator_loss_is_minus_log_sigmoid() -> None:
    logits = torch.tensor([-3.0, 0.0, 2.0])
    torch.testing.assert_close(generator_loss(logits), -torch.log(torch.sigmoid(logits)))


def test_discriminator_loss_is_cross_entropy() -> None:
    real, fake = torch.tensor([-1.0, 0.0, 4.0]), torch.tensor([2.0, 0.0, -4.0])
    expected = -torch.log(torch.sigmoid(real)) - torch.log(1.0 - torch.sigmoid(fake))
    torch.testing.assert_close(discriminator_loss(real, fake), expected)


def test_hinge_asks_for_a_margin_and_no_more() -> None:
    assert hinge_loss(torch.zeros(4), torch.zeros(4, 2)) == 2.0
    assert hinge_loss(torch.tensor([1.0, 7.0]), torch.tensor([-1.0, -3.0])) == 0.0
    assert hinge_loss(torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 1.0])) == 1.0 + 1.5


def test_discriminator_loss_refuses_to_broadcast() -> None:
    with pytest.raises(ValueError, match="one shape"):
        discriminator_loss(torch.zeros(4, 1), torch.zeros(4))


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_r1_of_a_quadratic_discriminator(grad_enabled: bool) -> None:
    a = torch.randn(3, 4, 4, generator=rng(), requires_grad=True)
    b = torch.tensor(0.7, requires_grad=True)
    x = torch.randn(5, 3, 4, 4, generator=rng(1))

    def discriminator(images: Tensor) -> Tensor:
        return (a * images + 0.5 * b * images.square()).sum(dim=(1, 2, 3)).unsqueeze(1)

    with torch.set_grad_enabled(grad_enabled):
        logits, penalty = r1_penalty(discriminator, x)
    expected = (a + b * x).square().sum(dim=(1, 2, 3))
    torch.testing.assert_close(logits, discriminator(x))
    torch.testing.assert_close(penalty, expected)
    ours = torch.autograd.grad(penalty.sum(), (a, b))
    torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), (a, b)))
    assert not x.requires_grad


# --- path length ---


def linear_generator(matrix: Tensor, ws: Tensor) -> Tensor:
    """Draws images (B, 3, 8, 4), linear in each layer's style; matrix (3·8·4, L, D)."""
    return torch.einsum("pld,bld->bp", matrix, ws).view(-1, 3, 8, 4)


def test_path_lengths_of_a_linear_generator() -> None:
    matrix = torch.randn(96, 6, 5, generator=rng(), requires_grad=True)
    ws = torch.randn(4, 6, 5, generator=rng(1), requires_grad=True)
    lengths = path_lengths(linear_generator(matrix, ws), ws, torch.randn(4, 3, 8, 4, generator=rng(2)))

    y = torch.randn(4, 3, 8, 4, generator=rng(2)).view(4, 96) / math.sqrt(8 * 4)
    expected = torch.einsum("pld,bp->bld", matrix, y).square().sum(dim=2).mean(dim=1).sqrt()
    torch.testing.assert_close(lengths, expected)
    (ours,) = torch.autograd.grad((lengths - 1.0).square().sum(), matrix)
    torch.testing.assert_close(ours, torch.autograd.grad((expected - 1.0).square().sum(), matrix)[0])


def test_path_lengths_need_the_codes_gradient() -> None:
    ws = torch.randn(2, 6, 5)
    with pytest.raises(ValueError, match="require a gradient"):
        path_lengths(torch.zeros(2, 3, 8, 4), ws, torch.zeros(2, 3, 8, 4))


# --- identity, latent ---


@pytest.mark.parametrize(("degrees", "expected"), [(0.0, 0.0), (60.0, 0.5), (90.0, 1.0), (180.0, 2.0)])
def test_identity_loss_by_angle(degrees: float, expected: float) -> None:
    angle = math.radians(degrees)
    a = torch.tensor([[2.0, 0.0]])
    b = 3.0 * torch.tensor([[math.cos(angle), math.sin(angle)]])
    torch.testing.assert_close(identity_loss(a, b), torch.tensor([expected]))


@pytest.mark.parametrize("per_layer", [False, True])
def test_mean_latent_distance_by_hand(per_layer: bool) -> None:
    w_avg = torch.randn(4, 2, generator=rng()) if per_layer else torch.randn(2, generator=rng())
    offsets = torch.zeros(2, 4, 2)
    offsets[1, 0] = torch.tensor([3.0, 4.0])  # norm 5
    offsets[1, 2] = torch.tensor([0.0, -1.0])
    expected = torch.tensor([0.0, (5.0 + 1.0) / 4.0])
    torch.testing.assert_close(mean_latent_distance(w_avg + offsets, w_avg), expected, atol=1e-6, rtol=1e-6)


# --- perceptual ---


@pytest.fixture(scope="module")
def ours() -> LPIPS:
    return LPIPS()


@needs_trunk
@pytest.mark.parametrize("size", [(32, 32), (64, 48)])
def test_lpips_equals_the_package(ours: LPIPS, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("lpips")
    assert isinstance(TRUNK_FOLDER, Path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(TRUNK_FOLDER.parent))
    if TRUNK_FOLDER.name != "checkpoints":
        pytest.skip("the package lpips finds its weights only in torch.hub's folders")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = package.LPIPS(net="squeeze", verbose=False)
    a = torch.rand(3, 3, *size, generator=rng()) * 2 - 1
    b = (a + 0.3 * torch.randn(a.shape, generator=rng(1))).requires_grad_(True)
    expected = theirs(a, b).flatten()
    distances = ours(a, b)
    torch.testing.assert_close(distances, expected, atol=1e-5, rtol=1e-4)
    (gradient,) = torch.autograd.grad(distances.sum(), b)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), b)[0], atol=1e-5, rtol=1e-3)


@needs_trunk
def test_lpips_of_equal_images_is_zero(ours: LPIPS) -> None:
    a = torch.rand(2, 3, 32, 32, generator=rng()) * 2 - 1
    distances = ours(torch.stack([a[0], a[0]]), torch.stack([a[0], a[1]]))
    assert distances[0] == 0.0
    assert distances[1] > 0.01


@needs_trunk
def test_lpips_gradient_is_finite_without_active_channels(ours: LPIPS) -> None:
    # With a large bias against it, no channel of the first layer is active anywhere.
    dead = copy.deepcopy(ours)
    dead.trunk[0].bias.fill_(-100.0)
    image = torch.zeros(1, 3, 32, 32, requires_grad=True)
    target = torch.rand(1, 3, 32, 32, generator=rng())
    (gradient,) = torch.autograd.grad(dead.distance(dead.features(image), ours.features(target)).sum(), image)
    assert torch.isfinite(gradient).all()


@needs_trunk
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 8, 8)])
def test_lpips_refuses_other_shapes(ours: LPIPS, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="Expected images"):
        ours.features(torch.zeros(shape))


@needs_trunk
def test_lpips_is_quiet_and_draws_no_random_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LPIPS()
    assert capsys.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), state)


def test_lpips_without_weights_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.pretrained.ROOT", tmp_path / "repository")
    monkeypatch.setattr("losses.perceptual.TRUNK_URL", (tmp_path / "absent.pth").as_uri())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("AMORTIZED_PULSE_WEIGHTS", raising=False)
    with pytest.raises(FileNotFoundError, match=f"Put the file at {tmp_path / 'checkpoints' / TRUNK}"):
        LPIPS()


def pictures(count: int, wanted: Sequence[float]) -> tuple[list[Tensor], list[Tensor]]:
    """Features of pictures and of their truths, two maps, which differ by `wanted` in the mean, and much by chance."""
    truth = [torch.randn(count, 2, 2, 2), torch.randn(count, 1, 1, 1)]
    apart = torch.tensor(wanted)[:, None, None] + torch.randn(count, 3, 1, 1)
    return [truth[0] + apart[:, :2], truth[1] + apart[:, 2:]], truth


def test_feature_means_are_those_of_each_group() -> None:
    """Groups whose features differ from the truth's by a known mean: the loss averages to its square."""
    torch.manual_seed(0)
    wanted = {0: (0.3, -0.1, 0.2), 2: (-0.5, 0.0, 0.4)}
    losses, estimates = FeatureMeans(3, 3, halflife=400), []
    for i in range(4000):
        (drawn, truth), (others, theirs) = (pictures(4, mean) for mean in wanted.values())
        both = [[torch.cat(pair) for pair in zip(*parts, strict=True)] for parts in ((drawn, others), (truth, theirs))]
        estimates.append(losses(*both, torch.tensor([0] * 4 + [2] * 4)))
        assert i or estimates[0] == 0  # nothing is known before the first batch
    squares = [sum(x * x for x in mean) for mean in wanted.values()]
    assert float(torch.stack(estimates[500:]).mean()) == pytest.approx(sum(squares) / 2, abs=0.02)
    torch.testing.assert_close(losses.means[[0, 2]], torch.tensor(list(wanted.values())), atol=0.12, rtol=0)
    assert losses.seen.tolist() == [16000, 0, 16000] and not losses.means[1].any()


def test_feature_means_of_mere_chance_are_zero() -> None:
    """Few pictures, many features, a short memory: the running means are mostly chance, the loss is not."""
    torch.manual_seed(0)
    losses, group = FeatureMeans(1, 50, halflife=20), torch.zeros(4, dtype=torch.long)
    apart = [torch.randn(4, 50, 1, 1) for _ in range(2000)]
    estimates = torch.stack([losses([a], [torch.zeros_like(a)], group) for a in apart])
    assert losses.means.square().sum() > 0.4
    assert float(estimates.mean()) == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize("enabled", [False, True])
def test_feature_means_forget_half_in_a_halflife(enabled: bool) -> None:
    losses, group = FeatureMeans(1, 1, halflife=40), torch.zeros(4, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):  # which would round 1.001 to 1
        for value, batches in ((1.001, 200), (3.001, 10)):
            for _ in range(batches):
                losses([torch.full((4, 1, 1, 1), value)], [torch.zeros(4, 1, 1, 1)], group)
    assert float(losses.means) == pytest.approx(2.001, abs=1e-4)


def test_feature_means_pull_a_batch_towards_the_truth() -> None:
    torch.manual_seed(0)
    losses, group = FeatureMeans(1, 3), torch.zeros(8, dtype=torch.long)
    drawn, truth = pictures(8, (0.5, 0.0, 0.0))
    losses(drawn, truth, group)
    mean = losses.means[0].clone()
    torch.testing.assert_close(
        mean, torch.cat([(a - b).mean(dim=(0, 2, 3)) for a, b in zip(drawn, truth, strict=True)])
    )
    drawn, truth = pictures(8, (0.5, 0.0, 0.0))
    leaf = drawn[0].requires_grad_()
    losses([leaf, drawn[1]], truth, group).backward()
    torch.testing.assert_close(leaf.grad, (2 * mean[:2] / 8 / 4)[None, :, None, None].expand_as(leaf))


# --- face parts ---


@pytest.fixture(scope="module")
def faces_for_parts() -> Tensor:
    return torch.rand(16, 3, 64, 64, generator=rng()) * 2 - 1


def test_face_parts_spread_over_photos_as_they_are_told(faces_for_parts: Tensor) -> None:
    parts = FaceParts()
    parts.calibrate(faces_for_parts)
    features = parts(faces_for_parts)
    assert features.shape == (len(faces_for_parts), parts.width, 1, 1)
    torch.testing.assert_close(features.std(dim=0).flatten().median() * parts.width**0.5, torch.tensor(1.0))
    assert not parts.state_dict() and not any(p.requires_grad for p in parts.parameters())


def test_face_parts_are_what_the_detector_sees(faces_for_parts: Tensor) -> None:
    """The features of the first level, by hand, of faces that need no resizing."""
    from facenet_pytorch.models.mtcnn import ONet

    network, faces = ONet(), torch.nn.functional.interpolate(faces_for_parts[:4], size=48, mode="bilinear")
    with torch.no_grad():
        first = network.prelu1(network.conv1(faces)).mean(dim=(2, 3))
    parts = FaceParts()
    torch.testing.assert_close(parts(faces)[:, :32, 0, 0] * parts.width**0.5, first)
