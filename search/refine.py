"""Ours: a few steps from the encoder's codes, with the codes held near their start.

    loss = error + λ mean(x²),      plain W+:     w_l = w°_l + σ x_l
                                    whitened W+:  w_l = lrelu₀.₂(lrelu₅(w°_l) + F x_l)
                    curvature:    w = w° + σ P x, see `models.curvature`

where w° is the start and x the offset in standard deviations of the generator's own codes: σ is that of w over all its
numbers, F the factor of the covariance of v = lrelu₅(w), see `models.latents`. In whitened W+, a move along directions
in which the generator's own codes differ much is cheap. The loss is a sum of squares, so that second-order steps apply.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from data.operator import EPSILON
from models.curvature import Curvature
from models.generator import SynthesisNetwork
from models.latents import LatentStatistics, gaussianize, ungaussianize
from search.loop import Codes, Found, Optimiser, Problem, Rows, Step, search
from search.optimisers import LBFGS, Adam, GaussNewton, constant

# What a step of `--refine` may cost: three iterations of L-BFGS, a forward and a backward pass each. Most candidates
# are within the tolerance, and done, long before; few need all of it.
PASSES_PER_STEP = 9
OPTIMISERS = ("adam", "lbfgs", "gauss-newton")
SPACES = ("plain", "whitened", "curvature")


@dataclass(frozen=True)
class RefineSettings:
    """How codes are refined.

    Attributes:
        optimiser: One of `OPTIMISERS`.
        space: One of `SPACES`.
        pull: λ.
        rate: Learning rate of Adam, in standard deviations.

    Raises:
        ValueError: If a name is unknown.
    """

    optimiser: str = "lbfgs"
    space: str = "curvature"
    pull: float = 1e-5
    rate: float = 0.045

    def __post_init__(self) -> None:
        """Checks the names."""
        for name, known in (("optimiser", OPTIMISERS), ("space", SPACES)):
            if getattr(self, name) not in known:
                raise ValueError(f"Expected {name} to be one of {', '.join(known)}, got {getattr(self, name)!r}.")


def plan(settings: RefineSettings, steps: int, spent: int = 0) -> tuple[Optimiser, int]:
    """Spends the work of `steps` steps, nine generator passes each at most, on an optimiser.

    Args:
        settings: Name the optimiser.
        steps: Steps that the work is worth, from 0.
        spent: Generator passes that the start has cost already, such as those of learned feedback.

    Returns:
        The optimiser, and how many steps of its own it may take: none for 0, at least one otherwise.
    """
    budget = PASSES_PER_STEP * steps - 1 - spent  # one pass draws the last face
    chosen: Optimiser
    if settings.optimiser == "adam":
        chosen = Adam(constant(settings.rate), betas=(0.7, 0.9))  # a short memory for few steps
    elif settings.optimiser == "lbfgs":
        chosen = LBFGS()
        budget -= 2 * chosen.exact
    else:
        chosen = GaussNewton(products=max(1, min(4, (budget - 1) // 4)))
    return chosen, max(1, budget // chosen.passes) if steps else 0


def spread_of_w(latents: LatentStatistics, samples: int = 1000) -> float:
    """Gives σ, the standard deviation of w over all its numbers, from samples of its fitted distribution."""
    noise = np.random.default_rng(0).standard_normal((samples, len(latents.mean)), dtype=np.float32)
    w = latents.sample(torch.from_numpy(noise).to(latents.mean))  # (S, D)
    return float((w - w.mean(dim=0)).square().mean().sqrt())


def refine_problem(
    synthesis: SynthesisNetwork,
    latents: LatentStatistics,
    operator: Callable[[Tensor], Tensor],
    settings: RefineSettings,
    curvature: Curvature | None = None,
) -> Problem:
    """States the refinement for `search.loop`: the variable "x" (N, L, D), the constant "start", w° (N, L, D).

    Args:
        synthesis: The network that draws, with its stored noise maps.
        latents: Where its codes lie.
        operator: The downscaling D.
        settings: Name the space and λ.
        curvature: P of the space "curvature".

    Returns:
        The problem.

    Raises:
        ValueError: If P is missing.
    """
    if settings.space == "curvature" and curvature is None:
        raise ValueError('Expected P for the space "curvature", got none; models.curvature.measure_curvature gives it.')
    sigma = spread_of_w(latents)

    def plain(variables: Rows, constants: Rows) -> Codes:
        x = variables["x"] if curvature is None else curvature.scale(variables["x"])
        return Codes(constants["start"] + sigma * x)

    def whitened(variables: Rows, constants: Rows) -> Codes:
        return Codes(ungaussianize(gaussianize(constants["start"]) + variables["x"] @ latents.factor.T))

    def residuals(variables: Rows, downscaling: Tensor) -> Tensor:
        x = variables["x"].flatten(1)  # (N, L · D)
        return torch.cat([downscaling, x * math.sqrt(settings.pull / x.shape[1])], dim=1)

    return Problem(whitened if settings.space == "whitened" else plain, synthesis, operator, residuals)


def refine(
    synthesis: SynthesisNetwork,
    latents: LatentStatistics,
    operator: Callable[[Tensor], Tensor],
    target: Tensor,
    start: Tensor,
    steps: int,
    epsilon: float = EPSILON,
    settings: RefineSettings = RefineSettings(),
    callback: Callable[[Step], None] | None = None,
    at_once: int | None = None,
    curvature: Curvature | None = None,
    spent: int = 0,
) -> Found:
    """Moves codes until their faces downscale to the pictures.

    Args:
        synthesis: The network that draws, with its stored noise maps.
        latents: Where its codes lie.
        operator: The downscaling D.
        target: LR pictures (N, 3, s, s) in [-1, 1], one per row.
        start: Codes (N, L, D).
        steps: Work per row, in gradient steps, from 0; see `plan`.
        epsilon: A row is done once its downscaling error is at most this.
        settings: How.
        callback: See `search.loop.search`.
        at_once: See `search.loop.search`.
        curvature: P of the space "curvature".
        spent: See `plan`.

    Returns:
        The best of each row; `passes` counts those of the search alone.
    """
    optimiser, own_steps = plan(settings, steps, spent)
    if steps == 0:
        settings = replace(settings, space="plain")  # which needs nothing measured
    problem = refine_problem(synthesis, latents, operator, settings, curvature)
    variables, constants = {"x": torch.zeros_like(start, dtype=torch.float32)}, {"start": start.float()}
    return search(problem, variables, constants, target, optimiser, own_steps, epsilon, callback, at_once)
