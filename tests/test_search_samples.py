"""Samples by the methods and starts that infer.py offers, on a tiny bundle; and the preconditioner of ours."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import search.samples
from cli.search_options import add_search_options, read_plan, summarize_search
from data.operator import Downscale, downscaling_error, lift, resize_matrix
from models.bundle import Bundle, load_bundle
from models.encoder_base import face_keys
from models.latents import Preconditioner, measure_preconditioner
from search.amortized import amortized
from search.plan import METHODS, SearchPlan
from search.samples import batch_size, find_samples, synthesize


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return load_bundle(tiny_bundle)


def faces(bundle: Bundle, count: int, size: int = 8) -> Tensor:
    z = torch.randn(count, 16, generator=torch.Generator().manual_seed(5))
    return Downscale(size)(bundle.generator(z).clamp(-1, 1))


# --- amortized ---


def test_the_residual_falls_while_details_stay(bundle: Bundle) -> None:
    lr = faces(bundle, 2)
    encoding = bundle.encode(lr, 2)
    before, after = (find_samples(bundle, lr, 2, SearchPlan(steps=steps, epsilon=1e-9)) for steps in (0, 10))
    assert torch.equal(before.ws, encoding.ws.flatten(0, 1)) and before.nfe.tolist() == [2] * 4
    assert torch.allclose(synthesize(bundle, before), bundle.generate(encoding).flatten(0, 1), atol=1e-5)
    assert (after.residual < 0.7 * before.residual).all() and after.nfe.max() <= 33
    for size, kept in encoding.details.items():
        assert torch.equal(after.details[size], kept.flatten(0, 1)) and kept.abs().max() > 0
    errors = downscaling_error(synthesize(bundle, after).clamp(-1, 1), lr.repeat_interleave(2, 0), Downscale(8))
    assert torch.allclose(errors, after.residual, rtol=0.05, atol=1e-6)


def test_the_loss_is_the_formula(bundle: Bundle) -> None:
    """mean ((D x − y) / 2)² + λ mean (N (x − x°) / 2)², x = G(w° + σ P m)."""
    lr, sigma = faces(bundle, 1), float(bundle.encoder.latents.sigma)
    ws = bundle.encode(lr, 1).ws[0]
    p = Preconditioner(torch.linalg.qr(torch.randn(8 * 16, 5)).Q, torch.tensor([0.1, 0.2, 0.4, 0.6, 0.9]))
    start = amortized(bundle.generator.synthesis, sigma, p, Downscale(8), ws, unseen=3.0)
    moves = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    codes, images, residuals = start.problem.evaluate({"moves": moves}, start.constants, lr)
    matrix = torch.eye(8 * 16) + p.directions @ torch.diag(p.gains - 1) @ p.directions.T
    assert torch.allclose(codes.ws.flatten(), ws.flatten() + sigma * matrix @ moves.flatten(), atol=1e-4)
    down = resize_matrix(32, 8).double()
    change = (images - bundle.generator.synthesis(ws)).double()
    kernel = torch.eye(32 * 32) - torch.kron(*2 * [torch.linalg.pinv(down) @ down])  # N
    unseen = (kernel @ change.flatten(2)[0].T / 2).square().mean()
    expected = downscaling_error(images, lr, Downscale(8)) + 3.0 * unseen
    loss = start.problem.loss({"moves": moves}, codes, residuals)
    assert torch.allclose(loss, expected.float(), rtol=1e-4)


def test_the_prior_keeps_what_the_input_does_not_show(bundle: Bundle) -> None:
    lr = faces(bundle, 1)
    ws = bundle.encode(lr, 1).ws[0]

    def change(unseen: float) -> Tensor:
        start = amortized(bundle.generator.synthesis, 1.0, None, Downscale(8), ws, unseen=unseen)
        moved = bundle.generator.synthesis(start.run(lr, 10, 1e-9).ws) - bundle.generator.synthesis(ws)
        return (moved - lift(Downscale(8)(moved), 32)).norm()

    assert change(100.0) < 0.7 * change(0.0)


def test_a_noisy_input_is_followed_as_far_as_its_noise(bundle: Bundle) -> None:
    lr, sigma = faces(bundle, 2), torch.tensor([0.0, 200.0])
    found = find_samples(bundle, lr, 1, SearchPlan(steps=2, epsilon=1e-9), sigma=sigma)
    assert found.steps.tolist() == [2, 0] and found.residual[1] < (200 / 255) ** 2


def test_sigma_is_that_of_the_generators_codes(bundle: Bundle) -> None:
    z = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    assert float(bundle.encoder.latents.sigma) == pytest.approx(float(bundle.generator.mapping(z)[:, 0].std()), rel=0.2)


def test_the_preconditioner_undoes_the_mean_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """For faces that are linear in the codes, J is the same for all, and P (JᵀJ + δ λ₁) P = δ λ₁ exactly."""
    matrix = torch.randn(48, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 4, 1, 0.5, 0.1, 0.01])
    linear = SimpleNamespace(
        z_dim=6,
        resolution=4,
        w_avg=torch.zeros(6),
        mapping=lambda z, psi: torch.zeros(len(z), 1, 6),
        synthesis=lambda w: (w[:, 0] @ matrix.T).view(-1, 3, 4, 4),
    )
    monkeypatch.setattr("models.latents.faces_at_once", lambda *args, **options: 16)
    p = measure_preconditioner(linear, rank=6, seed=0, damping=0.01)
    hessian = matrix.T @ matrix
    damping = 0.01 * torch.linalg.eigvalsh(hessian)[-1]
    applied = p.apply(torch.eye(6)[:, None])[:, 0]
    assert torch.allclose(applied @ (hessian + damping * torch.eye(6)) @ applied / damping, torch.eye(6), atol=0.15)
    few = Preconditioner(p.directions[:, :2], p.gains[:2])
    rest = p.directions[:, 3]
    assert torch.allclose(few.apply(rest[None, None])[0, 0], rest, atol=1e-5)  # what is left out stays as it is


# --- all methods ---


@pytest.mark.parametrize("init", ["encoder", "random", "mean"])
def test_starts_depend_on_seed_and_face_alone(init: str, bundle: Bundle) -> None:
    lr = faces(bundle, 2)
    ws = find_samples(bundle, lr, 3, SearchPlan(init=init)).ws.unflatten(0, (2, 3))
    alone = find_samples(bundle, lr[1:], 2, SearchPlan(init=init)).ws
    assert ws.shape == (2, 3, 8, 16) and torch.allclose(ws[1, :2], alone, atol=1e-5)
    other = find_samples(bundle, lr, 3, SearchPlan(init=init, seed=1)).ws.unflatten(0, (2, 3))
    differ = [not torch.allclose(ws[:, j], other[:, j]) for j in range(3)]
    assert differ == [init == "random", True, True]  # the first is the point estimate, or the mean face
    if init != "encoder":
        assert torch.equal(ws[:, :, 0], ws[:, :, -1]) and not torch.allclose(ws[0, 1], ws[1, 1])
    if init == "mean":
        assert torch.equal(ws[0, 0], bundle.encoder.latents.w_avg.expand(8, -1))


@pytest.mark.parametrize(
    ("method", "init"),
    [("amortized", "mean"), ("pulse", "random"), ("pulse", "encoder"), ("mm-pulse", "random"), ("wplus-adam", "mean"),
     ("wplus-adam", "encoder")],
)  # fmt: skip
def test_methods(method: str, init: str, bundle: Bundle) -> None:
    lr, plan = faces(bundle, 2), SearchPlan(method, init, steps=3, epsilon=1e-9)
    found, again = (find_samples(bundle, lr, 2, plan) for _ in range(2))
    assert torch.equal(found.ws, again.ws) and found.ws.shape == (4, 8, 16) and not found.details
    errors = downscaling_error(synthesize(bundle, found).clamp(-1, 1), lr.repeat_interleave(2, 0), Downscale(8))
    assert torch.allclose(errors, found.residual, rtol=0.02)
    assert (found.noise is not None) == (method in ("pulse", "mm-pulse"))
    alone = find_samples(bundle, lr[1:], 1, plan)
    assert torch.allclose(alone.ws, found.ws[2:3], atol=1e-4)


def test_pulse_starts_from_standard_normal_codes(bundle: Bundle) -> None:
    lr = faces(bundle, 1)
    found = find_samples(bundle, lr, 1, SearchPlan("pulse", "random"))
    u = np.random.default_rng((0, face_keys(lr)[0], 0)).standard_normal((8, 16), dtype=np.float32)
    latents = bundle.encoder.latents
    v = torch.from_numpy(u) * latents.factor.norm(dim=1) + latents.mean
    assert torch.allclose(found.ws[0], torch.where(v > 0, v, v / 5), atol=1e-5)


def test_an_offset_moves_the_codes(bundle: Bundle) -> None:
    found = find_samples(bundle, faces(bundle, 1), 2, SearchPlan("pulse", "random"))
    offset = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    moved = synthesize(bundle, replace(found, ws=found.ws + offset))
    assert torch.equal(synthesize(bundle, found, offset), moved)
    with pytest.raises(ValueError, match="fewer steps"):
        synthesize(bundle, found, offset * math.nan)


@pytest.mark.parametrize(("method", "init"), [("amortized", "encoder"), ("pulse", "random")])
def test_a_search_in_bfloat16_finds_nearly_the_same(method: str, init: str, bundle: Bundle) -> None:
    lr, plan = faces(bundle, 12), SearchPlan(method, init, steps=1)
    exact = find_samples(bundle, lr, 1, plan)
    fast = find_samples(replace(bundle, precision="bf16"), lr, 1, plan)
    assert not torch.equal(fast.ws, exact.ws) and fast.ws.dtype == torch.float32
    assert float(fast.residual.mean()) == pytest.approx(float(exact.residual.mean()), rel=0.1)
    errors = downscaling_error(synthesize(bundle, fast).clamp(-1, 1), lr, Downscale(8))
    assert torch.allclose(errors, fast.residual, rtol=0.05, atol=1e-4)  # what it measures holds in float32


def test_searches_run_in_batches_that_fit(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    lr, seen = faces(bundle, 3), []
    whole = find_samples(bundle, lr, 1, SearchPlan(steps=1))
    monkeypatch.setitem(search.samples.PIXELS, "cpu", 2 * 32**2)
    parts = find_samples(bundle, lr, 1, SearchPlan(steps=1), lambda state: seen.append(len(state.indices)))
    assert max(seen) == 2 and torch.allclose(parts.ws, whole.ws, atol=1e-3)
    assert batch_size(bundle) == 2 and batch_size(replace(bundle, precision="bf16")) == 4


@pytest.mark.parametrize(
    "wrong",
    [{"method": "magic"}, {"init": "zero"}, {"steps": -1}, {"epsilon": 0.0}, {"epsilon": math.nan}, {"seed": -1},
     {"method": "pulse", "init": "mean", "steps": 9}, {"method": "mm-pulse", "init": "mean"}],
)  # fmt: skip
def test_plans_that_cannot_be(wrong: dict) -> None:
    with pytest.raises(ValueError, match="Expected|mean"):
        SearchPlan(**wrong)


# --- the options ---


def read(*options: str) -> SearchPlan | None:
    parser = argparse.ArgumentParser()
    add_search_options(parser)
    return read_plan(argparse.Namespace(**vars(parser.parse_args(options)), seed=3))


def test_options_are_read() -> None:
    assert read() is None
    found = read("--search", "7", "--method", "pulse", "--init", "random", "--epsilon", "0.01")
    assert found == SearchPlan("pulse", "random", 7, 0.01, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--method", "rls"], "--search 500"), (["--save-trajectory"], "--search 10"), (["--init", "mean"], "--init"),
     (["--epsilon", "0.1"], "--epsilon"), (["--search", "-1"], "from 0"),
     (["--search", "9", "--method", "pulse", "--init", "mean"], "random or")],
)  # fmt: skip
def test_options_that_cannot_be_followed(options: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(*options)


@pytest.mark.parametrize("method", METHODS[:2])
def test_the_report_says_what_converged(method: str, bundle: Bundle) -> None:
    plan = SearchPlan(method, "random", steps=2, epsilon=1.0)
    summary = summarize_search(plan, find_samples(bundle, faces(bundle, 1), 2, plan))
    assert summary["converged"] == 2 and [row["steps"] for row in summary["samples"]] == [0, 0]
    strict = replace(plan, epsilon=1e-9)
    summary = summarize_search(strict, find_samples(bundle, faces(bundle, 1), 2, strict))
    assert summary["converged"] == 0 and summary["method"] == method and summary["samples"][0]["steps"] == 2
