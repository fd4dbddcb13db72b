"""`amortized`: a few steps from the encodings; what the LR picture does not show stays as it was sampled.

    minimise ‖ρ‖² = mean ((D x − y) / 2)² + λ mean (N (x − x°) / 2)²,    x = G(w° + σ P m, details), x° its start

over moves m, with N = 1 − A⁺A the part of a face that D maps to zero. Back-projection replaces all that D sees; without
the prior the search would pay for a smaller residual with the rest of the face, and samples would become alike. The
encoder's details are held fixed. σ is the standard deviation of the generator's codes and P the preconditioner, in
whose coordinates the LR picture changes evenly (`models.latents`). Sums of squares are nearly quadratic where
the start is near: L-BFGS needs few steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from data.operator import lift
from models.generator import SynthesisNetwork
from models.latents import Preconditioner
from search.loop import Codes, Problem, Rows, Search
from search.optimizers import LBFGS

UNSEEN = 1.0  # λ; see docs/search.md
AT_ONCE = 16  # faces x° that are synthesized together


def amortized(
    synthesis: SynthesisNetwork,
    sigma: float,
    preconditioner: Preconditioner | None,
    operator: Callable[[Tensor], Tensor],
    ws: Tensor,
    details: Mapping[int, Tensor] | None = None,
    unseen: float = UNSEEN,
) -> Search:
    """States the search from encodings.

    Args:
        synthesis: The network, with its stored noise maps.
        sigma: σ of `models.latents.LatentStatistics`.
        preconditioner: P; None for the identity.
        operator: The downscaling D.
        ws: Codes to start from, w° (N, L, D).
        details: What the encoder adds to the features at r px (N, C, r, r), by r; None for nothing.
        unseen: λ.

    Returns:
        The search; its variable is "moves" (N, L, D).
    """
    constants = {f"details {size}": tensor.float() for size, tensor in (details or {}).items()} | {"ws": ws.float()}

    def decode(variables: Rows, constants: Rows) -> Codes:
        moves = variables["moves"] if preconditioner is None else preconditioner.apply(variables["moves"])
        held = {size: constants[f"details {size}"] for size in details or {}}
        return Codes(constants["ws"] + sigma * moves, details=held)

    def unseen_change(images: Tensor, downscaled: Tensor, target: Tensor, constants: Rows) -> Tensor:
        face = constants["face"]
        change = (images - face - lift(downscaled - operator(face), images.shape[-1])).flatten(1)
        return change * (math.sqrt(unseen / change.shape[1]) / 2)

    problem = Problem(decode, synthesis, operator, unseen_change)
    moves = torch.zeros_like(ws, dtype=torch.float32)
    with torch.no_grad():
        constants["face"] = torch.cat(
            [
                problem.synthesize(decode({"moves": moves[i]}, {name: tensor[i] for name, tensor in constants.items()}))
                for i in torch.arange(len(ws), device=ws.device).split(AT_ONCE)
            ]
        )  # x° (N, 3, R, R)
    return Search(problem, {"moves": moves}, constants, LBFGS(), nfe=1)
