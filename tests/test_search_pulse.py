"""PULSE's pieces against numbers from the published formulas, and PULSE as a whole on a tiny generator."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from data.operator import Downscale, downscaling_error
from models.generator import Generator
from models.latents import LatentStatistics, gaussianize
from search.loop import Codes, Problem, Search, SearchResult
from search.optimizers import Adam, constant
from search.pulse import SETTINGS, PulseSettings, cycle_with_drop, pulse, pulse_noise
from search.sphere import (
    GaussianMap,
    OnSphere,
    geodesic_cross,
    radius,
    squared_angles,
)


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    generator = Generator(32, channels=(16, 16, 8, 8), z_dim=16, w_dim=16, mapping_layers=2).eval()
    for layer in generator.synthesis.layers:
        torch.nn.init.constant_(layer.noise_strength, 0.1)
    return generator.requires_grad_(False)


@pytest.fixture(scope="module")
def to_w(generator: Generator) -> GaussianMap:
    statistics = LatentStatistics(16)
    statistics.fit(generator, samples=2000)
    return GaussianMap.of(statistics)


def test_map_has_the_mean_and_deviation_of_mapped_samples(generator: Generator, to_w: GaussianMap) -> None:
    z = torch.from_numpy(np.random.default_rng((0, 2000)).standard_normal((2000, 16), dtype=np.float32))
    w = generator.mapping(z)[:, 0]
    v = torch.where(w > 0, w, 5 * w)
    assert torch.allclose(to_w.mean, v.mean(dim=0), atol=1e-4) and torch.allclose(to_w.std, v.std(dim=0), rtol=1e-3)
    assert torch.allclose(to_w.to_w(to_w.from_w(w)), w, atol=1e-4)
    u = torch.tensor([[-100.0], [100.0]]).expand(2, 16)
    expected = u * v.std(dim=0) + v.mean(dim=0)
    assert torch.allclose(to_w.to_w(u), torch.where(expected > 0, expected, expected / 5), rtol=1e-2)


def test_geodesic_term_of_two_orthogonal_codes() -> None:
    ws = torch.tensor([[[3.0, 0.0], [0.0, 3.0]]])
    # Of the four ordered pairs, two are at a right angle: 512 / 8 · (π/2)² / 2.
    assert float(geodesic_cross(ws)) == pytest.approx(8 * math.pi**2, rel=1e-5)


@pytest.mark.parametrize("angle", [0.1, 1.0, 2.0, 3.0])
def test_angles(angle: float) -> None:
    ws = torch.tensor([[[2.0, 0.0], [2 * math.cos(angle), 2 * math.sin(angle)], [2.0, 0.0]]])
    expected = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]]) * angle**2
    assert torch.allclose(squared_angles(ws)[0], expected, rtol=1e-3, atol=1e-4)
    assert float(geodesic_cross(ws)) == pytest.approx(64 * 4 * angle**2 / 9, rel=1e-3)


def test_geodesic_gradient_is_finite_where_codes_are_equal() -> None:
    ws = torch.ones(1, 4, 8, requires_grad=True)
    geodesic_cross(ws).sum().backward()
    assert ws.grad is not None and ws.grad.isfinite().all()


@pytest.mark.parametrize(
    ("number", "factor"), [(0, 0.1), (22.5, 0.55), (45, 1.0), (67.5, 0.55), (90, 0.1), (95, 0.0505), (99, 0.0109)]
)
def test_schedule(number: float, factor: float) -> None:
    assert cycle_with_drop(number, 100) == pytest.approx(factor)
    assert cycle_with_drop(number / 2, 50) == pytest.approx(factor)


def test_sphere_keeps_every_style_and_map_at_its_own_radius(generator: Generator) -> None:
    rng = torch.Generator().manual_seed(0)
    start = {"u": torch.randn(2, 8, 16, generator=rng), "noise 0": torch.randn(2, 1, 4, 4, generator=rng)}
    assert torch.allclose(radius(start["u"])[1, 3], (start["u"][1, 3] ** 2).sum().sqrt(), atol=1e-5)
    assert radius(start["noise 0"]).shape == (2, 1, 1, 1)

    others = pulse_noise(generator.synthesis, [None] * 2, "zero")[1:]

    def decode(variables: dict[str, Tensor], constants: dict[str, Tensor]) -> Codes:
        return Codes(variables["u"], [variables["noise 0"], *others])

    ends: dict[str, Tensor] = {}

    class Watched(OnSphere):
        def step(self, number, point, state):
            variables, state = super().step(number, point, state)
            ends.update(variables)
            return variables, state

    problem = Problem(decode, generator.synthesis, Downscale(8))
    Search(problem, start, {}, Watched(Adam(constant(0.4)))).run(torch.zeros(2, 3, 8, 8), 3)
    for name, end in ends.items():
        assert torch.allclose(radius(end), radius(start[name]), rtol=1e-5)
        assert (end - start[name]).abs().max() > 0.1


def test_loss_is_the_published_one(generator: Generator, to_w: GaussianMap) -> None:
    rng = torch.Generator().manual_seed(0)
    u, noise = torch.randn(3, 8, 16, generator=rng), pulse_noise(generator.synthesis, [None] * 3, "zero")
    settings = PulseSettings(epsilon=0.05, noise="zero")
    problem = pulse(generator.synthesis, to_w, Downscale(8), u, noise, settings).problem
    target = Downscale(8)(generator.synthesis(to_w.to_w(u), noise_mode="none"))
    target[0] += 1.0  # far away: an error of (1/2)²
    target[1] += 0.1  # within ε
    maps = {f"noise {i}": tensor for i, tensor in enumerate(noise)}
    variables = {"u": u.requires_grad_()}
    codes, _, residuals = problem.evaluate(variables, maps, target)
    loss = problem.loss(variables, codes, residuals)
    cross = torch.stack([geodesic_cross(to_w.to_w(row)[None])[0] for row in u])
    expected = 100 * torch.tensor([0.25, 0.05, 0.05]) + 0.05 * cross
    assert torch.allclose(loss, expected, rtol=1e-4)
    (gradient,) = torch.autograd.grad(loss.sum(), u, retain_graph=True)
    (of_cross,) = torch.autograd.grad(0.05 * cross.sum(), u)
    assert torch.allclose(gradient[1:], of_cross[1:], rtol=1e-3, atol=1e-6)  # within ε, only the angles pull
    assert not torch.allclose(gradient[0], of_cross[0], rtol=0.1)


@pytest.mark.parametrize("kind", ["zero", "fixed", "trainable"])
def test_noise(kind: str, generator: Generator, to_w: GaussianMap) -> None:
    def run(rows: list[int]) -> tuple[list[Tensor], SearchResult]:
        rngs = [np.random.default_rng((0, row)) for row in rows]
        noise = pulse_noise(generator.synthesis, rngs, kind)
        start = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))[: len(rows)]
        settings = PulseSettings(noise=kind, steps=2, trainable_maps=3)
        search = pulse(generator.synthesis, to_w, Downscale(8), start, noise, settings)
        return noise, search.run(torch.zeros(len(rows), 3, 8, 8), 2)

    noise, found = run([0, 1])
    assert [tuple(tensor.shape) for tensor in noise] == [(2, 1, s, s) for s in (4, 8, 8, 16, 16, 32, 32)]
    assert noise[-1].abs().max() == 0 and (noise[0].abs().max() == 0) == (kind == "zero")
    moved = [not torch.equal(a, b) for a, b in zip(noise, found.noise, strict=True)]
    assert moved == [kind == "trainable"] * 3 + [False] * 4
    assert all(torch.equal(a[:1], b) for a, b in zip(noise, run([0])[0], strict=True))


def test_result_can_be_synthesized_again(generator: Generator, to_w: GaussianMap) -> None:
    noise = pulse_noise(generator.synthesis, [np.random.default_rng(i) for i in range(2)], "trainable")
    start = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    target = torch.full((2, 3, 8, 8), 0.2)
    search = pulse(generator.synthesis, to_w, Downscale(8), start, noise, PulseSettings(steps=12))
    found = search.run(target, 12, epsilon=2e-3)
    before = downscaling_error(generator.synthesis(to_w.to_w(start), noise=noise), target, Downscale(8))
    again = downscaling_error(generator.synthesis(found.ws, noise=found.noise).clamp(-1, 1), target, Downscale(8))
    assert torch.allclose(again, found.residual, rtol=1e-2) and (found.residual < 0.5 * before).all()


def test_settings_are_the_published_ones() -> None:
    code = SETTINGS["pulse"]
    assert (code.steps, code.learning_rate, code.l2, code.geocross, code.noise, code.trainable_maps) == (
        100, 0.4, 100, 0.05, "trainable", 5
    )  # fmt: skip
    assert (code.epsilon, SETTINGS["mm-pulse"].noise) == (2e-3, "fixed")
    with pytest.raises(ValueError, match="zero, fixed, trainable"):
        PulseSettings(noise="pink")


def test_gaussianize_is_lrelu_5() -> None:
    assert gaussianize(torch.tensor([-1.0, 2.0])).tolist() == [-5.0, 2.0]
