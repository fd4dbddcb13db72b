"""Stops a training that has left the rails, while its weights and its last checkpoint are still good."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.optim import Optimizer


class NonFiniteGuard(Callback):
    """Looks at the gradients of every step, and stops at the first NaN or infinity.

    No checkpoint ever holds NaN: most optimisers are looked at before they step, and those that a training steps past
    Lightning's wrapper before anything is saved. Losses that are scaled (16-mixed) overflow on purpose now and then;
    use bf16-mixed or 32-true with this guard.

    Raises:
        FloatingPointError: In the training, at the step whose gradients are not finite.
    """

    def __init__(self) -> None:
        self._wrapped: set[int] = set()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Checks an optimiser before its step."""
        self._wrapped.add(id(optimizer))
        self._check(trainer, pl_module, optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Checks the other optimisers; Lightning's order of callbacks puts those that save behind this one."""
        for optimizer in trainer.optimizers:
            if id(optimizer) not in self._wrapped:
                self._check(trainer, pl_module, optimizer)

    def _check(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        norms = torch.stack(torch._foreach_norm(gradients, torch.inf))
        if not norms.isfinite().all():
            raise FloatingPointError(self._message(trainer, pl_module))

    def _message(self, trainer: Trainer, module: LightningModule) -> str:
        names = [n for n, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        losses = {n: float(v) for n, v in trainer.callback_metrics.items() if "loss" in n and "val" not in n}
        kept = getattr(trainer.checkpoint_callback, "last_model_path", "") if trainer.checkpoint_callback else ""
        parts: list[Any] = [
            f"Expected finite gradients, got NaN or infinite ones at step {trainer.global_step}, first in {names[0]} "
            f"({len(names)} tensors in all). Losses logged last: {losses}.",
            f"The last good checkpoint is {kept}." if kept else "There is no checkpoint yet.",
            "Nothing of this step was saved. Lower --model.learning_rate, or train with --trainer.precision 32-true; "
            "the same command with that goes on from the last checkpoint.",
        ]
        return " ".join(parts)
