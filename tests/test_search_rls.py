"""The regularized latent search and the yardstick without a prior: terms by closed forms, switches, starts."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import models.flow
from data.operator import Downscale, downscaling_error
from models.bundle import Bundle, load_bundle
from models.checkpoints import sha256_of
from models.flow import FlowPrior, flow_of, save_flow
from search.plan import SearchPlan
from search.pulse import cycle_with_drop
from search.rls import RlsSettings, flow_terms, pairwise_distance, rls
from search.samples import find_samples, synthesize
from search.wplus_adam import wplus_adam

D = 16


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path: Path = tmp_path_factory.mktemp("bundles") / "tiny"
    shutil.copytree(tiny_bundle, path)
    torch.manual_seed(0)
    flow = FlowPrior(D, blocks=2, hidden=8)
    z = torch.randn(2000, D, generator=torch.Generator().manual_seed(1))
    flow.fit_scale(load_bundle(path).generator.mapping(z)[:, 0].detach())
    save_flow(flow, path.parent / "flow.safetensors", sha256_of(path / "generator.safetensors"))
    assert models.flow.main(["--bundle", str(path), "--flow", str(path.parent / "flow.safetensors")]) == 0
    return load_bundle(path)


def faces(bundle: Bundle, count: int) -> Tensor:
    z = torch.randn(count, D, generator=torch.Generator().manual_seed(5))
    return Downscale(8)(bundle.generator(z).clamp(-1, 1)).detach()


def codes(bundle: Bundle, count: int) -> Tensor:
    z = torch.randn(count * 8, D, generator=torch.Generator().manual_seed(6))
    return bundle.generator.mapping(z)[:, 0].detach().view(count, 8, D)


def test_settings_are_the_papers() -> None:
    paper = RlsSettings()
    assert (paper.data, paper.density, paper.norm, paper.pairs) == (1, 1e-4, 2e-4, 1e-2)
    assert (paper.steps, paper.learning_rate) == (500, 0.5)


def test_pairwise_distance_is_cdists() -> None:
    ws = torch.randn(3, 5, D, generator=torch.Generator().manual_seed(0))
    distances = torch.cdist(ws, ws)
    expected = torch.triu(distances, diagonal=1).sum(dim=(1, 2)) / 10
    assert torch.allclose(pairwise_distance(ws), expected, atol=1e-4)


def test_pairwise_distance_of_equal_styles_is_zero_with_a_gradient() -> None:
    ws = torch.ones(2, 5, D, requires_grad=True)
    value = pairwise_distance(ws)
    (gradient,) = torch.autograd.grad(value.sum(), ws)
    assert torch.equal(value, torch.zeros(2)) and torch.equal(gradient, torch.zeros_like(ws))


def test_flow_terms(bundle: Bundle) -> None:
    flow, ws = flow_of(bundle), codes(bundle, 2)
    density, norm = flow_terms(flow, ws)
    for row in range(2):
        each = [flow(ws[row, layer]) for layer in range(8)]
        assert float(density[row]) == pytest.approx(-np.mean([float(p) for _, p in each]), rel=1e-4)
        lengths = [float(u.norm()) for u, _ in each]
        assert float(norm[row]) == pytest.approx(np.mean([(x - math.sqrt(D)) ** 2 for x in lengths]), rel=1e-3)


@pytest.mark.parametrize("switched", ["data", "density", "norm", "pairs"])
def test_every_term_counts_by_its_weight(switched: str, bundle: Bundle) -> None:
    only = {name: 0.0 for name in ("data", "density", "norm", "pairs")} | {switched: 3.0}
    ws, lr = codes(bundle, 2), faces(bundle, 2)
    problem = rls(bundle.generator.synthesis, flow_of(bundle), Downscale(8), ws, RlsSettings(**only)).problem
    found, images, residuals = problem.evaluate({"ws": ws}, {}, lr)
    density, norm = flow_terms(flow_of(bundle), ws)
    terms = {"density": density, "norm": norm, "pairs": pairwise_distance(ws)}
    terms["data"] = ((Downscale(8)(images) - lr) / 2).abs().mean(dim=(1, 2, 3))
    assert torch.allclose(problem.loss({"ws": ws}, found, residuals), 3 * terms[switched], rtol=1e-4)


def test_priors_of_the_flow_can_be_done_without(bundle: Bundle) -> None:
    start, lr = codes(bundle, 1), faces(bundle, 1)
    with pytest.raises(ValueError, match="flow"):
        rls(bundle.generator.synthesis, None, Downscale(8), start)
    settings = RlsSettings(density=0, norm=0, pairs=0, steps=5, learning_rate=0.05)
    found = rls(bundle.generator.synthesis, None, Downscale(8), start, settings).run(lr, 5, 1e-9)
    begin = downscaling_error(bundle.generate(start).clamp(-1, 1), lr, Downscale(8))
    assert float(found.residual) < 0.9 * float(begin)


def test_steps_follow_the_schedule(bundle: Bundle) -> None:
    """The first step of Adam is as long as its rate, whatever the gradient: here 0.5 at a tenth of the cycle's peak."""
    start = bundle.encoder.latents.w_avg.expand(1, 8, -1)
    seen: list[Tensor] = []

    def synthesis(ws: Tensor, **maps: object) -> Tensor:
        seen.append(ws.detach().clone())
        return bundle.generator.synthesis(ws)

    settings = RlsSettings(density=0, norm=0, pairs=0, steps=20)
    rls(synthesis, None, Downscale(8), start, settings).run(faces(bundle, 1), 20, 1e-9)
    moved = [(b - a).abs().max() for a, b in zip(seen, seen[1:], strict=False)]
    assert len(seen) == 21 and float(moved[0]) == pytest.approx(0.5 * cycle_with_drop(0, 20), rel=1e-2)
    assert float(moved[0]) == pytest.approx(0.05, rel=1e-2) and max(moved) > 3 * moved[0] > 3 * moved[-1]


@pytest.mark.parametrize("wrong", [{"data": -1}, {"density": -1}, {"norm": -1}, {"pairs": -1}])
def test_weights_that_cannot_be(wrong: dict) -> None:
    with pytest.raises(ValueError, match="from 0"):
        RlsSettings(**wrong)


def test_plan_of_rls(bundle: Bundle) -> None:
    lr = faces(bundle, 2)
    ws = find_samples(bundle, lr, 3, SearchPlan("rls", "mean")).ws.unflatten(0, (2, 3))
    w_avg = bundle.encoder.latents.w_avg
    random = find_samples(bundle, lr, 3, SearchPlan("rls", "random")).ws.unflatten(0, (2, 3))
    assert torch.equal(ws[0, 0], w_avg.expand(8, -1))
    assert torch.allclose(ws[:, 1:] - w_avg, 0.2 * (random[:, 1:] - w_avg), atol=1e-5)  # as in the published code
    found = find_samples(bundle, lr, 2, SearchPlan("rls", "mean", steps=3, epsilon=1e-9))
    again = find_samples(bundle, lr, 2, SearchPlan("rls", "mean", steps=3, epsilon=1e-9))
    assert torch.equal(found.ws, again.ws) and found.ws.shape == (4, 8, D) and found.noise is None
    images = synthesize(bundle, found).clamp(-1, 1)
    residual = downscaling_error(images, lr.repeat_interleave(2, 0), Downscale(8))
    assert torch.allclose(residual, found.residual, rtol=0.02) and found.nfe.max() <= 10


def test_wplus_adam_is_torchs(bundle: Bundle) -> None:
    start, lr, sigma = codes(bundle, 1), faces(bundle, 1), 0.7
    found = wplus_adam(bundle.generator.synthesis, sigma, Downscale(8), start, rate=0.1).run(lr, 4)
    x = torch.zeros_like(start, requires_grad=True)
    adam, best = torch.optim.Adam([x], 0.1), []
    for _ in range(5):
        images = bundle.generator.synthesis(start + sigma * x)
        loss = downscaling_error(images, lr, Downscale(8)).sum()
        best.append((loss.item(), (start + sigma * x).detach().clone()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    expected = min(best, key=lambda pair: pair[0])[1]
    assert torch.allclose(found.ws, expected, atol=1e-4)
