"""The StyleGAN2 discriminator (residual blocks, minibatch standard deviation, one logit), and two on frozen features.

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
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models.layers import EqualConv2d, EqualLinear

LIPSCHITZ = 4.0  # of a `FeatureHead`; with 1, of spectral normalization alone, logits never reach the hinge's margin


class ResidualBlock(nn.Module):
    """Halves the size: y = (conv(↓ conv(x)) + skip(↓ x)) / √2."""

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
    """Appends the standard deviation over groups of samples to features (B, C, H, W) as one more channel.

    A group has the largest divisor of B up to `group_size` (Karras et al. 2018, section 3).
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
        """Maps images (B, 3, R, R) in [-1, 1] to logits (B,); higher means more real."""
        x = self.blocks(self.from_rgb(images.contiguous(memory_format=torch.channels_last)))
        x = self.conv(minibatch_stddev(x))
        return self.out(self.fc(x.flatten(1))).squeeze(1).float()


class PooledFeatureDiscriminator(nn.Module):
    """Judges images by the features that a frozen network has of them: one small head per depth.

    A head halves what is larger than 8 px and gives a logit per place. Spectral normalisation keeps it from being
    too sure; the norm is estimated by `normalise`, once a step, and not at every call. Sauer et al. 2021, "Projected
    GANs Converge Faster"; Kumari et al. 2022, "Ensembling Off-the-shelf Models for GAN Training".

    Args:
        widths: Channels of the features.
        hidden: Channels within a head.
    """

    def __init__(self, widths: Sequence[int], hidden: int = 64) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.ModuleList(
                spectral_norm(conv)
                for conv in (
                    nn.Conv2d(width, hidden, 1),
                    nn.Conv2d(hidden, hidden, 3, padding=1),
                    nn.Conv2d(hidden, 1, 1),
                )
            )
            for width in widths
        )
        self.eval()

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps features (B, C_i, H_i, W_i) per depth, of mean square about 1, to logits (B, P_i) of P_i places."""
        logits = []
        for head, x in zip(self.heads, features, strict=True):
            convs = list(head.children())
            x = F.leaky_relu(convs[0](x), 0.2)
            while x.shape[2] > 8:
                x = F.avg_pool2d(x, 2)
            logits.append(convs[2](F.leaky_relu(convs[1](x), 0.2)).flatten(1).float())
        return tuple(logits)

    @torch.no_grad()
    def normalise(self) -> None:
        """Takes one step of the power iteration that estimates the spectral norms."""
        super().train(True)
        for head in self.heads:
            for conv in head.children():
                _ = conv.weight
        super().train(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, see `normalise`; `mode` is ignored."""
        return super().train(False)


class FeatureHead(nn.Module):
    """Judges every place of one level."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.enter = spectral_norm(nn.Conv2d(channels, width, 1))
        self.look = spectral_norm(nn.Conv2d(width, width, 3, padding=1))
        self.judge = spectral_norm(nn.Conv2d(width, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (B, C, H, W) to logits (B, H · W), higher means more real."""
        x = F.leaky_relu(self.enter(features), 0.2)
        return LIPSCHITZ * self.judge(F.leaky_relu(self.look(x), 0.2)).flatten(1)


class FeatureDiscriminator(nn.Module):
    """Judges every place of every level of a frozen network's features.

    A discriminator from scratch knows nothing for thousands of steps; one that sees the features of a network trained
    for something else learns within hundreds (Sauer et al. 2021). Here these are the features that LPIPS has computed
    anyway. The network that judges in evaluations, VGG11, is another one.

    Args:
        scales: Root mean square of each level's features, for photos.
        channels: Channels of each level.
        width: Channels inside the heads.
    """

    scales: Tensor

    def __init__(self, scales: Sequence[float], channels: Sequence[int], width: int = 32) -> None:
        super().__init__()
        self.register_buffer("scales", torch.tensor(scales))  # levels differ in scale; each enters at about 1
        self.heads = nn.ModuleList(FeatureHead(c, width) for c in channels)

    @torch.no_grad()
    def iterate_norms(self) -> None:
        """Takes one power iteration of every spectral norm; until the next call all batches are judged alike."""
        self.train()
        for head in self.heads:
            for layer in head.children():
                layer.weight  # noqa: B018  # computed by the parametrization, which iterates in training mode
        self.eval()

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Judges features (B, C_l, H_l, W_l) of all levels; logits (B, n_l) for each."""
        scaled = [x / scale for x, scale in zip(features, self.scales, strict=True)]
        return [head(x) for head, x in zip(self.heads, scaled, strict=True)]
