"""LPIPS: a distance between images that agrees with people better than one between pixels.

Source: Zhang et al. 2018 "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", version 0.1, on
SqueezeNet 1.1, AlexNet or VGG16. The trunks are torchvision's, the linear weights are those of the package `lpips`; the
forward pass is written for training: the target's features are computed once, and nothing is done twice.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models import alexnet, squeezenet1_1, vgg16

from models.layers import Frozen
from models.pretrained import find_weights

TRUNK = "squeezenet1_1-b8a52dc0.pth"
PUBLISHED = "https://download.pytorch.org/models/"


class Trunk(NamedTuple):
    """A network of ImageNet whose activations are compared."""

    build: Callable[[], nn.Module]  # makes it; its `features` count
    file: str  # its weights, as torchvision publishes them
    taps: tuple[int, ...]  # the layers of `features` whose outputs are compared
    smallest: int  # images in pixels


TRUNKS = {
    "squeeze": Trunk(squeezenet1_1, TRUNK, (1, 4, 7, 9, 10, 11, 12), 16),
    "alex": Trunk(alexnet, "alexnet-owt-7be5be79.pth", (1, 4, 7, 9, 11), 32),
    "vgg": Trunk(vgg16, "vgg16-397923af.pth", (3, 8, 15, 22, 29), 16),
}
# Layers that a discriminator looks at, and the root mean square of what they give for 100 validation faces of 128 px.
FEATURE_SCALES = {4: 3.83, 7: 16.2, 12: 10.3}
# Mean and spread of ImageNet's colours, for images in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


def _load_tensors(net: str) -> dict[str, Tensor]:
    """Reads the state dict of a trunk's `features`."""
    file = TRUNKS[net].file
    source = "torchvision's weights for ImageNet; torch.hub keeps them in torch.hub.get_dir()/checkpoints"
    path = find_weights(file, url=PUBLISHED + file, source=source)
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # VGG16's file is 528 MB
    return {n.removeprefix("features."): t.clone() for n, t in tensors.items() if n.startswith("features.")}


def _load_trunk(net: str) -> nn.Sequential:
    """Builds a trunk with the colour normalisation folded into its first convolution, if that has no padding."""
    with torch.device("meta"):  # no time or random numbers for weights that are replaced at once
        trunk: nn.Sequential = TRUNKS[net].build().features  # type: ignore[assignment]
    trunk.load_state_dict(_load_tensors(net), assign=True)
    first = trunk[0]
    assert isinstance(first, nn.Conv2d) and first.bias is not None
    if first.padding == (0, 0):
        with torch.no_grad():
            first.weight /= torch.tensor(SCALE)[:, None, None]
            first.bias -= (first.weight * torch.tensor(SHIFT)[:, None, None]).sum(dim=(1, 2, 3))
    return trunk[: TRUNKS[net].taps[-1] + 1]


def _load_linear_weights(net: str) -> list[Tensor]:
    """Reads the weights (C,) of the channels, one tensor per tap, from the package `lpips`."""
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("Expected the package lpips, whose linear weights LPIPS uses: pip install lpips.")
    path = Path(package.origin).parent / "weights" / "v0.1" / f"{net}.pth"
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return [tensors[f"lin{i}.model.1.weight"].flatten() for i in range(len(TRUNKS[net].taps))]


class SqueezeNetFeatures(Frozen):
    """Features of ImageNet's SqueezeNet at three depths, of mean square 1 on photos, for a discriminator; frozen.

    Raises:
        FileNotFoundError: If there are no weights; says which file to put where.
    """

    widths = (128, 256, 512)

    def __init__(self) -> None:
        super().__init__()
        self.trunk = _load_trunk("squeeze")
        self.freeze().to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps images (B, 3, H, W) in [-1, 1] to features (B, C, h, w) at about 1/4, 1/8 and 1/16 of the size."""
        x = images.contiguous(memory_format=torch.channels_last)
        features = []
        for i, layer in enumerate(self.trunk):
            x = layer(x)
            if i in FEATURE_SCALES:
                features.append(x / FEATURE_SCALES[i])
        return tuple(features)


class LPIPS(Frozen):
    """The learned perceptual distance; frozen, and not part of any checkpoint.

    d(a, b) = Σ_l mean_{h,w} Σ_c v_lc (â_lchw − b̂_lchw)², with â the features divided by their norm over channels.

    Args:
        net: Trunk: "squeeze", "alex" (that of most papers' tables, and of pSp's loss), or "vgg".

    Raises:
        FileNotFoundError: If there are no weights for the trunk; says which file to put where.
        ValueError: If there is no such trunk.

    Example:
        >>> lpips = LPIPS()
        >>> with torch.no_grad():
        ...     target = lpips.features(faces)
        >>> loss = lpips.distance(lpips.features(samples), target).mean()
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, net: str = "squeeze") -> None:
        super().__init__()
        if net not in TRUNKS:
            raise ValueError(f"Expected LPIPS on one of {', '.join(TRUNKS)}, got {net!r}.")
        self.net = net
        self.trunk = _load_trunk(net)
        for i, weight in enumerate(_load_linear_weights(net)):
            self.register_buffer(f"root{i}", weight.sqrt()[:, None, None], persistent=False)  # v ≥ 0 by its training
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None], persistent=False)
        self.freeze().to(memory_format=torch.channels_last)

    @property
    def width(self) -> int:
        """Channels of all features together, Σ_l C_l."""
        return sum(self.get_buffer(f"root{i}").numel() for i in range(len(TRUNKS[self.net].taps)))

    def activations(self, images: Tensor) -> list[Tensor]:
        """Computes the trunk's activations (B, C_l, H_l, W_l) ≥ 0 at its taps, of images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: If the images have another shape, or less than 16 px, 32 px for AlexNet.
        """
        trunk = TRUNKS[self.net]
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < trunk.smallest:
            raise ValueError(
                f"Expected images (B, 3, H, W) of {trunk.smallest} px or more, got {tuple(images.shape)}; resize them."
            )
        folded = self.trunk[0].padding == (0, 0)
        x = images if folded else (images - self.shift) / self.scale
        x = x.contiguous(memory_format=torch.channels_last)
        activations: list[Tensor] = []
        for i, layer in enumerate(self.trunk):
            x = layer(x)
            if i in trunk.taps:
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
        """Compares images by their `features`: distances (B,), ≥ 0."""
        terms = [(a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(features_a, features_b, strict=True)]
        return torch.stack(terms).sum(dim=0)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Compares images a and b (B, 3, H, W) in [-1, 1]; distances (B,)."""
        return self.distance(self.features(a), self.features(b))
