"""The learning rate over a run: a short warm-up, then half a cosine down to zero."""

from __future__ import annotations

import math

import torch
from lightning import Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler


def warmup_cosine(step: int, total: int, warmup: int = 0, decay: bool = True) -> float:
    """Gives the share of the peak learning rate, min(1, (t + 1) / t_w) · (1 + cos(π t / T)) / 2.

    Args:
        step: Step t of the run, from 0.
        total: Steps T of the run; 0 or less for a run without end, which does not decay.
        warmup: Steps t_w over which it rises.
        decay: Whether it falls; if not, only the first factor counts.

    Returns:
        The factor, in [0, 1].
    """
    rise = min(1.0, (step + 1) / max(1, warmup))
    if not decay:
        return rise
    progress = min(1.0, step / total) if total > 0 else 0.0
    return rise * 0.5 * (1 + math.cos(math.pi * progress))


def scheduled(
    optimiser: torch.optim.Optimizer, trainer: Trainer, warmup: int = 0, decay: bool = True
) -> OptimizerLRScheduler:
    """Lets an optimiser follow `warmup_cosine`, step by step, in the form that Lightning takes.

    Args:
        optimiser: With the peak learning rate.
        trainer: Its `max_steps` are those of the run, also where they are raised for a run that goes on.
        warmup: See `warmup_cosine`.
        decay: See `warmup_cosine`.

    Returns:
        Optimiser and schedule.
    """

    def factor(step: int) -> float:
        return warmup_cosine(step, trainer.max_steps, warmup, decay)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
