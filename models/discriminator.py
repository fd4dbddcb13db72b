"""The StyleGAN2 discriminator: residual blocks, minibatch standard deviation, one logit.

Written from Karras et al. 2020, with two changes for speed:

- Average pooling replaces the binomial filter in both branches of a block. On two CPU cores the backward pass of the
  strided depthwise filter in bfloat16 took 30 ms per layer at batch 32, that of the pooling 3 ms.
- The widening convolution of a block comes after the downsampling, at half the size, where the official code filters
  and then convolves with stride 2. The multiply-adds are the same; the convolution is a plain one, which CPUs run
  faster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import EqualConv2d, EqualLinear


class ResidualBlock(nn.Module):
    """Halves the size: y = (conv(↓ conv(x)) + skip(↓ x)) / √2.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = math.sqrt(0.5)
        self.conv0 = EqualConv2d(in_channels, in_channels, 3, activate=True)
        self.conv1 = EqualConv2d(in_channels, out_channels, 3, activate=True, gain=half)
        self.skip = EqualConv2d(in_channels, out_channels, 1, bias=False, gain=half)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C_in, H, W) to (B, C_out, H/2, W/2)."""
        skip = self.skip(F.avg_pool2d(x, 2))
        return self.conv1(F.avg_pool2d(self.conv0(x), 2)) + skip


def minibatch_stddev(x: Tensor, group_size: int = 4) -> Tensor:
    """Appends the standard deviation over groups of samples as one more channel.

    Args:
        x: Features (B, C, H, W).
        group_size: Samples per group; the largest divisor of B up to this is used.

    Returns:
        Features (B, C + 1, H, W).

    References:
        Karras et al. 2018, section 3.
    """
    batch, _, height, width = x.shape
    group = max(g for g in range(1, min(group_size, batch) + 1) if batch % g == 0)
    y = x.float().unflatten(0, (group, -1))  # (G, B/G, C, H, W)
    y = (y.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # (B/G,)
    y = y.to(x.dtype).repeat(group)[:, None, None, None].expand(-1, 1, height, width)
    return torch.cat([x, y], dim=1)


class Discriminator(nn.Module):
    """A StyleGAN2 discriminator.

    Args:
        resolution: Input size R in pixels.
        channels: Widths per resolution 4, 8, …, R (coarse to fine, as for the generator).
    """

    def __init__(self, resolution: int, channels: Sequence[int]) -> None:
        super().__init__()
        if len(channels) != int(math.log2(resolution)) - 1:
            raise ValueError(f"Expected one width per size 4, 8, …, {resolution}, got {len(channels)}.")
        self.from_rgb = EqualConv2d(3, channels[-1], 1, activate=True)
        widths = list(channels)[::-1]  # fine to coarse
        self.blocks = nn.Sequential(*(ResidualBlock(a, b) for a, b in zip(widths, widths[1:], strict=False)))
        self.conv = EqualConv2d(channels[0] + 1, channels[0], 3, activate=True)
        self.fc = EqualLinear(channels[0] * 16, channels[0], activate=True)
        self.out = EqualLinear(channels[0], 1)

    def forward(self, images: Tensor) -> Tensor:
        """Judges images.

        Args:
            images: Images (B, 3, R, R) in [-1, 1].

        Returns:
            Logits (B,), higher means more real.
        """
        x = self.blocks(self.from_rgb(images.contiguous(memory_format=torch.channels_last)))
        x = self.conv(minibatch_stddev(x))
        return self.out(self.fc(x.flatten(1))).squeeze(1).float()
