"""The Fréchet distance between two sets of faces, always named after the network that sees them.

    d² = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)        (Heusel et al. 2017)

`fid` is the usual one on Inception features. `fd_vgg11` has the same formula on the 256 mean-pooled features of an
ImageNet VGG11-BN up to relu3_2: it works offline, on small pictures and small sets, and is *not* comparable to FID.
No loss in this project may use that network, so that the measure stays independent of what is optimised.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from models.frozen import Frozen
from models.pretrained import find_weights

VGG11_SHA256 = "4c40fc816610e5e024e61f3f0052e4d342c656a827fbfa370fb2037dcd664133"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VGG11Features(Frozen):
    """ImageNet VGG11-BN up to relu3_2, pooled to its mean over the picture."""

    num_features = 256
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        path = find_weights("vgg11_bn_features0-13.pth", url=None, sha256=VGG11_SHA256)
        self.layers = torchvision.models.vgg11_bn().features[:14]
        self.layers.load_state_dict(torch.load(path, weights_only=True))
        self.layers.to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (B, 3, H, W), uint8 or in [0, 1], to features (B, 256)."""
        if images.dtype == torch.uint8:
            images = images / 255
        x = (images - self.mean) / self.std
        return self.layers(x.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3)).float()


def frechet_metric(name: str = "auto") -> tuple[str, FrechetInceptionDistance]:
    """Makes the metric object; feed it with `update(images_uint8, real=…)`.

    Args:
        name: "fid" (Inception, downloads its weights), "fd_vgg11" (offline), or "auto": fd_vgg11 where its weights
            are at hand, else fid.

    Returns:
        The name under which the figure must be reported, and the metric.

    Raises:
        ValueError: If the name is unknown.
        FileNotFoundError: If the weights of fd_vgg11 are asked for and missing.
    """
    if name not in ("auto", "fid", "fd_vgg11"):
        raise ValueError(f"Expected a Fréchet distance named auto, fid or fd_vgg11, got {name!r}.")
    if name != "fid":
        try:
            return "fd_vgg11", FrechetInceptionDistance(feature=VGG11Features(), reset_real_features=False)
        except FileNotFoundError:
            if name == "fd_vgg11":
                raise
    return "fid", FrechetInceptionDistance(reset_real_features=False)
