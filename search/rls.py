"""Regularized latent search (Gheisari & Genovesio 2022): W+ with three priors, two of them from a flow over W.

    L1(D(g(w)), y) + λ₁ mean_l(−log p(w_l)) + λ₂ mean_l((‖f(w_l)‖ − √D)²) + λ₃ mean_{l<m} ‖w_l − w_m‖

with the mean absolute difference in units of [0, 1], the flow f of `models.flow`, log p in nats; Adam at 0.5 times a
cycle that ends in a drop, 500 steps from the mean latent. k results come from k starts: the mean, and points a fifth of
the way from it to random codes. Weights at 0 switch a prior off.

"paper" has the weights of the paper, "code" those of the published code, which has 10 L1 in place of L1. That code also
keeps w in a ball about the mean, with a radius that it does not give; this is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from models.flow import FlowPrior
from models.generator import SynthesisNetwork
from search.loop import Codes, Found, Problem, Rows, Step, search
from search.optimisers import Adam
from search.pulse import cycle_with_drop

PERTURBATION = 0.2  # how far starts 2 to k lie from the mean, as a share of the way to a random code
_INSIDE_ROOT = 1e-9  # keeps the gradients of norms finite at zero


@dataclass(frozen=True)
class RlsSettings:
    """The settings; the defaults are the paper's.

    Attributes:
        data: Weight of the L1 term.
        density: λ₁.
        norm: λ₂.
        pairs: λ₃.
        steps: Steps at most.
        learning_rate: Peak of the schedule.
        epsilon: A row is done once its downscaling error is at most this; the published code takes all steps.

    Raises:
        ValueError: If a weight is negative.
    """

    data: float = 1.0
    density: float = 1e-4
    norm: float = 2e-4
    pairs: float = 1e-2
    steps: int = 500
    learning_rate: float = 0.5
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        """Checks the weights."""
        weights = {name: getattr(self, name) for name in ("data", "density", "norm", "pairs")}
        if min(weights.values()) < 0:
            raise ValueError(f"Expected weights from 0, got {weights}.")


PRESETS = {"paper": RlsSettings(), "code": RlsSettings(data=10.0, density=2e-3, norm=4e-3, pairs=0.5)}


def pairwise_distance(ws: Tensor) -> Tensor:
    """The mean distance between two styles, mean_{l<m} ‖w_l − w_m‖.

    Args:
        ws: Codes (N, L, D).

    Returns:
        Distances (N,); 0 where all styles are equal, with gradient 0.
    """
    pairs = ws.shape[1] * (ws.shape[1] - 1)
    squared = (ws[:, :, None] - ws[:, None]).square().sum(dim=3)  # (N, L, L)
    return ((squared + _INSIDE_ROOT).sqrt() - math.sqrt(_INSIDE_ROOT)).sum(dim=(1, 2)) / pairs


def flow_terms(flow: FlowPrior, ws: Tensor) -> tuple[Tensor, Tensor]:
    """The two priors that the flow gives, as means over styles.

    Args:
        flow: f.
        ws: Codes (N, L, D).

    Returns:
        −log p in nats (N,), and (‖f(w)‖ − √D)² (N,).
    """
    u, log_density = flow(ws)  # (N, L, D), (N, L)
    lengths = (u.square().sum(dim=2) + _INSIDE_ROOT).sqrt()
    return -log_density.mean(dim=1), (lengths - math.sqrt(u.shape[2])).square().mean(dim=1)


def rls_problem(
    synthesis: SynthesisNetwork, flow: FlowPrior | None, operator: Callable[[Tensor], Tensor], settings: RlsSettings
) -> Problem:
    """States the search for `search.loop`: the variable "ws" (N, L, D).

    Args:
        synthesis: The network that draws, with its stored noise maps.
        flow: f; may be None if both of its priors are off.
        operator: The downscaling D.
        settings: The weights.

    Returns:
        The problem.

    Raises:
        ValueError: If a prior needs the flow and there is none.
    """
    if flow is None and (settings.density or settings.norm):
        raise ValueError("Expected a flow for the priors density and norm, got none; set both to 0, or train one.")

    def loss(variables: Rows, codes: Codes, residuals: Tensor) -> Tensor:
        total = settings.data * residuals.abs().sum(dim=1) / math.sqrt(residuals.shape[1])  # mean |D(x) − y| / 2
        if flow is not None and (settings.density or settings.norm):
            density, norm = flow_terms(flow, codes.ws)
            total = total + settings.density * density + settings.norm * norm
        if settings.pairs:
            total = total + settings.pairs * pairwise_distance(codes.ws)
        return total

    return Problem(lambda variables, constants: Codes(variables["ws"]), synthesis, operator, loss=loss)


def rls(
    synthesis: SynthesisNetwork,
    flow: FlowPrior | None,
    operator: Callable[[Tensor], Tensor],
    target: Tensor,
    start: Tensor,
    settings: RlsSettings = PRESETS["paper"],
    callback: Callable[[Step], None] | None = None,
    at_once: int | None = None,
) -> Found:
    """Searches with the regularized latent search.

    Args:
        synthesis: The network that draws, with its stored noise maps.
        flow: f, see `rls_problem`.
        operator: The downscaling D.
        target: LR pictures (N, 3, s, s) in [-1, 1], one per row.
        start: Codes (N, L, D); the mean latent in the paper.
        settings: One of `PRESETS`, or others.
        callback: See `search.loop.search`.
        at_once: See `search.loop.search`.

    Returns:
        The best of each row.
    """
    rate = settings.learning_rate
    optimiser = Adam(lambda number: rate * cycle_with_drop(number, settings.steps))
    problem = rls_problem(synthesis, flow, operator, settings)
    variables = {"ws": start.float()}
    return search(problem, variables, {}, target, optimiser, settings.steps, settings.epsilon, callback, at_once)
