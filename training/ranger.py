"""Ranger, the optimiser of pSp: RAdam (Liu et al. 2020) with lookahead and centralised gradients.

Lookahead (Zhang et al. 2019) keeps slow weights, and every k steps moves them by α towards the fast ones and the fast
ones onto them. Gradient centralisation (Yong et al. 2020) takes the mean out of the gradient of every output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Ranger(torch.optim.RAdam):
    """RAdam with lookahead and centralised gradients; the defaults are those that pSp trains with.

    Args:
        params: Parameters.
        lr: Learning rate.
        betas: RAdam's.
        eps: RAdam's.
        every: Steps k between two moves of the slow weights.
        alpha: How far they move.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        every: int = 6,
        alpha: float = 0.5,
    ) -> None:
        super().__init__(params, lr, betas, eps)
        self.every, self.alpha = every, alpha

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step; `closure` computes the loss and its gradients anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in trained:
            if p.grad.ndim > 1:
                p.grad -= p.grad.mean(dim=tuple(range(1, p.grad.ndim)), keepdim=True)
        starts = {p: p.clone() for p in trained if "slow" not in self.state[p]}
        super().step()
        for p in trained:
            state = self.state[p]
            if p in starts:
                state["slow"] = starts[p]
            if int(state["step"]) % self.every == 0:
                state["slow"].lerp_(p, self.alpha)
                p.copy_(state["slow"])
        return loss
