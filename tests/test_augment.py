"""Adaptive augmentation: what it does to pictures, and how its probability follows the discriminator."""

from __future__ import annotations

import pytest
import torch

from training.augment import AdaptiveAugment, augment
from training.batches import BatchRandom


def rng(seed: int = 0) -> BatchRandom:
    return BatchRandom(torch.Generator().manual_seed(seed))


@pytest.fixture
def images() -> torch.Tensor:
    return rng(5).rand(8, 3, 16, 16) * 2 - 1


def test_without_probability_nothing_is_touched(images) -> None:
    assert AdaptiveAugment()(images, rng()) is images
    torch.testing.assert_close(augment(images, 0.0, rng()), images, rtol=1e-5, atol=1e-5)


def test_with_full_probability_every_picture_changes(images) -> None:
    module = AdaptiveAugment()
    module.p.fill_(1.0)
    changed = module(images, rng())
    assert changed.shape == images.shape
    assert ((changed - images).abs().amax(dim=(1, 2, 3)) > 0.1).all()


def test_probability_is_the_share_of_pictures_that_change(images) -> None:
    images = images[:1].expand(400, -1, -1, -1)
    changed = (augment(images, 0.1, rng()) - images).abs().amax(dim=(1, 2, 3)) > 1e-3
    # eight changes, of which the flip is one half the time: 1 - 0.9^7 * 0.95
    assert changed.float().mean() == pytest.approx(1 - 0.9**7 * 0.95, abs=0.08)


def test_same_randomness_same_pictures(images) -> None:
    assert torch.equal(augment(images, 0.5, rng(1)), augment(images, 0.5, rng(1)))
    assert not torch.equal(augment(images, 0.5, rng(1)), augment(images, 0.5, rng(2)))


def test_gradient_passes(images) -> None:
    images = images.requires_grad_(True)
    augment(images, 1.0, rng()).square().sum().backward()
    assert images.grad.isfinite().all() and (images.grad.abs().amax(dim=(1, 2, 3)) > 0).all()


def test_pictures_stay_pictures(images) -> None:
    changed = augment(images, 1.0, rng())
    # at most contrast 2^0.5 times saturation 2 on colours in [-1, 1], and brightness 0.4
    assert changed.abs().max() < 2**0.5 * (1 + 2 * 2) + 0.4
    grey = torch.zeros(200, 3, 8, 8)
    shift = augment(grey, 1.0, rng()).mean(dim=(1, 2, 3))
    assert shift.abs().max() <= 0.4 and shift.std() > 0.1
    torch.testing.assert_close(augment(grey, 1.0, rng()).std(dim=(1, 2, 3)), torch.zeros(200), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("logit", "start", "moves"), [(5.0, 0.5, 1), (-5.0, 0.5, -1), (5.0, 1.0, 0), (-5.0, 0.0, 0)])
def test_probability_follows_the_confidence(logit, start, moves) -> None:
    module = AdaptiveAugment(target=0.6, images_to_full=1000)
    module.p.fill_(start)
    module.sign.fill_(1.0 if logit > 0 else -1.0)
    module.adapt(torch.tensor(logit).sign(), 10)
    assert float(module.p) == pytest.approx(start + moves * 10 / 1000)


def test_one_confident_batch_is_not_enough() -> None:
    module = AdaptiveAugment(target=0.6, images_to_full=100)
    steps = 0
    while float(module.p) == 0 and steps < 100:
        module.adapt(torch.tensor(1.0), 10)
        steps += 1
    assert 10 < steps < 30  # the running mean of the sign passes 0.6 after ln 0.4 / ln 0.95 = 18 batches


def test_state_is_kept_in_checkpoints() -> None:
    assert AdaptiveAugment().state_dict().keys() == {"p", "sign"}
