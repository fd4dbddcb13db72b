"""The Fréchet distance between two sets of faces, always named after the network that sees them.

    d² = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)        (Heusel et al. 2017)

`fid` is the usual one on Inception features. `fd_vgg11` has the same formula on the 256 mean-pooled features of an
ImageNet VGG11-BN up to relu3_2: it works offline, on small pictures and small sets, and is *not* comparable to FID.
No loss in this project may use that network, so that the measure stays independent of what is optimised.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance

from models.frozen import Frozen
from models.pretrained import check_tensors, find_weights

VGG11_SHORT = "vgg11_bn_features0-13.pth"  # the layers that are needed, 4 MB
VGG11_WHOLE = "vgg11_bn-6002323d.pth"  # torchvision's file, 507 MB
VGG11_URL = f"https://download.pytorch.org/models/{VGG11_WHOLE}"
VGG11_SOURCE = "torchvision's VGG11-BN trained on ImageNet; the short file is the state dict of its features[:14]"
VGG11_SHA256 = "8be5879ce8f87b0dd339d2775440214801186c41a37f8bff35ce5931668df176"  # over the tensors of features[:14]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def load_vgg11_tensors() -> dict[str, Tensor]:
    """Reads the layers of VGG11-BN up to relu3_2, from the short file or from torchvision's.

    Returns:
        The state dict of `torchvision.models.vgg11_bn().features[:14]`.

    Raises:
        FileNotFoundError: If neither is at hand and it cannot be downloaded; says which file to put where.
        ValueError: If the tensors are others than the published ones.
    """
    path = find_weights(VGG11_SHORT, VGG11_WHOLE, url=VGG11_URL, source=VGG11_SOURCE)
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if path.name == VGG11_WHOLE:
        tensors = {name.removeprefix("features."): t for name, t in tensors.items() if name.startswith("features.")}
        tensors = {name: t for name, t in tensors.items() if int(name.split(".")[0]) < 14}
    check_tensors(tensors, VGG11_SHA256, path, "VGG11-BN up to relu3_2")
    return tensors


class VGG11Features(Frozen):
    """ImageNet VGG11-BN up to relu3_2, pooled to its mean over the picture.

    Raises:
        FileNotFoundError: If there are no weights; says which file to put where.
        ValueError: If they are others than the published ones.
    """

    num_features = 256
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        tensors = load_vgg11_tensors()
        with torch.device("meta"):  # no time or random numbers for weights that are replaced at once
            self.layers = torchvision.models.vgg11_bn().features[:14]
        self.layers.load_state_dict(tensors, assign=True)
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

    It reads, and may download, a network's weights: make it when it is first needed.

    Args:
        name: "fid" (Inception, 91 MB), "fd_vgg11" (VGG11-BN), or "auto": fd_vgg11 where its weights can be had, else
            fid.

    Returns:
        The name under which the figure must be reported, and the metric.

    Raises:
        ValueError: If the name is unknown, or weights that were found are not the published ones.
        FileNotFoundError: If the weights that are asked for are missing and cannot be downloaded; says for each
            network which file to put where.
    """
    if name not in ("auto", "fid", "fd_vgg11"):
        raise ValueError(f"Expected a Fréchet distance named auto, fid or fd_vgg11, got {name!r}.")
    reasons = []
    for choice in ("fd_vgg11", "fid") if name == "auto" else (name,):
        try:
            return choice, _make_vgg11_metric() if choice == "fd_vgg11" else _make_inception_metric()
        except FileNotFoundError as error:
            reasons.append(f"{choice}: {error}")
    raise FileNotFoundError("Expected the weights of a network for the Fréchet distance. " + " ".join(reasons))


def _make_vgg11_metric() -> FrechetInceptionDistance:
    return FrechetInceptionDistance(feature=VGG11Features(), reset_real_features=False)


def _make_inception_metric() -> FrechetInceptionDistance:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    except ModuleNotFoundError as error:
        raise FileNotFoundError(f"It needs the package torch-fidelity ({error}); pip install it.") from error
    try:
        return FrechetInceptionDistance(reset_real_features=False)
    except OSError as error:  # URLError and HTTPError, or a folder that cannot be written
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
        raise FileNotFoundError(
            f"Expected Inception's weights {path.name!r}, found none and could not download them ({error}). "
            f"Put the file at {path}. It comes from: {URL_INCEPTION_V3}."
        ) from error
