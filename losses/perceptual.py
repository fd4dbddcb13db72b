"""LPIPS: a distance between images that agrees with people better than one between pixels.

Source: Zhang et al. 2018 "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", version 0.1 on
SqueezeNet 1.1. The trunk is torchvision's, the linear weights are those of the package `lpips`; the forward pass is
written for training: the target's features are computed once, and nothing is done twice.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import squeezenet1_1

from models.frozen import Frozen
from models.pretrained import find_weights

TRUNK = "squeezenet1_1-b8a52dc0.pth"
TRUNK_URL = f"https://download.pytorch.org/models/{TRUNK}"
TRUNK_SOURCE = "torchvision's SqueezeNet 1.1 trained on ImageNet; torch.hub keeps it in torch.hub.get_dir()/checkpoints"

# The layers of `squeezenet1_1().features` whose outputs are compared.
TAPS = (1, 4, 7, 9, 10, 11, 12)
# Mean and spread of ImageNet's colours, for images in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


def _load_trunk() -> nn.Sequential:
    """Builds the trunk with the colour normalisation folded into its first convolution, which has no padding."""
    tensors = torch.load(find_weights(TRUNK, url=TRUNK_URL, source=TRUNK_SOURCE), map_location="cpu", weights_only=True)
    with torch.device("meta"):  # no time or random numbers for weights that are replaced at once
        network = squeezenet1_1(weights=None)
    network.load_state_dict(tensors, assign=True)
    trunk = network.features
    with torch.no_grad():
        first = trunk[0]
        first.weight /= torch.tensor(SCALE)[:, None, None]
        first.bias -= (first.weight * torch.tensor(SHIFT)[:, None, None]).sum(dim=(1, 2, 3))
    return trunk


def _load_linear_weights() -> list[Tensor]:
    """Reads the weights (C,) of the channels, one tensor per tap, from the package `lpips`."""
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("Expected the package lpips, whose linear weights LPIPS uses: pip install lpips.")
    path = Path(package.origin).parent / "weights" / "v0.1" / "squeeze.pth"
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return [tensors[f"lin{i}.model.1.weight"].flatten() for i in range(len(TAPS))]


class SqueezeNetFeatures(Frozen):
    """Features of ImageNet's SqueezeNet at three depths, for a discriminator to look at; frozen.

    Raises:
        FileNotFoundError: If there are no weights; says which file to put where.
    """

    widths = (128, 256, 512)

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _load_trunk()
        self.freeze().to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps images (B, 3, H, W) in [-1, 1] to features (B, C, h, w) at about 1/4, 1/8 and 1/16 of the size."""
        x = images.contiguous(memory_format=torch.channels_last)
        features = []
        for i, layer in enumerate(self.trunk):
            x = layer(x)
            if i in (4, 7, 12):
                features.append(x)
        return tuple(features)


class LPIPS(Frozen):
    """The learned perceptual distance on SqueezeNet; frozen, and not part of any checkpoint.

    d(a, b) = Σ_l mean_{h,w} Σ_c v_lc (â_lchw − b̂_lchw)², with â the features divided by their norm over channels.

    Raises:
        FileNotFoundError: If there are no weights for the trunk; says which file to put where.

    Example:
        >>> lpips = LPIPS()
        >>> with torch.no_grad():
        ...     target = lpips.features(faces)
        >>> loss = lpips.distance(lpips.features(drawn), target).mean()
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _load_trunk()
        for i, weight in enumerate(_load_linear_weights()):
            self.register_buffer(f"root{i}", weight.sqrt()[:, None, None], persistent=False)  # v ≥ 0 by its training
        self.freeze().to(memory_format=torch.channels_last)

    @property
    def width(self) -> int:
        """Channels of all features together, Σ_l C_l."""
        return sum(self.get_buffer(f"root{i}").numel() for i in range(len(TAPS)))

    def activations(self, images: Tensor) -> list[Tensor]:
        """Computes the trunk's activations at the seven taps.

        Args:
            images: Images (B, 3, H, W) in [-1, 1], at least 16 px.

        Returns:
            Seven tensors (B, C_l, H_l, W_l), ≥ 0.

        Raises:
            ValueError: If the images have another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 16:
            raise ValueError(f"Expected images (B, 3, H, W) of 16 px or more, got {tuple(images.shape)}; resize them.")
        x = images.contiguous(memory_format=torch.channels_last)
        activations: list[Tensor] = []
        for i, layer in enumerate(self.trunk):
            x = layer(x)
            if i in TAPS:
                activations.append(x)
        return activations

    def normalized(self, activations: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gives `activations` of unit norm over the channels, times √v: what `distance` compares."""
        # The constant keeps the gradient finite where a pixel has no active channel.
        norms = [(x.square().sum(dim=1, keepdim=True) + 1e-20).rsqrt() for x in activations]
        return tuple(
            x * n * self.get_buffer(f"root{i}") for i, (x, n) in enumerate(zip(activations, norms, strict=True))
        )

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        """Computes what `distance` compares, `normalized(activations(images))`."""
        return self.normalized(self.activations(images))

    def distance(self, features_a: Sequence[Tensor], features_b: Sequence[Tensor]) -> Tensor:
        """Compares two images by their features.

        Args:
            features_a: `features` of the first images.
            features_b: `features` of the second, of the same size.

        Returns:
            Distances (B,), ≥ 0, 0 for equal images.
        """
        terms = [(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(features_a, features_b, strict=True)]
        return torch.stack(terms).sum(dim=0)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Compares images a and b (B, 3, H, W) in [-1, 1]; distances (B,)."""
        return self.distance(self.features(a), self.features(b))
