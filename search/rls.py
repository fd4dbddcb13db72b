"""Regularized latent search (Gheisari & Genovesio 2022): W+ with three priors, two of them from a flow over W.

    L1(D(G(w)), y) + λ₁ mean_l(−log p(w_l)) + λ₂ mean_l((‖f(w_l)‖ − √D)²) + λ₃ mean_{l<m} ‖w_l − w_m‖

with the mean absolute difference in units of [0, 1], the flow f of `models.flow`, log p in nats; Adam at 0.5 times a
cycle that ends in a drop, 500 steps from the mean latent. k results come from k starts: the mean, and points a fifth of
the way from it to random codes. Weights at 0 switch a prior off.

The weights are those of the paper; the published code has 10 L1, 0.002, 0.004 and 0.5. That code also keeps w in a ball
about the mean, with a radius that it does not give; this is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from models.flow import FlowPrior
from models.generator import SynthesisNetwork
from search.loop import Codes, Problem, Rows, Search
from search.optimizers import Adam
from search.pulse import cycle_with_drop

PERTURBATION = 0.2  # how far starts 2 to k lie from the mean, as a share of the way to a random code
_INSIDE_ROOT = 1e-9  # keeps the gradients of norms finite at zero


@dataclass(frozen=True)
class RlsSettings:
    """The settings; the defaults are the paper's."""

    data: float = 1.0  # weight of the L1 term
    density: float = 1e-4  # λ₁
    norm: float = 2e-4  # λ₂
    pairs: float = 1e-2  # λ₃
    steps: int = 500  # that the schedule is for
    learning_rate: float = 0.5  # peak of the schedule

    def __post_init__(self) -> None:
        """Checks the weights."""
        weights = {name: getattr(self, name) for name in ("data", "density", "norm", "pairs")}
        if min(weights.values()) < 0:
            raise ValueError(f"Expected weights from 0, got {weights}.")


def pairwise_distance(ws: Tensor) -> Tensor:
    """The mean distance between two styles of codes (N, L, D), mean_{l<m} ‖w_l − w_m‖ (N,); its gradient is 0 at 0."""
    pairs = ws.shape[1] * (ws.shape[1] - 1)
    squared = (ws[:, :, None] - ws[:, None]).square().sum(dim=3)  # (N, L, L)
    return ((squared + _INSIDE_ROOT).sqrt() - math.sqrt(_INSIDE_ROOT)).sum(dim=(1, 2)) / pairs


def flow_terms(flow: FlowPrior, ws: Tensor) -> tuple[Tensor, Tensor]:
    """The two priors that a flow f gives of codes (N, L, D), as means over styles.

    Returns:
        −log p in nats (N,), and (‖f(w)‖ − √D)² (N,).
    """
    u, log_density = flow(ws)  # (N, L, D), (N, L)
    lengths = (u.square().sum(dim=2) + _INSIDE_ROOT).sqrt()
    return -log_density.mean(dim=1), (lengths - math.sqrt(u.shape[2])).square().mean(dim=1)


def rls(
    synthesis: SynthesisNetwork,
    flow: FlowPrior | None,
    operator: Callable[[Tensor], Tensor],
    ws: Tensor,
    settings: RlsSettings = RlsSettings(),
) -> Search:
    """States the regularized latent search.

    Args:
        synthesis: The network, with its stored noise maps.
        flow: f; may be None if both of its priors are off.
        operator: The downscaling D.
        ws: Codes to start from (N, L, D); the mean latent in the paper.
        settings: Weights and schedule.

    Returns:
        The search; its variable is "ws" (N, L, D).

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

    rate, steps = settings.learning_rate, settings.steps
    problem = Problem(lambda variables, constants: Codes(variables["ws"]), synthesis, operator, loss=loss)
    return Search(problem, {"ws": ws.float()}, {}, Adam(lambda number: rate * cycle_with_drop(number, steps)))
