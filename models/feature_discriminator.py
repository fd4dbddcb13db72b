"""A discriminator on the features of a frozen network: small heads that judge every place of every level.

A discriminator from scratch knows nothing for thousands of steps. One that sees the features of a network trained for
something else learns within hundreds (Sauer et al. 2021, "Projected GANs Converge Faster"). Here these are the
features that LPIPS has computed anyway, so it costs next to nothing. The network that judges in evaluations, VGG11, is
another one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

LIPSCHITZ = 4.0  # of a head; with 1, which spectral normalization alone gives, logits never reach the hinge's margin


class FeatureHead(nn.Module):
    """Judges every place of one level.

    Args:
        channels: Channels of the level.
        width: Channels inside.
    """

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
    """Heads on several levels of features.

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
