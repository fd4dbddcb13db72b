"""Layers with a low-rank addition that each row of a batch takes as far as it is told.

    y = W x + g V U x,    g in [0, 1]

At g = 0 the layer is what it was without the addition, so that what it has learned for some inputs stays exactly that
while the addition learns others. V U has few weights. Source: LoRA, Hu et al. 2021, with a factor of its own per row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _add(layer: AdaptedConv2d | AdaptedLinear, x: Tensor, y: Tensor, share: Tensor | None) -> Tensor:
    if layer.narrow is None or layer.wide is None or share is None:
        return y
    return y + layer.wide(layer.narrow(x)) * share.view(-1, *[1] * (y.ndim - 1)).to(y.dtype)


class AdaptedConv2d(nn.Conv2d):
    """A convolution with such an addition.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel.
        rank: Channels between V and U; 0 for no addition.
        options: Further arguments of `torch.nn.Conv2d`: stride and padding, which U shares.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, rank: int = 0, **options: Any) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **options)
        self.narrow = nn.Conv2d(in_channels, rank, kernel_size, bias=False, **options) if rank else None
        self.wide = nn.Conv2d(rank, out_channels, 1, bias=False) if rank else None
        if self.wide is not None:
            nn.init.zeros_(self.wide.weight)

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, out_channels, H', W'); `share` is g (B,), None for zeros."""
        return _add(self, x, super().forward(x), share)


class AdaptedLinear(nn.Linear):
    """A linear layer with such an addition.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        rank: Width between V and U; 0 for no addition.
    """

    def __init__(self, in_features: int, out_features: int, rank: int = 0) -> None:
        super().__init__(in_features, out_features)
        self.narrow = nn.Linear(in_features, rank, bias=False) if rank else None
        self.wide = nn.Linear(rank, out_features, bias=False) if rank else None
        if self.wide is not None:
            nn.init.zeros_(self.wide.weight)

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor:
        """Maps (B, in_features) to (B, out_features); `share` is g (B,), None for zeros."""
        return _add(self, x, super().forward(x), share)


def additions(network: nn.Module) -> list[nn.Parameter]:
    """The weights of all additions in a network, U and V."""
    layers = [m for m in network.modules() if isinstance(m, AdaptedConv2d | AdaptedLinear)]
    parts = [part for m in layers for part in (m.narrow, m.wide) if part is not None]
    return [parameter for part in parts for parameter in part.parameters()]


def can_skip(share: Tensor) -> bool:
    """Whether all of g (B,) is zero, so that the additions need not be computed.

    Where they are trained, they are computed all the same; and while a graph is exported, nobody knows.
    """
    return not torch.is_grad_enabled() and not torch.compiler.is_exporting() and not bool(share.any())
