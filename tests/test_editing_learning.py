"""Learned steps of edits, on a small generator, with attributes that can be read off the pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_runs import PixelDistance
from torch import Tensor

from data.operator import Downscale
from editing.choosing import Chooser
from editing.fitting import Hyperplane, Whitening
from editing.learning import BATCH, StepLearner, codes_to_learn_on
from editing.sampling import sample_w
from models.generator import Generator

D = 8
NAMES = ("Smiling", "Male", "Mouth_Slightly_Open")  # the last is a synonym of the first


class Colours:
    """In place of a classifier: redness of all, blueness of the upper half, and redness again."""

    names, rates = NAMES, torch.tensor([0.5, 0.5, 0.5])

    def __call__(self, images: Tensor) -> Tensor:
        red, blue = images[:, 0].mean(dim=(1, 2)), images[:, 2, :16].mean(dim=(1, 2))
        return 10 * torch.stack([red, blue, red], dim=1)

    def balanced(self, logits: Tensor) -> Tensor:
        return logits


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(3)
    return Generator(32, (8, 8, 8, 8), z_dim=D, w_dim=D, mapping_layers=2).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def whitening(generator) -> Whitening:
    return Whitening.of(sample_w(generator, 2000, 1).numpy())


def learner(generator: Generator, whitening: Whitening, steps: int) -> StepLearner:
    codes = codes_to_learn_on(generator, steps, 2, None)
    return StepLearner(generator, Colours(), PixelDistance(), whitening, codes)


def test_learned_steps_do_more_of_their_own_and_less_of_others(generator, whitening) -> None:
    normal = np.zeros(D)
    normal[0] = 1  # any: it is no boundary of redness in particular
    plane = Hyperplane(normal, 0.0, 1.0, 1)
    chooser = Chooser(generator, Colours(), {"Smiling": plane}, whitening, seed=9)
    told: list[int] = []
    steps = learner(generator, whitening, 150).learn("smile", plane, 150, told.append)
    assert steps.shape == (generator.num_ws, D) and sum(told) == 150
    shared, learned = (chooser.trial("smile", d, (0, generator.num_ws)) for d in (whitening.factor @ normal, steps))
    assert set(learned.drift) == {"Male"}
    assert learned.own > shared.own + 0.1 and learned.disentanglement < 0.3 * shared.disentanglement
    whitened = np.linalg.solve(whitening.factor, steps.T).T
    assert (whitened @ normal).mean() == pytest.approx(1, abs=1e-4)  # one standard deviation along the normal


def test_learning_repeats(generator, whitening) -> None:
    plane = Hyperplane(np.eye(D)[1], 0.0, 1.0, 1)
    first, again = (learner(generator, whitening, steps).learn("smile", plane, 3) for steps in (3, 5))
    assert np.array_equal(first, again)  # faces that are left over change nothing


class Encoder:
    """In place of a bundle: gives the mean of each LR face as every number of its code, and notes the sizes."""

    lr_sizes = (4, 16)

    def __init__(self, styles: int) -> None:
        self.styles, self.sizes = styles, []

    def encode(self, lr: Tensor) -> Tensor:
        self.sizes.append(lr.shape[-1])
        return lr.mean(dim=(1, 2, 3))[:, None, None, None].expand(-1, 1, self.styles, D)


def test_every_second_face_is_what_the_encoder_makes_of_it(generator) -> None:
    encoder, own = Encoder(generator.num_ws), codes_to_learn_on(generator, 3, 2, None)
    codes = codes_to_learn_on(generator, 3, 2, encoder)
    assert own.shape == codes.shape == (3 * BATCH, generator.num_ws, D) and encoder.sizes == [8, 4, 8]
    assert torch.equal(codes[1::2], own[1::2]) and torch.equal(own, own[:, :1].expand_as(own))
    for i, size in enumerate(encoder.sizes):
        part = slice(i * BATCH, (i + 1) * BATCH, 2)
        with torch.no_grad():
            lr = Downscale(size)(generator.synthesis(own[part].clone(), noise_mode="const"))
        means = lr.clamp(-1, 1).mean(dim=(1, 2, 3))
        torch.testing.assert_close(codes[part, 0, 0], means, atol=1 / 255, rtol=0)  # half a step of 8 bits
