"""Learned steps of edits, on a small generator, with attributes that can be read off the pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_runs import PixelDistance
from torch import Tensor

from data.operator import Downscale
from editing.hyperplane import Hyperplane, Whitening, sample_w
from editing.learning import BATCH, StepLearner
from models.bundle import Bundle
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


def test_learned_steps_do_more_of_their_own_and_less_of_others(generator, whitening) -> None:
    normal = np.zeros(D)
    normal[0] = 1  # any: it is no boundary of redness in particular
    learner = StepLearner(generator, Colours(), PixelDistance(), whitening, seed=2)
    told: list[int] = []
    steps = learner.learn("smile", Hyperplane(normal, 0.0), 80, told.append)
    assert steps.shape == (generator.num_ws, D) and sum(told) == 80
    raw = np.tile(whitening.factor @ normal, (generator.num_ws, 1))
    shared, learned = (learner.measure("smile", d) for d in (raw, steps))
    assert set(learned.others) == {"Male"} and set(learned.synonyms) == {"Mouth_Slightly_Open"}
    assert learned.target > shared.target + 0.1
    assert learned.leakage / learned.target < 0.3 * shared.leakage / max(shared.target, 1e-3)
    whitened = np.linalg.solve(whitening.factor, steps.T).T
    assert (whitened @ normal).mean() == pytest.approx(1, abs=1e-4)  # one standard deviation along the normal


def test_every_second_face_is_an_encoding_with_its_correction(bundle: Bundle) -> None:
    generator = bundle.generator
    own = StepLearner(generator, Colours(), PixelDistance(), None, seed=2)
    learner = StepLearner(generator, Colours(), PixelDistance(), None, bundle, seed=2)
    assert torch.equal(learner.faces(1).ws, learner.faces(1).ws) and not torch.equal(own.faces(0).ws, own.faces(1).ws)
    for number, size in ((0, 8), (1, 4)):
        plain, faces = own.faces(number), learner.faces(number)
        assert faces.ws.shape == (BATCH, generator.num_ws, 16) and not plain.details
        assert torch.equal(faces.ws[1::2], plain.ws[1::2]) and not faces.correction[1::2].any()
        assert all(not d[1::2].any() and d[::2].any() for d in faces.details.values()) and faces.details
        wanted = Downscale(size)(plain.synthesize(generator)[::2]).clamp(-1, 1)  # 8 bits hold no more
        torch.testing.assert_close(faces.ws[::2], bundle.encode(wanted).ws[:, 0], atol=0.02, rtol=0.02)  # 8 bits
        found = Downscale(size)(generator.synthesis(faces.ws, details=faces.details) + faces.correction)[::2]
        torch.testing.assert_close(found, wanted, atol=1 / 127, rtol=0)


def test_parts_change_nothing(bundle: Bundle, monkeypatch) -> None:
    """Where memory is short, features are computed in parts, and again for the gradient."""
    found = []
    for at_once in (BATCH, 5):
        monkeypatch.setattr("editing.learning.faces_at_once", lambda generator, gradient, most, n=at_once: min(n, most))
        learner = StepLearner(bundle.generator, Colours(), PixelDistance(), None, bundle, seed=2)
        offsets = torch.full((BATCH, 1, 16), 0.1).requires_grad_()
        loss = learner._loss("smile", learner.faces(0), torch.ones(BATCH), offsets)
        found.append((loss.detach(), *torch.autograd.grad(loss, [offsets])))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
