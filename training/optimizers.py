"""What steps have in common: learning rate, gradients of all processes, averaged weights, and the optimiser of pSp."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Ranger(torch.optim.RAdam):
    """RAdam (Liu et al. 2020) with lookahead and centralised gradients; the defaults are those that pSp trains with.

    Lookahead (Zhang et al. 2019) keeps slow weights, and every k steps moves them by α towards the fast ones and the
    fast ones onto them. Gradient centralisation (Yong et al. 2020) takes the mean out of the gradient of every output.
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


def warmup_cosine(step: int, total: int, warmup: int = 0, decay: bool = True) -> float:
    """Gives the share of the peak learning rate, min(1, (t + 1) / t_w) · (1 + cos(π t / T)) / 2.

    Args:
        step: Step t of the run, from 0.
        total: Steps T of the run; 0 or less for a run without end, which does not decay.
        warmup: Steps t_w over which it rises.
        decay: Whether it falls; if not, only the first factor counts.
    """
    rise = min(1.0, (step + 1) / max(1, warmup))
    if not decay:
        return rise
    progress = min(1.0, step / total) if total > 0 else 0.0
    return rise * 0.5 * (1 + math.cos(math.pi * progress))


def scheduled(
    optimiser: torch.optim.Optimizer, trainer: Trainer, warmup: int = 0, decay: bool = True
) -> OptimizerLRScheduler:
    """Lets an optimiser follow `warmup_cosine` up to the trainer's `max_steps`, in the form that Lightning takes."""

    def factor(step: int) -> float:
        return warmup_cosine(step, trainer.max_steps, warmup, decay)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def average_gradients(trainer: Trainer, parameters: Iterable[Tensor]) -> None:
    """Makes gradients their means over all processes, for steps of several losses, of which DDP knows nothing."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if trainer.world_size == 1 or not gradients:
        return
    means = trainer.strategy.reduce(torch.cat([g.flatten() for g in gradients]), reduce_op="mean")
    for gradient, mean in zip(gradients, means.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def update_average(average: nn.Module, current: nn.Module, halflife: float, step: int) -> None:
    """Moves an averaged network towards the current one, batch statistics included, which would not fit otherwise.

    The half-life is in steps; early in a run it is a tenth of the run.
    """
    update = get_ema_multi_avg_fn(0.5 ** (1 / min(halflife, 0.1 * step + 1)))
    averaged, new = ([t for t in m.state_dict().values() if t.is_floating_point()] for m in (average, current))
    update(averaged, new, None)
