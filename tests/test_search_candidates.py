"""Refining, starts and the exact step, on a tiny bundle."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from search.consistency import make_consistent
from small_runs import write_bundle
from torch import Tensor

import search.candidates
from data.operator import Downscale, downscaling_error
from models.bundle import Bundle, load_bundle, save_bundle
from models.curvature import Curvature, measure_curvature
from models.encoder import Encoder
from models.generator import Generator
from models.latents import gaussianize
from search.candidates import Plan, curvature_of, find_candidates, refine_codes, rows_at_once, start_codes
from search.loop import draw
from search.refine import OPTIMISERS, PASSES_PER_STEP, SPACES, RefineSettings, plan, refine, refine_problem, spread_of_w


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    torch.manual_seed(0)
    generator = Generator(32, channels=(16, 16, 8, 8), z_dim=16, w_dim=16, mapping_layers=2).eval()
    for block in generator.synthesis.blocks:
        block.torgb.weight.data.mul_(0.2)  # faces within [-1, 1], as those of a trained generator
    encoder = Encoder(32, generator.num_ws, 16, backbone="test_resnet", width=8).eval()
    encoder.latents.fit(generator, samples=500)
    encoder.spread.fill_(0.3)
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    save_bundle(path, generator, encoder, {"name": "tiny", "licence": "none", "training_data": "none"})
    return load_bundle(path)


@pytest.fixture(autouse=True)
def few_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.candidates, "CURVATURE_FACES", 16)


def faces(bundle: Bundle, count: int, size: int = 8) -> Tensor:
    z = torch.randn(count, 16, generator=torch.Generator().manual_seed(5))
    return Downscale(size)(bundle.generator(z).clamp(-1, 1))


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 10, 20])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_work_stays_within_the_budget(optimiser: str, steps: int) -> None:
    chosen, own = plan(RefineSettings(optimiser), steps)
    least = {"adam": 4, "lbfgs": 6, "gauss-newton": 6}[optimiser]  # one step and the last face
    work = 1 + 2 * getattr(chosen, "exact", 0) + own * chosen.passes
    assert work <= max(least, PASSES_PER_STEP * steps)
    assert work + chosen.passes > PASSES_PER_STEP * steps  # nor is it wasted
    assert plan(RefineSettings(optimiser), 0)[1] == 0


def test_ten_steps_are_at_most_three_tenths_of_pulse() -> None:
    for optimiser in OPTIMISERS:
        chosen, own = plan(RefineSettings(optimiser), 10)
        assert 1 + 2 * getattr(chosen, "exact", 0) + own * chosen.passes <= 0.3 * 300


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_refining_lowers_the_error(optimiser: str, space: str, bundle: Bundle) -> None:
    lr = faces(bundle, 2)
    start = start_codes(bundle, lr, 1, Plan())
    settings = RefineSettings(optimiser, space, rate=0.1)
    parts = bundle.generator.synthesis, bundle.encoder.latents, Downscale(8), lr, start
    curvature = curvature_of(bundle, 8) if space == "curvature" else None
    none, some = (refine(*parts, steps, 1e-9, settings, curvature=curvature) for steps in (0, 10))
    assert torch.equal(none.ws, start) and none.passes.tolist() == [1, 1]
    assert (some.errors < 0.8 * none.errors).all()
    assert torch.allclose(
        none.errors, downscaling_error(bundle.generate(start).clamp(-1, 1), lr, Downscale(8)), rtol=0.02
    )


@pytest.mark.parametrize("space", ["plain", "whitened"])
def test_coordinates(space: str, bundle: Bundle) -> None:
    latents = bundle.encoder.latents
    problem = refine_problem(bundle.generator.synthesis, latents, Downscale(8), RefineSettings(space=space, pull=0.01))
    start = start_codes(bundle, faces(bundle, 1), 1, Plan())
    x = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))
    codes, _, residuals = problem.evaluate({"x": x}, {"start": start}, torch.zeros(1, 3, 8, 8))
    if space == "plain":
        assert torch.allclose(codes.ws - start, spread_of_w(latents) * x, atol=1e-5)
    else:
        moved = gaussianize(codes.ws) - gaussianize(start)
        assert torch.allclose(torch.linalg.solve(latents.factor, moved.mT).mT, x, atol=1e-2)
    pulled = residuals[:, 3 * 8 * 8 :].square().sum()
    assert float(pulled) == pytest.approx(0.01 * float(x.square().mean()), rel=1e-4)
    zero = problem.decode({"x": torch.zeros_like(x)}, {"start": start})
    assert torch.allclose(zero.ws, start, atol=1e-6)


def test_curvature_undoes_the_mean_of_the_products() -> None:
    """For faces that are linear in the codes, J is the same for all, and P (JᵀJ + δ λ₁) P = δ λ₁ exactly."""
    matrix = torch.randn(12, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 4, 1, 0.5, 0.1, 0.01])
    ws = torch.zeros(64, 1, 6)
    curvature = measure_curvature(
        lambda w: (w[:, 0] @ matrix.T).view(-1, 3, 2, 2), ws, [lambda x: x], probes=400, damping=0.01
    )
    p = curvature.scale(torch.eye(6)[:, None])[:, 0]
    hessian = matrix.T @ matrix
    damping = 0.01 * torch.linalg.eigvalsh(hessian)[-1]
    product = p @ (hessian + damping * torch.eye(6)) @ p / damping
    assert torch.allclose(product, torch.eye(6), atol=0.1)
    few = Curvature(curvature.directions[:, :2], curvature.gains[:2])
    rest = curvature.directions[:, 3]
    assert torch.allclose(few.scale(rest[None, None])[0, 0], rest, atol=1e-5)  # what is left out stays as it is


def test_curvature_must_be_there(bundle: Bundle) -> None:
    parts = bundle.generator.synthesis, bundle.encoder.latents, Downscale(8)
    with pytest.raises(ValueError, match="measure_curvature"):
        refine_problem(*parts, RefineSettings(space="curvature"))
    assert curvature_of(bundle, 8) is curvature_of(bundle, 8) is not curvature_of(bundle, 4)


def test_sigma_is_that_of_the_generators_codes(bundle: Bundle) -> None:
    z = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    assert spread_of_w(bundle.encoder.latents) == pytest.approx(float(bundle.generator.mapping(z)[:, 0].std()), rel=0.2)


def test_pull_keeps_codes_near_the_start(bundle: Bundle) -> None:
    lr = faces(bundle, 1)
    start = start_codes(bundle, lr, 1, Plan())
    parts = bundle.generator.synthesis, bundle.encoder.latents, Downscale(8), lr, start, 10, 1e-9
    near, far = (refine(*parts, RefineSettings("gauss-newton", "plain", pull=pull)).ws for pull in (1.0, 0.0))
    assert (near - start).norm() < 0.7 * (far - start).norm()


@pytest.mark.parametrize("start", ["encoder", "random", "mean"])
def test_starts(start: str, bundle: Bundle) -> None:
    lr = faces(bundle, 2)
    ws = start_codes(bundle, lr, 3, Plan(start=start)).unflatten(0, (2, 3))
    assert ws.shape == (2, 3, 8, 16)
    alone = start_codes(bundle, lr[1:], 3, Plan(start=start))
    assert torch.allclose(ws[1], alone, atol=1e-5)  # a face comes out the same alone and in company
    w_avg = bundle.encoder.latents.w_avg
    if start == "encoder":
        assert torch.allclose(alone, bundle.encode(lr[1:], 3, np.random.default_rng(0))[0])
    else:
        assert torch.equal(ws[0], ws[1]) and torch.equal(ws[0, :, 0], ws[0, :, -1])
        fewer = start_codes(bundle, lr[:1], 2, Plan(start=start))
        assert torch.equal(fewer, ws[0, :2])  # and a candidate the same whatever k
        assert not torch.equal(ws[0], start_codes(bundle, lr[:1], 3, Plan(start=start, seed=1)))
    if start == "mean":
        assert torch.equal(ws[0, 0], w_avg.expand(8, -1)) and not torch.equal(ws[0, 1], ws[0, 0])
        others = start_codes(bundle, lr[:1], 3, Plan(start="random"))
        assert torch.allclose(ws[0, 1:] - w_avg, 0.1 * (others[1:] - w_avg), atol=1e-5)


@pytest.mark.parametrize(
    ("method", "start"),
    [("ours", "mean"), ("pulse", "random"), ("pulse", "encoder"), ("mm-pulse", "random"), ("plain", "mean")],
)
def test_methods(method: str, start: str, bundle: Bundle) -> None:
    lr, plan = faces(bundle, 2), Plan(method, start, steps=1 if method == "ours" else 3, epsilon=1e-9)
    found, again = (find_candidates(bundle, lr, 2, plan) for _ in range(2))
    assert torch.equal(found.ws, again.ws) and found.ws.shape == (4, 8, 16)
    images = draw(bundle.generator.synthesis, found)
    errors = downscaling_error(images.clamp(-1, 1), lr.repeat_interleave(2, 0), Downscale(8))
    assert torch.allclose(errors, found.errors, rtol=0.02)
    assert (found.noise is not None) == (method in ("pulse", "mm-pulse"))
    alone = find_candidates(bundle, lr[1:], 1, plan)
    assert torch.allclose(alone.ws, found.ws[2:3], atol=1e-4)


@pytest.mark.parametrize(
    ("method", "start"), [("ours", "encoder"), ("ours", "random"), ("plain", "mean"), ("pulse", "random")]
)
def test_faces_may_have_seeds_of_their_own(method: str, start: str, bundle: Bundle) -> None:
    lr = faces(bundle, 1).repeat(3, 1, 1, 1)
    plan = Plan(method, start, steps=0)
    ws = find_candidates(bundle, lr, 2, plan, seeds=[7, 8, 7]).ws.unflatten(0, (3, 2))
    assert torch.allclose(ws[0], ws[2], atol=1e-5) and not torch.allclose(ws[0, 1], ws[1, 1], atol=1e-3)
    alone = find_candidates(bundle, lr[:1], 2, Plan(method, start, steps=0, seed=8)).ws
    assert torch.allclose(ws[1], alone, atol=1e-5)


def test_pulse_starts_from_standard_normal_codes(bundle: Bundle) -> None:
    found = find_candidates(bundle, faces(bundle, 1), 1, Plan("pulse", "random", steps=0))
    u = np.random.default_rng((0, 0)).standard_normal((8, 16), dtype=np.float32)
    latents = bundle.encoder.latents
    v = torch.from_numpy(u) * latents.factor.norm(dim=1) + latents.mean
    assert torch.allclose(found.ws[0], torch.where(v > 0, v, v / 5), atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [{"method": "magic"}, {"start": "zero"}, {"steps": -1}, {"epsilon": 0.0}, {"epsilon": math.nan}, {"seed": -1},
     {"passes": -1}, {"temperature": -0.5}, {"temperature": math.nan},
     {"method": "pulse", "start": "mean", "steps": 9}, {"method": "mm-pulse", "start": "mean"}],
)  # fmt: skip
def test_plans_that_cannot_be(wrong: dict) -> None:
    with pytest.raises(ValueError, match="Expected|mean"):
        Plan(**wrong)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="adam, lbfgs, gauss-newton"):
        RefineSettings("newton")


def test_upsample_with_refinement(bundle: Bundle) -> None:
    lr = faces(bundle, 2)
    _, plain = bundle.upsample(lr, 2)
    images, ws = bundle.upsample(lr, 2, 5)
    assert ws.shape == plain.shape and torch.equal(images, bundle.generate(ws))
    errors = [
        downscaling_error(
            bundle.generate(codes).flatten(0, 1).clamp(-1, 1), lr.repeat_interleave(2, 0), Downscale(8)
        ).mean()
        for codes in (plain, ws)
    ]
    assert errors[1] < errors[0]
    assert torch.equal(bundle.upsample(lr, 2, refine=0)[1], plain)
    with pytest.raises(ValueError, match="steps from 0"):
        refine_codes(bundle, lr, plain, -1)


@pytest.mark.parametrize(("method", "start"), [("ours", "encoder"), ("pulse", "random"), ("plain", "mean")])
def test_a_search_in_bfloat16_finds_nearly_the_same(method: str, start: str, bundle: Bundle) -> None:
    lr, wanted = faces(bundle, 12), Plan(method, start, steps=1)
    exact = find_candidates(bundle, lr, 1, wanted)
    fast = find_candidates(replace(bundle, precision="bf16"), lr, 1, wanted)
    assert not torch.equal(fast.ws, exact.ws) and fast.ws.dtype == torch.float32
    if method != "ours":
        assert torch.allclose(fast.errors, exact.errors, rtol=0.1, atol=1e-4)
    # Second-order steps of an encoder that knows nothing scatter, face by face, but take away as much of the error.
    before = find_candidates(bundle, lr, 1, replace(wanted, steps=0)).errors
    assert float((before - fast.errors).mean()) == pytest.approx(float((before - exact.errors).mean()), rel=0.1)
    drawn = downscaling_error(draw(bundle.generator.synthesis, fast).clamp(-1, 1), lr, Downscale(8))
    assert torch.allclose(drawn, fast.errors, rtol=0.05, atol=1e-4)  # what it thinks of its faces holds in float32


def test_rows_are_searched_in_parts_that_fit(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    lr, seen = faces(bundle, 3), []
    whole = find_candidates(bundle, lr, 1, Plan(steps=1))
    monkeypatch.setitem(search.candidates.PIXELS_AT_ONCE, "cpu", 2 * 32**2)
    parts = find_candidates(bundle, lr, 1, Plan(steps=1), lambda step: seen.append(len(step.rows)))
    assert max(seen) == 2 and torch.allclose(parts.ws, whole.ws, atol=1e-3)
    assert rows_at_once(bundle) == 2 and rows_at_once(replace(bundle, precision="bf16")) == 4


@pytest.mark.parametrize(("size", "resolution"), [(4, 32), (8, 64), (16, 64), (15, 64), (48, 64), (63, 64), (64, 64)])
def test_exact_step(size: int, resolution: int) -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, resolution, resolution, generator=rng) - 0.5
    lr = torch.rand(1, 3, size, size, generator=rng) - 0.5
    operator = Downscale(size)
    exact = make_consistent(images, lr)
    assert float(downscaling_error(exact, lr, operator).max()) < 1e-9
    assert torch.allclose(make_consistent(exact, lr), exact, atol=1e-4)  # a projection
    # The nearest such picture: the change is orthogonal to all that the operator does not see.
    unseen = images - make_consistent(images, torch.zeros_like(lr))
    other = images[1:] - unseen[1:]  # D(other) = 0
    assert operator(other).abs().max() < 1e-3
    change = (exact - images)[0].flatten()
    assert abs(float(change @ other[0].flatten())) < 1e-3 * float(change.norm() * other[0].norm()) + 1e-4


def test_exact_step_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="s ≤ R"):
        make_consistent(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize(("passes", "spent"), [(None, 3), (0, 0), (1, 2)])
def test_only_passes_that_were_taken_count(passes: int | None, spent: int, tmp_path, monkeypatch) -> None:
    """A search after feedback has the less work left, the more passes there were: a drawing each, and one before."""
    write_bundle(tmp_path / "b", feedback=2, rank=5)
    seen: list[int] = []

    def stop(*arguments, **options) -> None:
        seen.append(options["spent"])
        raise InterruptedError

    monkeypatch.setattr("search.candidates.refine", stop)
    with pytest.raises(InterruptedError):
        load_bundle(tmp_path / "b").upsample(torch.zeros(1, 3, 8, 8), 1, 2, passes=passes)
    assert seen == [spent]
