"""The loop of the searches, and its optimizers against closed forms and torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from data.image_io import from_uint8, to_uint8
from data.operator import Downscale, downscaling_error
from models.generator import Generator
from search.loop import Codes, Point, Problem, Search, SearchResult, SearchState
from search.optimizers import LBFGS, Adam, constant

OPTIMIZERS = {"adam": Adam(constant(0.05)), "lbfgs": LBFGS()}


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

    def synthesis(ws: Tensor, **maps: object) -> Tensor:
        return (ws[:, 0] @ matrix.T).view(-1, 3, 2, 2)

    return Problem(lambda variables, constants: Codes(variables["w"]), synthesis, Downscale(2)), matrix


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_residuals_fall_and_the_best_is_what_it_says(name: str, generator: Generator) -> None:
    target = Downscale(8)(generator.synthesis(codes(generator, 3, seed=2)).clamp(-1, 1))
    start, optimizer = codes(generator, 3), OPTIMIZERS[name]
    found = Search(on_generator(generator), {"w": start}, {}, optimizer).run(target, 6)
    before = downscaling_error(generator.synthesis(start), target, Downscale(8))
    after = downscaling_error(from_uint8(to_uint8(generator.synthesis(found.ws))), target, Downscale(8))
    assert (after < 0.7 * before).all() and torch.allclose(after, found.residual, atol=1e-8)
    assert found.steps.tolist() == [6] * 3
    assert found.nfe.tolist() == [6 * optimizer.nfe + (name == "lbfgs") + 1] * 3  # L-BFGS probes once


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_searches_are_independent(name: str, generator: Generator) -> None:
    target = Downscale(8)(generator.synthesis(codes(generator, 4, seed=2)).clamp(-1, 1))
    start = codes(generator, 4)
    epsilon = float(downscaling_error(generator.synthesis(start), target, Downscale(8)).median()) * 0.8

    def run(part: slice, batch_size: int | None = None) -> SearchResult:
        search = Search(on_generator(generator), {"w": start[part]}, {}, OPTIMIZERS[name])
        return search.run(target[part], 4, epsilon, batch_size=batch_size)

    together = run(slice(None))
    assert together.steps.unique().numel() > 1  # they end at different steps, or the test tells nothing
    for part, other in [(slice(None), run(slice(None), batch_size=3)), (slice(2, 3), run(slice(2, 3)))]:
        assert torch.allclose(other.ws, together.ws[part], atol=1e-4)
        assert torch.equal(other.steps, together.steps[part]) and torch.equal(other.nfe, together.nfe[part])


def test_what_has_converged_leaves_the_batch(generator: Generator) -> None:
    start = codes(generator, 3)
    target = Downscale(8)(from_uint8(to_uint8(generator.synthesis(codes(generator, 3, seed=2)))))
    target[1] = Downscale(8)(from_uint8(to_uint8(generator.synthesis(start[1:2]))))[0]  # found before the first step
    states: list[SearchState] = []
    search = Search(on_generator(generator), {"w": start}, {}, Adam(constant(0.01)))
    found = search.run(target, 2, 1e-6, states.append)
    assert [state.indices.tolist() for state in states] == [[0, 1, 2], [0, 2], [0, 2]]
    assert [state.done.tolist() for state in states] == [[False, True, False], [False, False], [True, True]]
    assert (found.steps.tolist(), found.nfe.tolist()) == ([2, 0, 2], [7, 1, 7])
    assert torch.equal(found.ws[1], start[1])
    each = search.run(target, 2, torch.tensor([9.0, 1e-6, 1e-6]))
    assert each.steps.tolist() == [0, 0, 2]  # ε may differ


def test_best_so_far_is_kept() -> None:
    problem, matrix = linear_problem()
    start, residuals = torch.full((1, 1, 12), 0.05), []
    wild = Adam(lambda number: 0.05 if number == 0 else 5.0)  # to zero at once, then far away
    search = Search(problem, {"w": start}, {}, wild)
    found = search.run(torch.zeros(1, 3, 2, 2), 3, callback=lambda state: residuals.append(float(state.residual)))
    assert residuals[-1] > 10 * min(residuals) and float(found.residual) == min(residuals)
    assert torch.linalg.vector_norm(found.ws) < torch.linalg.vector_norm(start)


def test_adam_is_torchs() -> None:
    problem, _ = linear_problem()
    target = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(1)) - 0.5
    x = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(2))
    expected = x.clone().requires_grad_()
    theirs = torch.optim.Adam([expected], lr=0.02)
    ours, variables = Adam(constant(0.02)), {"w": x}
    state = ours.init(variables)
    for number in range(5):
        theirs.zero_grad()
        ((problem.synthesis(expected) - target) / 2).square().mean(dim=(1, 2, 3)).sum().backward()
        theirs.step()
        variables, state = ours.step(number, Point(problem, variables, {}, target), state)
    assert torch.allclose(variables["w"], expected, atol=1e-6)


def test_lbfgs_begins_with_the_exact_minimiser_along_the_gradient_and_solves_least_squares() -> None:
    problem, matrix = linear_problem(columns=8)
    target = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(1)) - 0.5
    x = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(2))
    optimizer, variables = LBFGS(), {"w": x}
    state = optimizer.init(variables)
    points = []
    for number in range(12):
        points.append(Point(problem, variables, {}, target))
        variables, state = optimizer.step(number, points[-1], state)
        if number == 0:
            residual = matrix @ x[0, 0] - target.flatten()
            slope = matrix.T @ residual
            length = residual @ (matrix @ slope) / (matrix @ slope).square().sum()
            assert torch.allclose(variables["w"][0, 0], x[0, 0] - length * slope, atol=1e-4)
    solution = torch.linalg.lstsq(matrix, target.flatten(1).T).solution.T
    assert torch.allclose(variables["w"][:, 0], solution, rtol=1e-2, atol=2e-3)
    assert [point.nfe for point in points] == [4] + [3] * 11


def test_works_under_inference_mode(generator: Generator) -> None:
    with torch.inference_mode():
        start = generator.mapping(torch.ones(1, 16))
        target = Downscale(8)(generator.synthesis(start)).clamp(-1, 1) * 0.9
        found = Search(on_generator(generator), {"w": start}, {}, LBFGS()).run(target, 2)
    assert float(found.residual) < float(downscaling_error(generator.synthesis(start), target, Downscale(8)))


@pytest.mark.parametrize(("steps", "batch_size", "count"), [(-1, None, 2), (1, 0, 2), (1, None, 3)])
def test_refused(steps: int, batch_size: int | None, count: int) -> None:
    search = Search(linear_problem()[0], {"w": torch.zeros(2, 1, 12)}, {}, LBFGS())
    with pytest.raises(ValueError, match="Expected"):
        search.run(torch.zeros(count, 3, 2, 2), steps, 0.0, None, batch_size)
