"""The networks that measure and never train: VGG11 for textures, Inception for the FID, EdgeFace for identity.

No loss in this project may use them, so that what they say stays independent of what is optimised.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchmetrics.image.fid import NoTrainInceptionV3

from models.face_embedder import crop_face
from models.layers import Frozen
from models.pretrained import check_tensors, find_weights

VGG11_SHORT = "vgg11_bn_features0-13.pth"  # the layers that are needed, 4 MB
VGG11_WHOLE = "vgg11_bn-6002323d.pth"  # torchvision's file, 507 MB
VGG11_URL = f"https://download.pytorch.org/models/{VGG11_WHOLE}"
VGG11_SOURCE = "torchvision's VGG11-BN trained on ImageNet; the short file is the state dict of its features[:14]"
VGG11_SHA256 = "8be5879ce8f87b0dd339d2775440214801186c41a37f8bff35ce5931668df176"  # over the tensors of features[:14]

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"

EDGEFACE = ("edgeface_xxs.safetensors", "edgeface_xxs.pt")
EDGEFACE_SOURCE = "EdgeFace-XXS of its authors (George et al. 2024), github.com/otroshi/edgeface, under their own terms"


def load_vgg11_tensors() -> dict[str, Tensor]:
    """Reads the state dict of torchvision's VGG11-BN up to relu3_2, from the short file or from torchvision's."""
    path = find_weights(VGG11_SHORT, VGG11_WHOLE, url=VGG11_URL, source=VGG11_SOURCE)
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    if path.name == VGG11_WHOLE:
        tensors = {name.removeprefix("features."): t for name, t in tensors.items() if name.startswith("features.")}
        tensors = {name: t for name, t in tensors.items() if int(name.split(".")[0]) < 14}
    check_tensors(tensors, VGG11_SHA256, path, "VGG11-BN up to relu3_2")
    return tensors


class VGG11Features(Frozen):
    """ImageNet VGG11-BN up to relu3_2, averaged over the picture: 256 features of colour and texture.

    Raises:
        FileNotFoundError: If there are no weights; says which file to put where.
        ValueError: If they are not the published ones.
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
        self.register_buffer("mean", torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None], persistent=False)
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (B, 3, H, W), uint8 or in [0, 1], to features (B, 256)."""
        if images.dtype == torch.uint8:
            images = images / 255
        x = (images - self.mean) / self.std
        return self.layers(x.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3)).float()


class InceptionFeatures(Frozen):
    """The Inception network of the usual FID, as torch-fidelity converted it from TensorFlow: 2048 features.

    Raises:
        FileNotFoundError: If there are no weights; says which file to put where.
    """

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        path = find_weights(INCEPTION, url=INCEPTION_URL, source="torch-fidelity, 91 MB")
        # Pictures are resized without antialiasing, as for the published figures.
        self.network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path), antialias=False)
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Maps images (B, 3, H, W), uint8 or in [0, 1], to features (B, 2048)."""
        return self.network(images if images.dtype == torch.uint8 else (images * 255).round().byte()).float()


class EdgeFace(Frozen):
    """EdgeFace-XXS (George et al. 2024): embeds faces, and copes with blurred ones better than MobileFaceNet.

    Args:
        path: A file of its weights; None looks for them with `models.pretrained.find_weights`.

    Raises:
        FileNotFoundError: If there are no weights; says which file to put where.
        ValueError: If the file holds another network.
    """

    num_features = 512

    def __init__(self, path: Path | str | None = None) -> None:
        super().__init__()
        path = Path(path) if path else find_weights(*EDGEFACE, source=EDGEFACE_SOURCE)
        safe = path.suffix == ".safetensors"
        tensors = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):
            self.network = timm.create_model("edgenext_xx_small", num_classes=self.num_features)
        try:
            # The authors' file has one more module around the network.
            tensors = {name.removeprefix("model."): tensor.float() for name, tensor in tensors.items()}
            self.network.load_state_dict(tensors, assign=True)
        except RuntimeError as error:
            raise ValueError(f"Expected the tensors of EdgeFace-XXS in {path}: {error}") from error
        self.freeze()

    def forward(self, images: Tensor) -> Tensor:
        """Embeds faces (B, 3, R, R) in [-1, 1], FFHQ framing: unit vectors (B, 512), compared by their dot product."""
        return F.normalize(self.network(crop_face(images)).float(), dim=1)
