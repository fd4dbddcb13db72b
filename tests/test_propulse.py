"""Coarse to fine after Pro-PULSE: the base code, what replaces it, and the side outputs that supervise it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from small_runs import D

from data.operator import Downscale
from losses.side_outputs import SideOutputs
from models.encoder_base import Features
from models.propulse import ProPulseEncoder


@pytest.fixture(scope="module")
def generator(networks):
    return networks[0]


@pytest.fixture(scope="module")
def encoder() -> ProPulseEncoder:
    torch.manual_seed(4)
    return ProPulseEncoder(32, 8, D, backbone="test_resnet", width=8).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def features(encoder) -> Features:
    lr = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return encoder.read(encoder.on_canvas(lr), torch.full((2,), 8), torch.zeros(2))


def test_base_code_is_replaced_layer_by_layer(encoder, features) -> None:
    codes, base = encoder.point(features), encoder.partial(features, 0)
    assert torch.equal(base, base[:, :1].expand(-1, 8, -1)) and not torch.allclose(base[0], base[1])
    assert encoder.levels == 4
    for level in range(5):
        mixed = encoder.partial(features, level)
        torch.testing.assert_close(mixed[:, : 2 * level], codes[:, : 2 * level])
        assert torch.equal(mixed[:, 2 * level :], base[:, 2 * level :])


def test_partial_faces_are_the_final_ones_at_their_resolution(generator, encoder, features) -> None:
    """A level has all styles that the generator's picture of that resolution depends on."""
    final = generator.synthesis.partial_sums(encoder.point(features))
    for level in range(1, 5):
        found = generator.synthesis.partial_sums(encoder.partial(features, level))
        torch.testing.assert_close(found[level - 1], final[level - 1])


@pytest.mark.parametrize("level", [5, -1])
def test_partial_codes_are_refused(encoder, features, level) -> None:
    with pytest.raises(ValueError, match="0 to 4"):
        encoder.partial(features, level)


# --- side outputs ---


def test_partial_sums_end_in_the_face(generator) -> None:
    ws = generator.mapping(torch.randn(2, D))
    sums = generator.synthesis.partial_sums(ws)
    assert [rgb.shape for rgb in sums] == [(2, 3, size, size) for size in (4, 8, 16, 32)]
    assert torch.equal(sums[-1], generator.synthesis(ws))
    other = ws.clone()
    other[:, 4:] += 1
    changed = [not torch.equal(a, b) for a, b in zip(sums, generator.synthesis.partial_sums(other), strict=True)]
    assert changed == [False, False, True, True]


def test_colour_maps_are_the_least_squares_solution(generator) -> None:
    sides = SideOutputs(generator, samples=40, seed=1)
    z = np.random.default_rng((1, 40)).standard_normal((40, D), dtype=np.float32)
    sums = generator.synthesis.partial_sums(generator.mapping(torch.from_numpy(z)))
    for i, size in enumerate((4, 8, 16)):
        x = sums[i].movedim(1, 3).reshape(-1, 3).double().numpy()
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        y = Downscale(size)(sums[-1].clamp(-1, 1)).movedim(1, 3).reshape(-1, 3).double().numpy()
        solution, residual, *_ = np.linalg.lstsq(x, y, rcond=None)
        np.testing.assert_allclose(sides.get_buffer(f"map{size}").numpy(), solution.T, atol=1e-4)
        total = ((y - y.mean(axis=0)) ** 2).sum()
        assert math.isclose(sides.r_squared[size], 1 - residual.sum() / total, abs_tol=1e-6)
        found = sides(generator.mapping(torch.from_numpy(z)))[i].movedim(1, 3).reshape(-1, 3)
        np.testing.assert_allclose(found.numpy(), x @ solution, atol=1e-4)
