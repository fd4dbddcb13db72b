"""Building blocks of StyleGAN2: equalized layers, FIR resampling, and the scaled leaky ReLU.

Sources: Karras et al. 2018 (equalized learning rate), Karras et al. 2020 "Analyzing and Improving the Image Quality
of StyleGAN" (FIR resampling, demodulation). Tensor names and layouts follow StyleGAN2-ADA, so its weights fit.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SQRT2 = math.sqrt(2.0)


def upsampling_filter() -> Tensor:
    """Builds the binomial filter [1, 3, 3, 1] ⊗ [1, 3, 3, 1] for an upsampling by 2.

    Modules keep it as a buffer that is not saved: built in place, it would be copied to the GPU at every call.

    Returns:
        The kernel (4, 4), of sum 4, which makes up for the zeros between the pixels; exact in every float type.
    """
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps) / 16.0


def _per_channel(kernel: Tensor, x: Tensor) -> Tensor:
    return kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)


def convolve(
    x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0, groups: int = 1, transposed: bool = False
) -> Tensor:
    """Convolves; where the kernel takes no gradient, nothing is kept for the backward pass but the kernel.

    torch itself keeps the input as well, which through a frozen generator is two fifths of all that is kept.

    Args:
        x: Features (B, C_in, H, W).
        weight: Kernel, as `F.conv2d` or `F.conv_transpose2d` takes it.
        stride: Of a transposed convolution; others have 1, whose adjoint has one size alone.
        padding: Of either.
        groups: Of either.
        transposed: Which of the two.

    Returns:
        Features (B, C_out, H', W').
    """
    kept = x.requires_grad and torch.is_grad_enabled() and not weight.requires_grad
    if kept and not torch.compiler.is_compiling():  # which decides for itself what to keep
        return _FrozenConvolution.apply(x, weight, stride, padding, groups, transposed)
    operation = F.conv_transpose2d if transposed else F.conv2d
    return operation(x, weight, None, stride, padding, groups=groups)


class _FrozenConvolution(torch.autograd.Function):
    """A convolution as the linear map that it is: its adjoint is the transposed one with the same kernel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int, groups: int, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.settings = stride, padding, groups, not transposed
        operation = F.conv_transpose2d if transposed else F.conv2d
        return operation(x, weight, None, stride, padding, groups=groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        return convolve(gradient, weight.to(gradient.dtype), *ctx.settings), None, None, None, None, None


def blur(x: Tensor, kernel: Tensor) -> Tensor:
    """Filters every channel after a transposed convolution, which leaves one row and one column too many.

    Args:
        x: Features (B, C, H + 1, W + 1).
        kernel: The filter (4, 4).

    Returns:
        Features (B, C, H, W).
    """
    return convolve(x, _per_channel(kernel, x), padding=1, groups=x.shape[1])


def upsample_2x(x: Tensor, kernel: Tensor) -> Tensor:
    """Doubles the size by zero insertion and a filter.

    Args:
        x: Images or features (B, C, H, W).
        kernel: The filter (4, 4); of sum 4 it keeps the mean.

    Returns:
        (B, C, 2H, 2W).
    """
    return convolve(x, _per_channel(kernel, x), stride=2, padding=1, groups=x.shape[1], transposed=True)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Keeps the precision of the tensors: torch's autocast is off, on kinds of devices that have one."""
    available = torch.amp.is_autocast_available(device)  # not on "meta"
    return torch.autocast(device, enabled=False) if available else nullcontext()


class EqualLinear(nn.Module):
    """A linear layer with equalized learning rate.

    y = x (W m / √n)ᵀ + b m, with n inputs and learning-rate multiplier m.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias_init: Initial value of every bias (1 for styles, so that they start as the identity).
        lr_multiplier: m above; the mapping network uses 0.01.
        activate: Follow by a leaky ReLU with slope 0.2 and gain √2.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias_init: float = 0.0,
        lr_multiplier: float = 1.0,
        activate: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init / lr_multiplier))
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in_features) to (..., out_features)."""
        y = F.linear(x, self.weight * self.weight_gain, self.bias * self.bias_gain)
        return F.leaky_relu(y, 0.2) * SQRT2 if self.activate else y


class EqualConv2d(nn.Module):
    """A convolution with equalized learning rate and, where asked, a leaky ReLU with gain.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd; the size is kept.
        bias: Add a bias.
        activate: Follow by a leaky ReLU with slope 0.2 and gain √2.
        gain: Factor on the result; for activated layers folded into weight and bias, which is the same because the
            leaky ReLU is positively homogeneous, and saves a pass over the features.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool = True,
        activate: bool = False,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.gain = gain * SQRT2 if activate else gain
        self.weight_gain = self.gain / math.sqrt(in_channels * kernel_size**2)
        self.padding = kernel_size // 2
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, H, W) to (B, out_channels, H, W)."""
        bias = None if self.bias is None else self.bias * self.gain
        y = F.conv2d(x, self.weight * self.weight_gain, bias, padding=self.padding)
        return F.leaky_relu(y, 0.2) if self.activate else y
