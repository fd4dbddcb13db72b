"""The losses, each against a closed form, autograd, or the package it reimplements."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from losses.adversarial import discriminator_loss, generator_loss, hinge_loss, r1_penalty
from losses.identity import identity_loss
from losses.latent import mean_latent_distance
from losses.path_length import path_lengths
from losses.perceptual import LPIPS, TRUNK, TRUNKS
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


@pytest.mark.parametrize("net", TRUNKS)
def test_lpips_on_every_trunk_equals_the_package_with_random_weights(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("lpips")
    torch.manual_seed(0)
    with torch.device("meta"):
        trunk = TRUNKS[net].build().features
    trunk = trunk.to_empty(device="cpu")
    for parameter in trunk.parameters():
        fan = parameter[0].numel() if parameter.ndim > 1 else 100
        parameter.data.normal_(std=(2 / fan) ** 0.5)
    networks = {
        name: lambda pretrained: SimpleNamespace(features=trunk) for name in ("squeezenet1_1", "alexnet", "vgg16")
    }
    monkeypatch.setattr("lpips.pretrained_networks.tv", SimpleNamespace(**networks))
    monkeypatch.setattr("losses.perceptual._load_tensors", lambda net: copy.deepcopy(trunk).state_dict())
    theirs, ours = package.LPIPS(net=net, verbose=False), LPIPS(net)
    a, b = torch.rand(2, 2, 3, 48, 40, generator=rng()) * 2 - 1
    torch.testing.assert_close(ours(a, b), theirs(a, b).flatten(), atol=1e-5, rtol=1e-4)
    assert ours.width == sum(theirs.chns)


def test_lpips_on_an_unknown_trunk_is_refused() -> None:
    with pytest.raises(ValueError, match="squeeze, alex, vgg, got 'resnet'"):
        LPIPS("resnet")


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
    monkeypatch.setattr("losses.perceptual.PUBLISHED", f"{tmp_path.as_uri()}/absent/")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.delenv("AMORTIZED_PULSE_WEIGHTS", raising=False)
    with pytest.raises(FileNotFoundError, match=f"Put the file at {tmp_path / 'checkpoints' / TRUNK}"):
        LPIPS()
