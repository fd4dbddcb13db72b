"""Who is on a picture: three published face recognition networks, chosen by name, as losses of trainings.

| name | network | trained on | used as a loss by |
|---|---|---|---|
| `mobilefacenet` | MobileFaceNet, 128-d, see `models.identity` | refined MS-Celeb-1M, ArcFace | the recipes here |
| `ir_se50` | IR-SE50, 512-d | MS1MV2, ArcFace | pSp, e4e |
| `inception_resnet` | Inception-ResNet v1, 512-d, of facenet-pytorch | VGGFace2 | |

All take faces in FFHQ framing. None of them may be the only judge of what was trained with it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoints.layouts import is_named_tensor
from models.checkpoints.unpickler import safe_load
from models.frozen import Frozen
from models.identity import Identity, crop_matrix
from models.pretrained import find_weights
from models.psp_encoder import WIDTHS, ir_se50_layers

IR_SE50 = "model_ir_se50.pth"
IR_SE50_SOURCE = "the links in the README of github.com/eladrich/pixel2style2pixel ('IR-SE50 Model')"
INCEPTION_RESNET = "20180402-114759-vggface2.pt"
INCEPTION_RESNET_URL = f"https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/{INCEPTION_RESNET}"
# Mean box that MTCNN finds in faces in FFHQ framing, as fractions of the side: left, top, width, height. Over 60 faces
# each of celebahq512_val.zip and celeba128_val.zip, which agree within 0.03.
MTCNN_BOX = (0.230, 0.190, 0.544, 0.732)


class FaceEmbedder(Frozen):
    """A face recognition network behind the crop that it was trained for; frozen, and not part of any checkpoint.

    Args:
        network: Maps crops to embeddings (B, E).
        crop: Maps images (B, 3, R, R) in [-1, 1], FFHQ framing, to what the network takes.
    """

    def __init__(self, network: nn.Module, crop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.crop = network, crop
        self.freeze().to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """Embeds faces.

        Args:
            images: Images (B, 3, R, R) in [-1, 1], FFHQ framing.

        Returns:
            Embeddings (B, E) of unit norm; their scalar product compares two persons.

        Raises:
            ValueError: If the images are not square.
        """
        if images.ndim != 4 or images.shape[2] != images.shape[3]:
            raise ValueError(
                f"Expected square images (B, 3, R, R), got {tuple(images.shape)}; crop them to FFHQ framing."
            )
        return F.normalize(self.network(self.crop(images)), dim=1)


def load_face_embedder(name: str) -> Frozen:
    """Loads one of the networks.

    Args:
        name: "mobilefacenet", "ir_se50" or "inception_resnet".

    Returns:
        A network that maps images (B, 3, R, R) in [-1, 1], FFHQ framing, to embeddings (B, E) of unit norm.

    Raises:
        FileNotFoundError: If its weights are not at hand; says which file to put where.
        ValueError: If there is no such network, or the file holds another one.
    """
    if name not in EMBEDDERS:
        raise ValueError(f"Expected a face recognition network among {', '.join(EMBEDDERS)}, got {name!r}.")
    return EMBEDDERS[name]()


class IRSE50(nn.Module):
    """The ArcFace network of pSp's identity loss: faces (B, 3, 112, 112) in [-1, 1] to (B, 512), not normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layer, self.body = ir_se50_layers(WIDTHS)
        width = WIDTHS[-1]
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(width), nn.Dropout(0.6), nn.Flatten(), nn.Linear(width * 7 * 7, 512), nn.BatchNorm1d(512)
        )

    def forward(self, faces: Tensor) -> Tensor:
        """Maps aligned faces to embeddings."""
        return self.output_layer(self.body(self.input_layer(faces)))


def psp_crop(images: Tensor) -> Tensor:
    """Cuts out what pSp's identity loss looks at, 188 of 256 px, and pools it to (B, 3, 112, 112).

    Source: criteria/id_loss.py of eladrich/pixel2style2pixel; larger images are pooled to 256 px first, as e4e does.
    """
    size = images.shape[3]
    if size > 256:
        images = F.adaptive_avg_pool2d(images, 256)
    elif size < 256:
        images = F.interpolate(images, (256, 256), mode="bilinear")
    return F.adaptive_avg_pool2d(images[:, :, 35:223, 32:220], 112)


def mtcnn_crop(images: Tensor) -> Tensor:
    """Cuts out the box that MTCNN finds on average, (B, 3, 160, 160), in facenet-pytorch's range, x · 127.5 / 128."""
    left, top, width, height = MTCNN_BOX
    rows = crop_matrix(images.shape[2], top, height, 160).to(images)  # (160, R)
    columns = crop_matrix(images.shape[3], left, width, 160).to(images)
    return rows @ images @ columns.T * (127.5 / 128)


def _load_ir_se50() -> Frozen:
    return FaceEmbedder(_filled(IRSE50, find_weights(IR_SE50, source=IR_SE50_SOURCE)), psp_crop)


def _load_inception_resnet() -> Frozen:
    from facenet_pytorch import InceptionResnetV1  # late: only those who ask for it need it

    path = find_weights(INCEPTION_RESNET, url=INCEPTION_RESNET_URL, source="facenet-pytorch's weights for VGGFace2")
    return FaceEmbedder(_filled(InceptionResnetV1, path), mtcnn_crop)


def _filled(build: Callable[[], nn.Module], path: Path) -> nn.Module:
    """Makes a network with the tensors of a file; those of a classifier that came with it are left out."""
    with torch.device("meta"):  # no time or random numbers for weights that are replaced at once
        network = build()
    content = safe_load(path)
    given = content if isinstance(content, dict) else {}
    tensors = {n: t for n, t in given.items() if is_named_tensor(n, t) and not n.startswith("logits.")}
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:3]]
        raise ValueError(f"Expected the tensors of {build.__name__} in {path}: {' '.join(lines)[:300]}") from error
    return network


EMBEDDERS: dict[str, Callable[[], Frozen]] = {
    "mobilefacenet": Identity,
    "ir_se50": _load_ir_se50,
    "inception_resnet": _load_inception_resnet,
}
