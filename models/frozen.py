"""A base class for networks that only measure: losses and metrics whose weights come from elsewhere."""

from __future__ import annotations

from typing import Any, Self

from torch import nn


def _leave_out(*args: Any, **kwargs: Any) -> None:
    """Replaces a module's saving and loading."""


class Frozen(nn.Module):
    """A network that is never trained and never saved.

    It stays in evaluation mode whatever `train()` says, its parameters take no gradient (its inputs do), it adds
    nothing to a state dict, and loading passes it by: a checkpoint of a parent loads strictly with or without it.

    A subclass builds its layers, loads their weights, and calls `freeze()` last.
    """

    def freeze(self) -> Self:
        """Freezes all layers below; those added later are not covered."""
        self.eval().requires_grad_(False)
        for module in self.modules():
            # Per instance, because state_dict() and load_state_dict() recurse into children without asking parents.
            module._save_to_state_dict = _leave_out  # type: ignore[method-assign]
            module._load_from_state_dict = _leave_out  # type: ignore[method-assign]
        return self

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode; `mode` is ignored."""
        return super().train(False)
