"""`wplus-adam`, the yardstick of all searches: Adam in W+ with no prior at all, from the mean latent.

    minimise ‖D(G(w)) − y‖² over w = w° + σ x

with σ the standard deviation of w over all its numbers, and a learning rate of a tenth of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.generator import SynthesisNetwork
from search.loop import Codes, Problem, Search
from search.optimizers import Adam, constant


def wplus_adam(
    synthesis: SynthesisNetwork, sigma: float, operator: Callable[[Tensor], Tensor], ws: Tensor, rate: float = 0.1
) -> Search:
    """States the search without a prior from codes w° (N, L, D); its variable is "x" (N, L, D).

    `sigma` is σ of `models.latents.LatentStatistics`, `rate` the learning rate in standard deviations.
    """
    problem = Problem(lambda variables, constants: Codes(constants["ws"] + sigma * variables["x"]), synthesis, operator)
    variables = {"x": torch.zeros_like(ws, dtype=torch.float32)}
    return Search(problem, variables, {"ws": ws.float()}, Adam(constant(rate)))
