"""The loop of every latent search: synthesize, measure, keep the best, drop what has converged, step.

Everything is a batch of N independent searches, one per sample. What belongs to them is a dict of tensors whose first
dimension is N: what is searched (`variables`, such as codes and noise maps), and what stays (`constants`, such as the
encoder's details). A search that has converged leaves the batch and costs no more time; each comes out the same, up to
rounding, whatever else is in the batch.

The residual is the mean square of (D(x) − y) / 2 of the synthesized face x, before any back-projection. Work is counted
in generator calls (`nfe`): forward 1, backward 2.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from data.image_io import from_uint8, to_uint8
from data.operator import downscaling_error
from search.parallel import run_in_order, run_in_threads

Rows = dict[str, Tensor]
"""Tensors (N, …) by name."""


class Codes(NamedTuple):
    """What the generator synthesizes from."""

    ws: Tensor  # styles (N, L, D)
    noise: list[Tensor] | None = None  # maps (N, 1, H, W) per layer in place of the stored ones
    details: Mapping[int, Tensor] | None = None  # added to the features, (N, C, r, r) by r


def squared_norm(variables: Rows, codes: Codes, residuals: Tensor) -> Tensor:
    """The loss of least squares, ‖ρ‖², (N, Q) -> (N,)."""
    return residuals.square().sum(dim=1)


@dataclass(frozen=True)
class Problem:
    """What is minimised: variables become codes, codes become faces, and faces are compared with the LR pictures.

    Attributes:
        decode: Maps variables and constants to codes.
        synthesis: Called as `synthesis(ws, noise=…, details=…)`; images (N, 3, R, R), about [-1, 1].
        operator: The downscaling D, such as a `data.operator.Downscale`.
        extra: Residuals besides (D(x) − y) / (2 √M), (N, M), whose squared norm is the residual of the LR picture, such
            as those of a prior: maps images, their downscaled pictures, the target and the constants to (N, Q − M);
            None adds none.
        loss: Maps variables, codes and all residuals ρ (N, Q) to one loss each (N,). Methods of least squares take it
            to be ‖ρ‖².
    """

    decode: Callable[[Rows, Rows], Codes]
    synthesis: Callable[..., Tensor]
    operator: Callable[[Tensor], Tensor]
    extra: Callable[[Tensor, Tensor, Tensor, Rows], Tensor] | None = None
    loss: Callable[[Rows, Codes, Tensor], Tensor] = squared_norm

    def synthesize(self, codes: Codes) -> Tensor:
        """Synthesizes faces (N, 3, R, R)."""
        return self.synthesis(codes.ws, noise=codes.noise, details=codes.details)

    def evaluate(self, variables: Rows, constants: Rows, target: Tensor) -> tuple[Codes, Tensor, Tensor]:
        """Gives codes, images (N, 3, R, R) and residuals ρ (N, Q), differentiably."""
        codes = self.decode(variables, constants)
        images = self.synthesize(codes)
        downscaled = self.operator(images)
        residuals = (downscaled - target).flatten(1)  # (N, M)
        residuals = residuals / (2 * residuals.shape[1] ** 0.5)
        if self.extra is not None:
            residuals = torch.cat([residuals, self.extra(images, downscaled, target, constants)], dim=1)
        return codes, images, residuals


class Point:
    """One evaluation of a problem, with its gradient for optimizers that ask; `nfe` counts the work.

    Args:
        problem: The problem.
        variables: Where to evaluate.
        constants: Of the same searches.
        target: Their LR pictures (N, 3, s, s).
    """

    def __init__(self, problem: Problem, variables: Rows, constants: Rows, target: Tensor) -> None:
        self.variables = {name: tensor.detach().requires_grad_() for name, tensor in variables.items()}
        self._problem, self._constants, self._target = problem, constants, target
        self.codes, self.images, residuals = problem.evaluate(self.variables, constants, target)
        self._loss = problem.loss(self.variables, self.codes, residuals)
        self.residuals = residuals.detach()  # ρ (N, Q)
        pixels = from_uint8(to_uint8(self.images.detach()))
        self.residual = downscaling_error(pixels, target, problem.operator)  # (N,), of the face in 8 bit
        self.nfe = 1

    def gradient(self) -> Rows:
        """The gradient of each loss with respect to its variables."""
        self.nfe += 2
        gradients = torch.autograd.grad(self._loss.sum(), list(self.variables.values()))
        return dict(zip(self.variables, gradients, strict=True))

    @torch.no_grad()
    def residuals_at(self, variables: Rows) -> Tensor:
        """The residuals ρ (N, Q) somewhere else."""
        self.nfe += 1
        return self._problem.evaluate(variables, self._constants, self._target)[2]


class Optimizer(Protocol):
    """Takes the steps, for each search by itself."""

    @property
    def nfe(self) -> int:
        """Generator calls of a step, with the evaluation that it starts from."""

    def init(self, variables: Rows) -> Rows:
        """Makes the state for variables at their start."""

    def step(self, number: int, point: Point, state: Rows) -> tuple[Rows, Rows]:
        """Gives new variables and the new state; `number` counts the steps from 0."""


class SearchState(NamedTuple):
    """What a callback gets to see after each evaluation of n searches."""

    number: int  # steps taken so far
    steps: int  # at most
    indices: Tensor  # which searches are in the batch (n,)
    residual: Tensor  # (n,)
    done: Tensor  # whether each of them leaves the batch now (n,)
    images: Tensor  # their faces (n, 3, R, R), not clamped


Callback = Callable[[SearchState], None]


@dataclass(frozen=True)
class SearchResult:
    """What N searches found: of each the evaluation with the smallest residual.

    Attributes:
        ws: Codes (N, L, D).
        noise: Noise maps (N, 1, H, W) per layer, None where the generator's own were used.
        residual: Mean square of (D(x) − y) / 2 (N,), of faces in 8 bit, before back-projection.
        steps: Steps that each took (N,).
        nfe: Generator calls that each needs (N,). Converged ones may be synthesized once more along with others, where
            that is faster; it is not counted.
        details: What was held fixed (N, C, r, r) by r; empty without an encoder.
    """

    ws: Tensor
    noise: list[Tensor] | None = field(repr=False)
    residual: Tensor
    steps: Tensor
    nfe: Tensor
    details: Mapping[int, Tensor] = field(default_factory=dict, repr=False)

    def split(self, size: int) -> list[SearchResult]:
        """Cuts it into parts of so many searches; the last may have fewer."""
        parts = []
        for i in (slice(start, start + size) for start in range(0, len(self.ws), size)):
            noise = None if self.noise is None else [tensor[i] for tensor in self.noise]
            details = {r: tensor[i] for r, tensor in self.details.items()}
            parts.append(SearchResult(self.ws[i], noise, self.residual[i], self.steps[i], self.nfe[i], details))
        return parts


@dataclass(frozen=True)
class Search:
    """A method at its start: run it."""

    problem: Problem  # what is minimised
    variables: Rows  # where it starts, N of each
    constants: Rows  # what stays the same, N of each; may be empty
    optimizer: Optimizer  # takes the steps
    nfe: int = 0  # generator calls that the start has cost

    def run(
        self,
        target: Tensor,
        steps: int,
        epsilon: float | Tensor = 0.0,
        callback: Callback | None = None,
        batch_size: int | None = None,
    ) -> SearchResult:
        """Searches for faces that downscale to the pictures.

        Args:
            target: LR pictures (N, 3, s, s) in [-1, 1].
            steps: Steps at most, from 0.
            epsilon: A search has converged once its residual is at most this, a number or (N,).
            callback: Called after each evaluation, by one thread at a time.
            batch_size: Searches in a batch at most, for the memory's sake; None means all. On a processor, batches run
                in several threads, see `search.parallel`.

        Raises:
            ValueError: If the numbers of searches differ, or steps or batch_size are out of range.
        """
        count = len(target)
        wrong = [name for name, tensor in (self.variables | self.constants).items() if len(tensor) != count]
        if wrong:
            raise ValueError(f"Expected {count} searches, one per LR picture, got others in {', '.join(wrong)}.")
        if steps < 0 or (batch_size is not None and batch_size < 1):
            raise ValueError(f"Expected steps from 0 and a batch size from 1, got {steps} and {batch_size}.")
        best = _Best(count)
        limits = torch.as_tensor(epsilon, device=target.device).expand(count)

        def run_batch(indices: Tensor) -> None:
            with torch.inference_mode(False), torch.enable_grad():
                # Tensors made under inference mode take part in no gradient, copies made here do.
                variables, constants = _select(self.variables, indices), _select(self.constants, indices)
                batch = _Batch(indices, variables, constants, target[indices].clone(), limits[indices].clone())
                self._run_batch(batch, steps, callback, best)

        parts = torch.arange(count, device=target.device).split(batch_size or max(count, 1))
        if target.device.type == "cpu" and batch_size != 1:
            run_in_threads(run_batch, parts, best.stopped)
        else:  # of large pictures, one at a time takes all the memory that is meant to be taken
            run_in_order(run_batch, parts)
        result = best.result()
        return replace(result, nfe=result.nfe + self.nfe)

    def _run_batch(self, batch: _Batch, steps: int, callback: Callback | None, best: _Best) -> None:
        batch = replace(batch, state=self.optimizer.init(batch.variables))
        for number in range(steps + 1):
            point = batch.point(self.problem)
            done = (point.residual <= batch.epsilon) | (number == steps)
            with best.lock:
                best.update(number, batch.indices, point)
                if callback is not None:
                    callback(SearchState(number, steps, batch.indices, point.residual, done, point.images.detach()))
            if done.all() or best.stopped.is_set():
                return
            # Those that are done either come along for one more step, or the others are evaluated again without them.
            if (self.optimizer.nfe - 1) * done.sum() > (~done).sum():
                batch = batch.select(~done)
                point, done = batch.point(self.problem), done[~done]
            variables, state = self.optimizer.step(number, point, batch.state)
            batch = replace(batch, variables=variables, state=state).select(~done)
            with best.lock:
                best.nfe[batch.indices] += point.nfe - 1


def _select(tensors: Rows, keep: Tensor) -> Rows:
    return {name: tensor[keep] for name, tensor in tensors.items()}


@dataclass(frozen=True)
class _Batch:
    """The searches that still run, with all that belongs to them."""

    indices: Tensor
    variables: Rows
    constants: Rows
    target: Tensor
    epsilon: Tensor
    state: Rows = field(default_factory=dict)

    def select(self, keep: Tensor) -> _Batch:
        """Keeps those where `keep` (n,) is true."""
        parts = _select(self.variables, keep), _select(self.constants, keep), self.target[keep], self.epsilon[keep]
        return _Batch(self.indices[keep], *parts, _select(self.state, keep))

    def point(self, problem: Problem) -> Point:
        return Point(problem, self.variables, self.constants, self.target)


class _Best:
    """The best evaluation of each search so far, of all batches; `lock` is for those in other threads."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.codes: Codes | None = None
        self.lock = threading.Lock()
        self.stopped = threading.Event()  # nothing more is wanted

    def _allocate(self, like: Codes, residual: Tensor) -> None:
        def empty(tensor: Tensor) -> Tensor:
            return torch.empty(self.count, *tensor.shape[1:], device=tensor.device)

        self.codes = Codes(empty(like.ws), None if like.noise is None else [empty(n) for n in like.noise])
        self.residual = torch.full((self.count,), torch.inf, device=residual.device)
        self.steps = torch.zeros(self.count, dtype=torch.long, device=residual.device)
        self.nfe = torch.zeros_like(self.steps)

    @torch.no_grad()
    def update(self, number: int, indices: Tensor, point: Point) -> None:
        """Takes over what is better than before; the first evaluation always is, even if its residual is NaN."""
        if self.codes is None:
            self._allocate(point.codes, point.residual)
        assert self.codes is not None
        better = (point.residual < self.residual[indices]) | (number == 0)
        places = indices[better]
        self.residual[places] = point.residual[better]
        self.codes.ws[places] = point.codes.ws.detach()[better]
        for own, new in zip(self.codes.noise or [], point.codes.noise or [], strict=True):
            own[places] = new.detach()[better]
        self.steps[indices] = number
        self.nfe[indices] += 1

    def result(self) -> SearchResult:
        assert self.codes is not None
        return SearchResult(self.codes.ws, self.codes.noise, self.residual, self.steps, self.nfe)
