"""The yardstick of all searches: Adam in plain W+, with no prior at all, from the mean latent.

    minimise ‖D(g(w)) − y‖² over w = w° + σ x

with σ the standard deviation of w over all its numbers, and a learning rate of a tenth of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.generator import SynthesisNetwork
from search.loop import Codes, Found, Problem, Step, search
from search.optimisers import Adam, constant

STEPS = 200


def plain(
    synthesis: SynthesisNetwork,
    sigma: float,
    operator: Callable[[Tensor], Tensor],
    target: Tensor,
    start: Tensor,
    steps: int = STEPS,
    epsilon: float = 0.0,
    rate: float = 0.1,
    callback: Callable[[Step], None] | None = None,
    at_once: int | None = None,
) -> Found:
    """Searches without a prior.

    Args:
        synthesis: The network that draws, with its stored noise maps.
        sigma: σ, see `search.refine.spread_of_w`.
        operator: The downscaling D.
        target: LR pictures (N, 3, s, s) in [-1, 1], one per row.
        start: Codes (N, L, D).
        steps: Steps at most.
        epsilon: A row is done once its downscaling error is at most this.
        rate: Learning rate, in standard deviations.
        callback: See `search.loop.search`.
        at_once: See `search.loop.search`.

    Returns:
        The best of each row.
    """
    problem = Problem(
        lambda variables, constants: Codes(constants["start"] + sigma * variables["x"]), synthesis, operator
    )
    variables, constants = {"x": torch.zeros_like(start, dtype=torch.float32)}, {"start": start.float()}
    return search(problem, variables, constants, target, Adam(constant(rate)), steps, epsilon, callback, at_once)
