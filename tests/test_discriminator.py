"""The discriminator: shapes, the minibatch statistic against numpy, and gradients everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.discriminator import Discriminator, PooledFeatureDiscriminator, ResidualBlock, minibatch_stddev

WIDTHS = {32: (8, 6, 6, 4), 64: (8, 8, 6, 6, 4)}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("resolution", [32, 64])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_one_logit_a_picture(resolution, batch) -> None:
    logits = Discriminator(resolution, WIDTHS[resolution])(torch.randn(batch, 3, resolution, resolution))
    assert logits.shape == (batch,) and logits.dtype == torch.float32


@pytest.mark.parametrize("widths", [(8, 6, 6), (8, 8, 6, 6, 4)])
def test_wrong_widths_are_refused(widths) -> None:
    with pytest.raises(ValueError, match="32, got"):
        Discriminator(32, widths)


@pytest.mark.parametrize(("batch", "group"), [(8, 4), (6, 3), (2, 2), (5, 1), (1, 1)])
def test_minibatch_stddev_equals_numpy(batch, group) -> None:
    x = torch.randn(batch, 3, 4, 4)
    y = minibatch_stddev(x)
    assert y.shape == (batch, 4, 4, 4)
    assert torch.equal(y[:, :3], x)
    for b in range(batch):
        members = x.numpy()[b % (batch // group) :: batch // group]  # samples are dealt out to the groups in turn
        assert len(members) == group
        expected = np.sqrt(members.var(axis=0) + 1e-8).mean()
        np.testing.assert_allclose(y[b, 3].numpy(), expected, rtol=1e-4)


def test_block_keeps_the_variance_and_halves_the_size() -> None:
    x = torch.randn(4, 64, 16, 16)
    y = ResidualBlock(64, 32)(x)
    assert y.shape == (4, 32, 8, 8)
    assert 0.1 < y.var() < 2.0


def test_gradient_reaches_every_weight_and_pixel() -> None:
    discriminator = Discriminator(32, WIDTHS[32])
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    discriminator(images).sum().backward()
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    assert (images.grad.abs().amax(dim=1) > 0).float().mean() > 0.99


def test_penalty_on_the_gradient_can_be_trained() -> None:
    discriminator = Discriminator(32, WIDTHS[32])
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(images).sum(), images, create_graph=True)
    gradient.square().sum().backward()
    assert discriminator.blocks[0].conv0.weight.grad.abs().max() > 0


# --- on frozen features ---


def test_feature_discriminator_gives_a_logit_a_place_and_depth() -> None:
    judge = PooledFeatureDiscriminator((6, 10))
    features = [torch.randn(2, 6, 31, 31), torch.randn(2, 10, 7, 7)]
    logits = judge(features)
    assert [tuple(x.shape) for x in logits] == [(2, 49), (2, 49)]
    changed = judge([features[0], features[1] + 1])
    assert torch.equal(changed[0], logits[0]) and not torch.equal(changed[1], logits[1])


def test_feature_discriminator_is_normalised_once_a_step() -> None:
    torch.manual_seed(0)
    judge = PooledFeatureDiscriminator((6,)).train()
    features = [torch.randn(2, 6, 8, 8)]
    with torch.no_grad():
        judge.heads[0][0].parametrizations.weight.original.mul_(5)
    stretched = judge(features)[0]
    assert torch.equal(judge(features)[0], stretched)  # a call does not change the estimate
    for _ in range(20):
        judge.normalise()
    norm = torch.linalg.matrix_norm(judge.heads[0][0].weight.flatten(1), ord=2)
    torch.testing.assert_close(norm, torch.tensor(1.0), rtol=1e-3, atol=0)
    assert not any(module.training for module in judge.modules())
