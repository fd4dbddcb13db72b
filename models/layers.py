"""Building blocks of StyleGAN2: equalized layers, FIR resampling, modulated convolutions and blocks of them.

Sources: Karras et al. 2018 (equalized learning rate), Karras et al. 2020 "Analyzing and Improving the Image Quality
of StyleGAN" (FIR resampling, demodulation). Tensor names and layouts follow StyleGAN2-ADA, so its weights fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

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
    """Filters every channel after a transposed convolution: (B, C, H + 1, W + 1) to (B, C, H, W)."""
    return convolve(x, _per_channel(kernel, x), padding=1, groups=x.shape[1])


def upsample_2x(x: Tensor, kernel: Tensor) -> Tensor:
    """Doubles the size of (B, C, H, W) by zero insertion and a filter (4, 4), which keeps the mean if its sum is 4."""
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


class SynthesisLayer(nn.Module):
    """A modulated 3x3 convolution with noise, bias and leaky ReLU.

    y_o = lrelu(d_o (W_o * (s x)) + n + b_o) √2, with s = A(w) and d_o = (Σ_{i,k} (s_i W_{oik})² + 1e-8)^(−1/2).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        w_dim: Width of the style code.
        resolution: Size of the output in pixels.
        up: Double the size first: a transposed convolution followed by the binomial filter.
        conv_clamp: Limit of the result's magnitude, None for none. Official weights that were trained with
            float16 layers have 256, and rely on it.
    """

    noise_const: Tensor
    upsampling_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        up: bool,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.up = up
        self.resolution = resolution
        self.conv_clamp = conv_clamp
        self.affine = EqualLinear(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        if up:
            self.register_buffer("upsampling_filter", upsampling_filter(), persistent=False)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """Computes the next features.

        Args:
            x: Features (B, C_in, H, W).
            w: Style codes (B, D).
            noise: Noise maps (B or 1, 1, H', W'), or None for none.

        Returns:
            Features (B, C_out, H', W'), with H' = 2H if this layer upsamples.
        """
        x, demodulation = self.modulate(x, w)
        factors = demodulation.to(x.dtype)
        # Not addcmul with the bias: its derivative goes through memory once more. In place where there is none.
        x = x * factors if torch.is_grad_enabled() else x.mul_(factors)
        for shift in self._shifts(noise, x.shape[0]):
            x = x.add_(shift.to(x.dtype))  # in place, here and below: nothing keeps what was there
        x = F.leaky_relu_(x, 0.2)
        return x if self.conv_clamp is None else x.clamp(-self.conv_clamp, self.conv_clamp)

    def _shifts(self, noise: Tensor | None, rows: int) -> list[Tensor]:
        """What is added to the features of so many images, in as few passes over them as it takes."""
        bias = (self.bias * SQRT2)[:, None, None]  # (C_out, 1, 1)
        if noise is None:
            return [bias]
        noise = noise * (self.noise_strength * SQRT2)  # (B or 1, 1, H', W')
        if noise.shape[0] < rows:  # one map that all images share is small next to their features
            return [(noise + bias).contiguous(memory_format=torch.channels_last)]
        return [noise, bias]

    def modulate(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Scales features (B, C_in, H, W) by the style of codes (B, D) and convolves.

        Returns:
            W * (s x) (B, C_out, H', W'), and the factors d √2 (B, C_out, 1, 1) that are still to multiply it.
        """
        styles = self.affine(w)  # (B, C_in)
        energy = self.weight.square().sum(dim=(2, 3))  # (C_out, C_in)
        # The gain √2 of the activation is folded into everything that enters it: one pass over the features less.
        demodulation = (F.linear(styles.square(), energy) + 1e-8).rsqrt() * SQRT2  # (B, C_out)
        x = x * styles[:, :, None, None].to(x.dtype)
        if self.up:
            x = convolve(x, self.weight.transpose(0, 1), stride=2, transposed=True)  # (B, C_out, 2H+1, 2W+1)
            x = blur(x, self.upsampling_filter)  # (B, C_out, 2H, 2W)
        else:
            x = convolve(x, self.weight, padding=1)
        return x, demodulation[:, :, None, None]


class ToRGB(nn.Module):
    """A modulated 1x1 convolution to RGB without demodulation.

    Args:
        in_channels: Channels of the features.
        w_dim: Width of the style code.
        conv_clamp: Limit of the magnitude, None for none.
    """

    def __init__(self, in_channels: int, w_dim: int, conv_clamp: float | None = None) -> None:
        super().__init__()
        self.conv_clamp = conv_clamp
        self.affine = EqualLinear(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(3, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.weight_gain = 1.0 / math.sqrt(in_channels)

    def kernels(self, w: Tensor) -> Tensor:
        """Gives the matrix (B, 3, C) from features to colour for style codes (B, D), smaller than they are to scale."""
        return self.weight[:, :, 0, 0] * (self.affine(w) * self.weight_gain)[:, None]

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Maps features (B, C, H, W) and style codes (B, D) to float32 colour (B, 3, H, W)."""
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2) @ self.kernels(w).transpose(1, 2).to(x.dtype)  # (B, H · W, 3)
        y = (pixels.float() + self.bias).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return y if self.conv_clamp is None else y.clamp(-self.conv_clamp, self.conv_clamp)


class SynthesisBlock(nn.Module):
    """One resolution of the synthesis network: two layers (the first block: one) and a colour output.

    Args:
        in_channels: Channels of the block below; 0 for the first block, which starts from a learned constant.
        out_channels: Channels of this block.
        w_dim: Width of the style code.
        resolution: Size of this block in pixels.
        conv_clamp: See `SynthesisLayer`.
    """

    upsampling_filter: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, w_dim: int, resolution: int, conv_clamp: float | None = None
    ) -> None:
        super().__init__()
        if in_channels == 0:
            self.const = nn.Parameter(torch.randn(out_channels, resolution, resolution))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, w_dim, resolution, True, conv_clamp)
            self.register_buffer("upsampling_filter", upsampling_filter(), persistent=False)
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, resolution, False, conv_clamp)
        self.torgb = ToRGB(out_channels, w_dim, conv_clamp)
        self.is_first = in_channels == 0

    @property
    def layers(self) -> list[SynthesisLayer]:
        """The convolution layers, in order."""
        return [self.conv1] if self.is_first else [self.conv0, self.conv1]

    def forward(
        self,
        x: Tensor | None,
        rgb: Tensor | None,
        ws: Sequence[Tensor],
        noise: Sequence[Tensor | None],
        details: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes one resolution.

        Args:
            x: Features of the block below (B, C_in, H/2, W/2), None for the first block.
            rgb: Colour so far (B, 3, H/2, W/2), None for the first block.
            ws: One style code (B, D) per layer and one for the colour output.
            noise: One noise map or None per layer.
            details: What is added to the features (B, C, H, W), None for nothing.

        Returns:
            Features (B, C, H, W) and colour (B, 3, H, W).
        """
        if x is None:
            x = self.const.expand(ws[0].shape[0], -1, -1, -1)
            x = x.contiguous(memory_format=torch.channels_last)
        for layer, w, n in zip(self.layers, ws[:-1], noise, strict=True):
            x = layer(x, w, n)
        if details is not None:
            x = x + details.to(x.dtype)
        y = self.torgb(x, ws[-1])
        if rgb is None:
            return x, y
        with without_autocast(rgb.device.type):  # colour stays float32; in bfloat16, three channels are only slower
            return x, upsample_2x(rgb, self.upsampling_filter) + y
