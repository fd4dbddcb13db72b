"""The loop of the searches, and its optimisers against closed forms and torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from data.image_io import from_uint8, to_uint8
from data.operator import Downscale, downscaling_error
from models import banded
from models.generator import Generator
from search.loop import Codes, Found, Optimiser, Point, Problem, Rows, Step, search
from search.optimisers import LBFGS, Adam, GaussNewton, constant

OPTIMISERS = {"adam": Adam(constant(0.05)), "lbfgs": LBFGS(), "gauss-newton": GaussNewton(3)}


@pytest.fixture(scope="module")
def generator() -> Generator:
    torch.manual_seed(0)
    generator = Generator(32, channels=(16, 16, 8, 8), z_dim=16, w_dim=16, mapping_layers=2).eval()
    return generator.requires_grad_(False)


def on_generator(generator: Generator) -> Problem:
    return Problem(lambda variables, constants: Codes(variables["w"]), generator.synthesis, Downscale(8))


def codes(generator: Generator, rows: int, seed: int = 1) -> Tensor:
    z = torch.randn(rows, generator.z_dim, generator=torch.Generator().manual_seed(seed))
    return generator.mapping(z).clone()


def linear_problem(columns: int = 12) -> tuple[Problem, Tensor]:
    """Faces that are linear in the codes, so that least squares have a closed form; faces of 2 px, not downscaled."""
    matrix = torch.randn(12, columns, generator=torch.Generator().manual_seed(0)) / 12

    def synthesis(ws: Tensor, noise: object) -> Tensor:
        return (ws[:, 0] @ matrix.T).view(-1, 3, 2, 2)

    return Problem(lambda variables, constants: Codes(variables["w"]), synthesis, Downscale(2)), matrix


@pytest.mark.parametrize("name", OPTIMISERS)
def test_errors_fall_and_the_best_is_what_it_says(name: str, generator: Generator) -> None:
    target = Downscale(8)(generator.synthesis(codes(generator, 3, seed=2)).clamp(-1, 1))
    start = codes(generator, 3)
    found = search(on_generator(generator), {"w": start}, {}, target, OPTIMISERS[name], 6)
    operator = Downscale(8)
    before = downscaling_error(generator.synthesis(start), target, operator)
    after = downscaling_error(from_uint8(to_uint8(generator.synthesis(found.ws))), target, operator)
    assert (after < 0.7 * before).all() and torch.allclose(after, found.errors, atol=1e-8)
    assert found.steps.tolist() == [6] * 3
    exact = getattr(OPTIMISERS[name], "exact", 0)  # steps with a forward-mode derivative
    assert found.passes.tolist() == [6 * OPTIMISERS[name].passes + 2 * exact + 1] * 3


@pytest.mark.parametrize("name", OPTIMISERS)
def test_rows_do_not_know_of_each_other(name: str, generator: Generator) -> None:
    target = Downscale(8)(generator.synthesis(codes(generator, 4, seed=2)).clamp(-1, 1))
    start = codes(generator, 4)
    tolerance = float(downscaling_error(generator.synthesis(start), target, Downscale(8)).median()) * 0.8

    def run(rows: slice, at_once: int | None = None) -> Found:
        return search(
            on_generator(generator), {"w": start[rows]}, {}, target[rows], OPTIMISERS[name], 4, tolerance, None, at_once
        )

    together = run(slice(None))
    assert together.steps.unique().numel() > 1  # rows end at different steps, or the test tells nothing
    others = [(slice(None), run(slice(None), at_once=3)), (slice(2, 3), run(slice(2, 3)))]
    for rows, other in others:
        assert torch.allclose(other.ws, together.ws[rows], atol=1e-4)
        assert torch.equal(other.steps, together.steps[rows]) and torch.equal(other.passes, together.passes[rows])


def test_done_rows_leave_the_batch(generator: Generator) -> None:
    start = codes(generator, 3)
    target = Downscale(8)(from_uint8(to_uint8(generator.synthesis(codes(generator, 3, seed=2)))))
    target[1] = Downscale(8)(from_uint8(to_uint8(generator.synthesis(start[1:2]))))[0]  # found before the first step
    steps: list[Step] = []
    found = search(on_generator(generator), {"w": start}, {}, target, Adam(constant(0.01)), 2, 1e-6, steps.append)
    assert [step.rows.tolist() for step in steps] == [[0, 1, 2], [0, 2], [0, 2]]
    assert [step.done.tolist() for step in steps] == [[False, True, False], [False, False], [True, True]]
    assert (found.steps.tolist(), found.passes.tolist()) == ([2, 0, 2], [7, 1, 7])
    assert torch.equal(found.ws[1], start[1])


def test_best_so_far_is_kept() -> None:
    problem, matrix = linear_problem()
    target = torch.zeros(1, 3, 2, 2)
    start = torch.full((1, 1, 12), 0.05)
    errors: list[float] = []
    wild = Adam(lambda number: 0.05 if number == 0 else 5.0)  # to zero at once, then far away
    found = search(problem, {"w": start}, {}, target, wild, 3, callback=lambda step: errors.append(float(step.errors)))
    assert errors[-1] > 10 * min(errors) and float(found.errors) == min(errors)
    assert torch.linalg.vector_norm(found.ws) < torch.linalg.vector_norm(start)


def test_adam_is_torchs() -> None:
    problem, _ = linear_problem()
    target = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(1)) - 0.5
    x = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(2))
    expected = x.clone().requires_grad_()
    theirs = torch.optim.Adam([expected], lr=0.02)
    ours, variables = Adam(constant(0.02)), {"w": x}
    state = ours.start(variables)
    for number in range(5):
        theirs.zero_grad()
        ((problem.synthesis(expected, None) - target) / 2).square().mean(dim=(1, 2, 3)).sum().backward()
        theirs.step()
        variables, state = ours.step(number, Point(problem, variables, {}, target), state)
    assert torch.allclose(variables["w"], expected, atol=1e-6)


@pytest.mark.parametrize("optimiser", [GaussNewton(8), LBFGS(exact=8)])
def test_second_order_methods_solve_linear_least_squares(optimiser: Optimiser) -> None:
    problem, matrix = linear_problem(columns=8)
    target = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(1)) - 0.5
    variables: Rows = {"w": torch.zeros(2, 1, 8)}
    state = optimiser.start(variables)
    for number in range(1 if isinstance(optimiser, GaussNewton) else 8):  # conjugate gradients end after 8 steps
        variables, state = optimiser.step(number, Point(problem, variables, {}, target), state)
    solution = torch.linalg.lstsq(matrix, target.flatten(1).T).solution.T
    assert torch.allclose(variables["w"][:, 0], solution, rtol=1e-2, atol=2e-3)


def test_gauss_newton_takes_back_a_step_that_made_things_worse() -> None:
    """r = atan(8 w) / 8 per number: the linearised step from far away overshoots, to the other side and further."""
    problem = Problem(
        lambda variables, constants: Codes(variables["w"]),
        lambda ws, noise: torch.atan(8 * ws).view(-1, 3, 2, 2) / 8,
        Downscale(2),
    )
    target, optimiser = torch.zeros(1, 3, 2, 2), GaussNewton(1)
    variables: Rows = {"w": torch.full((1, 1, 12), 0.4)}
    state = optimiser.start(variables)
    places = [0.4]
    for number in range(3):
        variables, state = optimiser.step(number, Point(problem, variables, {}, target), state)
        places.append(float(variables["w"][0, 0, 0]))
    overshot = 0.4 - math.atan(3.2) / 8 * (1 + 3.2**2)
    assert places[1] == pytest.approx(overshot, rel=1e-3) and abs(overshot) > 0.4
    assert places[2] == pytest.approx(0.4 + (overshot - 0.4) / 4, rel=1e-3) and abs(places[2]) < 0.4
    assert abs(places[3] - places[2]) > 1e-3  # and from there it goes on by steps of its own


def test_lbfgs_steps_by_the_exact_minimiser() -> None:
    problem, matrix = linear_problem()
    target = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(1)) - 0.5
    x = torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(2))
    moved, _ = LBFGS().step(0, Point(problem, {"w": x}, {}, target), LBFGS().start({"w": x}))
    residual = matrix @ x[0, 0] - target.flatten()
    slope = matrix.T @ residual
    length = residual @ (matrix @ slope) / (matrix @ slope).square().sum()
    assert torch.allclose(moved["w"][0, 0], x[0, 0] - length * slope, atol=1e-5)


def test_lbfgs_computes_the_length_of_its_first_steps_alone() -> None:
    problem, _ = linear_problem()
    variables: Rows = {"w": torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(2))}
    optimiser, work, errors = LBFGS(exact=2), [], []
    state = optimiser.start(variables)
    for number in range(12):
        point = Point(problem, variables, {}, torch.zeros(1, 3, 2, 2))
        variables, state = optimiser.step(number, point, state)
        work.append(point.passes)
        errors.append(float(point.errors))
    assert work == [5, 5] + [3] * 10
    assert errors[-1] < 0.01 * errors[1]


@pytest.mark.parametrize("smallest", [8, 1024])
def test_derivatives(smallest: int, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward mode agrees with differences, backward with forward; even where inference would draw in bands."""
    monkeypatch.setattr(banded, "SMALLEST", smallest)
    rng = torch.Generator().manual_seed(3)
    w, target = codes(generator, 2), torch.zeros(2, 3, 8, 8)
    direction = {"w": torch.randn(w.shape, generator=rng)}
    problem = on_generator(generator)
    point = Point(problem, {"w": w}, {}, target)
    with torch.no_grad():
        forward = point.push_forward(direction)
        after, before = (problem.evaluate({"w": w + t * direction["w"]}, {}, target)[2] for t in (5e-3, -5e-3))
    difference = (after - before) / 1e-2
    assert (forward - difference).norm() < 0.05 * difference.norm()  # kinks of the leaky ReLU lie in between
    cotangent = torch.randn(forward.shape, generator=rng)
    back = point.pull_back(cotangent)["w"]
    assert torch.allclose((back * direction["w"]).sum(dim=(1, 2)), (cotangent * forward).sum(dim=1), rtol=1e-3)
    assert torch.allclose(point.gradient()["w"], 2 * point.pull_back(point.residuals)["w"], rtol=1e-4, atol=1e-7)
    assert point.passes == 1 + 2 + 2 + 2 + 2


def test_works_under_inference_mode(generator: Generator) -> None:
    with torch.inference_mode():
        start = generator.mapping(torch.ones(1, 16))
        target = Downscale(8)(generator.synthesis(start)).clamp(-1, 1) * 0.9
        found = search(on_generator(generator), {"w": start}, {}, target, LBFGS(), 2)
    assert float(found.errors) < float(downscaling_error(generator.synthesis(start), target, Downscale(8)))


@pytest.mark.parametrize(("steps", "at_once", "rows"), [(-1, None, 2), (1, 0, 2), (1, None, 3)])
def test_refused(steps: int, at_once: int | None, rows: int) -> None:
    problem, _ = linear_problem()
    with pytest.raises(ValueError, match="Expected"):
        search(
            problem, {"w": torch.zeros(2, 1, 12)}, {}, torch.zeros(rows, 3, 2, 2), LBFGS(), steps, 0.0, None, at_once
        )
