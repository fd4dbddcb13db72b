"""The loop of every latent search: draw, measure, keep the best, take out what is done, step.

A *row* is one candidate of one face. Everything that belongs to rows is a dict of tensors whose first dimension counts
them: what is searched (`variables`, such as codes and noise maps), and what stays (`constants`). Rows know nothing of
each other: a row that is done leaves the batch and costs no more time, and each row comes out the same, up to rounding,
whatever lies beside it.

    PULSE               variables on spheres, loss 100 L2 + 0.05 GEOCROSS, Adam   -> search/pulse.py
    ours                offsets from the encoder's codes, Gauss-Newton or others  -> search/refine.py

Work is counted in generator passes: forward 1, backward 2, forward-mode derivative 2.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from data.image_io import from_uint8, to_uint8
from data.operator import downscaling_error
from search.forward_mode import dual_level
from search.side_by_side import one_by_one, side_by_side

Rows = dict[str, Tensor]
"""Tensors of which each row has a part, (N, …)."""


class Codes(NamedTuple):
    """What the generator draws: styles (N, L, D), and noise maps (N, 1, H, W) per layer in place of the stored ones."""

    ws: Tensor
    noise: list[Tensor] | None = None


def squared_norm(variables: Rows, codes: Codes, residuals: Tensor) -> Tensor:
    """The loss of least squares, ‖ρ‖², (N, Q) -> (N,)."""
    return residuals.square().sum(dim=1)


def only_downscaling(variables: Rows, downscaling: Tensor) -> Tensor:
    """The residuals of a search that wants nothing but the right downscaled picture."""
    return downscaling


@dataclass(frozen=True)
class Problem:
    """What is searched for: variables become codes, codes become faces, and faces are compared with the LR pictures.

    Attributes:
        decode: Maps variables and constants to codes.
        synthesis: Draws codes, called as `synthesis(ws, noise=…)`; images (N, 3, R, R), about [-1, 1].
        operator: The downscaling D, such as a `data.operator.Downscale`.
        residuals: Adds residuals of its own, such as a pull: maps variables and (D(x) - y) / (2 √M), (N, M), whose
            squared norm is the downscaling error, to residuals ρ (N, Q).
        loss: Maps variables, codes and ρ to one loss per row (N,). Methods of least squares take it to be ‖ρ‖².
    """

    decode: Callable[[Rows, Rows], Codes]
    synthesis: Callable[..., Tensor]
    operator: Callable[[Tensor], Tensor]
    residuals: Callable[[Rows, Tensor], Tensor] = only_downscaling
    loss: Callable[[Rows, Codes, Tensor], Tensor] = squared_norm

    def evaluate(self, variables: Rows, constants: Rows, target: Tensor) -> tuple[Codes, Tensor, Tensor]:
        """Draws the faces of N rows: codes, images (N, 3, R, R) and residuals ρ (N, Q), differentiably."""
        codes = self.decode(variables, constants)
        images = self.synthesis(codes.ws, noise=codes.noise)
        downscaling = (self.operator(images) - target).flatten(1)  # (N, M)
        return codes, images, self.residuals(variables, downscaling / (2 * downscaling.shape[1] ** 0.5))


class Point:
    """One evaluation of a problem, with its derivatives for whoever asks; `passes` counts the work.

    Args:
        problem: The problem.
        variables: Where to evaluate.
        constants: Of the same rows.
        target: Their LR pictures (N, 3, s, s).
    """

    def __init__(self, problem: Problem, variables: Rows, constants: Rows, target: Tensor) -> None:
        self.variables = {name: tensor.detach().requires_grad_() for name, tensor in variables.items()}
        self._residuals_at = partial(_residuals_at, problem, constants, target)
        self.codes, self.images, self._residuals = problem.evaluate(self.variables, constants, target)
        self._loss = problem.loss(self.variables, self.codes, self._residuals)
        self.residuals = self._residuals.detach()  # (N, Q)
        written = from_uint8(to_uint8(self.images.detach()))
        self.errors = downscaling_error(written, target, problem.operator)  # (N,), of the picture as it is written
        self.passes = 1

    def gradient(self) -> Rows:
        """The gradient of each row's loss with respect to its variables."""
        self.passes += 2
        gradients = torch.autograd.grad(self._loss.sum(), list(self.variables.values()), retain_graph=True)
        return dict(zip(self.variables, gradients, strict=True))

    def pull_back(self, cotangent: Tensor) -> Rows:
        """Jᵀ u for u (N, Q), with J = ∂ρ / ∂variables of each row."""
        self.passes += 2
        leaves = list(self.variables.values())
        products = torch.autograd.grad(self._residuals, leaves, cotangent, retain_graph=True)
        return dict(zip(self.variables, products, strict=True))

    def push_forward(self, direction: Rows) -> Tensor:
        """J d (N, Q), by forward-mode differentiation."""
        self.passes += 2
        # Without gradients the generator would draw in place, in bands, which forward mode cannot follow.
        with torch.enable_grad(), dual_level():
            duals = {
                name: forward_ad.make_dual(tensor.detach(), direction[name]) for name, tensor in self.variables.items()
            }
            return forward_ad.unpack_dual(self._residuals_at(duals)).tangent.detach()


def _residuals_at(problem: Problem, constants: Rows, target: Tensor, variables: Rows) -> Tensor:
    return problem.evaluate(variables, constants, target)[2]


class Optimiser(Protocol):
    """Takes the steps of a search, each row for itself."""

    @property
    def passes(self) -> int:
        """Generator passes of a step, with the evaluation that it starts from."""

    def start(self, variables: Rows) -> Rows:
        """Makes the state for variables at their start."""

    def step(self, number: int, point: Point, state: Rows) -> tuple[Rows, Rows]:
        """Gives new variables and the new state; `number` counts the steps from 0."""


class Step(NamedTuple):
    """What a callback gets to see after each evaluation.

    Attributes:
        number: Steps taken so far.
        steps: Steps at most.
        rows: Which rows are in the batch (n,).
        errors: Their downscaling errors (n,).
        done: Whether each of them leaves the search now (n,).
        images: Their faces (n, 3, R, R), not clamped.
    """

    number: int
    steps: int
    rows: Tensor
    errors: Tensor
    done: Tensor
    images: Tensor


@dataclass(frozen=True)
class Found:
    """What a search found: for each row the evaluation with the smallest downscaling error.

    Attributes:
        ws: Codes (N, L, D).
        noise: Noise maps (N, 1, H, W) per layer, None where the generator's own were used.
        errors: Downscaling errors (N,), of the pictures in 8 bit.
        steps: Steps that each row took (N,).
        passes: Generator passes that each row needs (N,). Rows that end beside others that go on may be drawn along
            once more, where that is the faster way; it is not counted.
    """

    ws: Tensor
    noise: list[Tensor] | None = field(repr=False)
    errors: Tensor
    steps: Tensor
    passes: Tensor

    def split(self, rows: int) -> list[Found]:
        """Cuts it into parts of so many rows, as far as they go."""
        parts = [slice(start, start + rows) for start in range(0, len(self.ws), rows)]
        maps = [None if self.noise is None else [tensor[part] for tensor in self.noise] for part in parts]
        return [
            Found(self.ws[part], own, self.errors[part], self.steps[part], self.passes[part])
            for part, own in zip(parts, maps, strict=True)
        ]


@torch.inference_mode()
def draw(synthesis: Callable[..., Tensor], found: Found) -> Tensor:
    """Draws what was found.

    Args:
        synthesis: The network of the search.
        found: Its N rows.

    Returns:
        Images (N, 3, R, R), about [-1, 1] but not clamped.

    Raises:
        ValueError: If they are not finite: the search has diverged, or the network's weights are broken.
    """
    images = synthesis(found.ws, noise=found.noise)
    if not images.isfinite().all():
        raise ValueError("Expected finite faces from the search, got NaN or infinite values; take fewer steps.")
    return images


def search(
    problem: Problem,
    start: Rows,
    constants: Rows,
    target: Tensor,
    optimiser: Optimiser,
    steps: int,
    tolerance: float = 0.0,
    callback: Callable[[Step], None] | None = None,
    at_once: int | None = None,
) -> Found:
    """Searches for codes whose faces downscale to the pictures.

    Args:
        problem: What is searched for.
        start: Variables to start from, N rows.
        constants: What stays the same, N rows; may be empty.
        target: LR pictures (N, 3, s, s) in [-1, 1], one per row.
        optimiser: Takes the steps.
        steps: Steps at most, from 0.
        tolerance: A row is done once its downscaling error is at most this.
        callback: Called after each evaluation, by one thread at a time.
        at_once: Rows in a batch at most, for the memory's sake; None means all. On a processor, batches of several rows
            are searched side by side, see `search.side_by_side`.

    Returns:
        The best of each row.

    Raises:
        ValueError: If the numbers of rows differ, or steps or at_once are out of range.
    """
    count = len(target)
    wrong = [name for name, tensor in [*start.items(), *constants.items()] if len(tensor) != count]
    if wrong:
        raise ValueError(f"Expected {count} rows, one per LR picture, got others in {', '.join(wrong)}.")
    if steps < 0 or (at_once is not None and at_once < 1):
        raise ValueError(f"Expected steps from 0 and at_once from 1, got {steps} and {at_once}.")
    best = _Best(count)

    def search_part(rows: Tensor) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            # Tensors made under inference mode take part in no gradient, copies made here do.
            batch = _Batch(rows, _select(start, rows), _select(constants, rows), target[rows].clone())
            _search_batch(problem, batch, optimiser, steps, tolerance, callback, best)

    parts = torch.arange(count, device=target.device).split(at_once or max(count, 1))
    if target.device.type == "cpu" and at_once != 1:
        side_by_side(search_part, parts, best.stopped)
    else:  # of large pictures, one at a time takes all the memory that is meant to be taken
        one_by_one(search_part, parts)
    return best.found()


def _select(tensors: Rows, keep: Tensor) -> Rows:
    return {name: tensor[keep] for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _Batch:
    """The rows that are still searched, with all that belongs to them."""

    rows: Tensor
    variables: Rows
    constants: Rows
    target: Tensor
    state: Rows = field(default_factory=dict)

    def select(self, keep: Tensor) -> _Batch:
        """Keeps the rows where `keep` (n,) is true."""
        return _Batch(
            self.rows[keep],
            _select(self.variables, keep),
            _select(self.constants, keep),
            self.target[keep],
            _select(self.state, keep),
        )

    def point(self, problem: Problem) -> Point:
        return Point(problem, self.variables, self.constants, self.target)


class _Best:
    """The best evaluation of each row so far, of all batches; `lock` is for those that are searched side by side."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.codes: Codes | None = None
        self.lock = threading.Lock()
        self.stopped = threading.Event()  # nothing more is wanted

    def _make_room(self, like: Codes, errors: Tensor) -> None:
        def empty(tensor: Tensor) -> Tensor:
            return torch.empty(self.count, *tensor.shape[1:], device=tensor.device)

        self.codes = Codes(empty(like.ws), None if like.noise is None else [empty(n) for n in like.noise])
        self.errors = torch.full((self.count,), torch.inf, device=errors.device)
        self.steps = torch.zeros(self.count, dtype=torch.long, device=errors.device)
        self.passes = torch.zeros_like(self.steps)

    @torch.no_grad()
    def see(self, number: int, rows: Tensor, point: Point) -> None:
        """Takes over what is better than before; the first evaluation always is, even if its error is not a number."""
        if self.codes is None:
            self._make_room(point.codes, point.errors)
        assert self.codes is not None
        better = (point.errors < self.errors[rows]) | (number == 0)
        places = rows[better]
        self.errors[places] = point.errors[better]
        self.codes.ws[places] = point.codes.ws.detach()[better]
        for own, seen in zip(self.codes.noise or [], point.codes.noise or [], strict=True):
            own[places] = seen.detach()[better]
        self.steps[rows] = number
        self.passes[rows] += 1

    def found(self) -> Found:
        assert self.codes is not None
        return Found(self.codes.ws, self.codes.noise, self.errors, self.steps, self.passes)


def _search_batch(
    problem: Problem,
    batch: _Batch,
    optimiser: Optimiser,
    steps: int,
    tolerance: float,
    callback: Callable[[Step], None] | None,
    best: _Best,
) -> None:
    batch = replace(batch, state=optimiser.start(batch.variables))
    for number in range(steps + 1):
        point = batch.point(problem)
        done = (point.errors <= tolerance) | (number == steps)
        with best.lock:
            best.see(number, batch.rows, point)
            if callback is not None:
                callback(Step(number, steps, batch.rows, point.errors, done, point.images.detach()))
        if done.all() or best.stopped.is_set():
            return
        # Rows that are done either go along for one more step, or the others are drawn once more without them.
        if (optimiser.passes - 1) * done.sum() > (~done).sum():
            batch = batch.select(~done)
            point, done = batch.point(problem), done[~done]
        variables, state = optimiser.step(number, point, batch.state)
        batch = replace(batch, variables=variables, state=state).select(~done)
        with best.lock:
            best.passes[batch.rows] += point.passes - 1
