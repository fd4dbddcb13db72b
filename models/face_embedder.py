"""Who is on a picture: three published face recognition networks, chosen by name, as losses of trainings.

| name | network | trained on | used as a loss by |
|---|---|---|---|
| `mobilefacenet` | MobileFaceNet, 128-d | refined MS-Celeb-1M, ArcFace | the recipes here |
| `ir_se50` | IR-SE50, 512-d | MS1MV2, ArcFace | pSp, e4e |
| `inception_resnet` | Inception-ResNet v1, 512-d, of facenet-pytorch | VGGFace2 | |

All take faces in FFHQ framing. None of them may be the only judge of what was trained with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.checkpoints.layouts import is_named_tensor
from models.checkpoints.unpickler import safe_load
from models.layers import Frozen
from models.pretrained import check_tensors, find_weights
from models.psp import WIDTHS, ir_se50_layers

WEIGHTS = "mobilefacenet_y1.pt"
WEIGHTS_SHA256 = "1ffa18539e319760e070e80901764a3136bb0165035c1a1986c616c44e43b762"  # over the tensors of the network
WEIGHTS_SOURCE = (
    "the MXNet model 'model-y1-test2' (MobileFaceNet) of the InsightFace model zoo, github.com/deepinsight/insightface"
)

IR_SE50 = "model_ir_se50.pth"
IR_SE50_SOURCE = "the links in the README of github.com/eladrich/pixel2style2pixel ('IR-SE50 Model')"
INCEPTION_RESNET = "20180402-114759-vggface2.pt"
INCEPTION_RESNET_URL = f"https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/{INCEPTION_RESNET}"
# Mean box that MTCNN finds in faces in FFHQ framing, as fractions of the side: left, top, width, height. Over 60 faces
# each of celebahq512_val.zip and celeba128_val.zip, which agree within 0.03.
MTCNN_BOX = (0.230, 0.190, 0.544, 0.732)

FACE_SIZE = 112
EMBEDDING_SIZE = 128

# The part of an FFHQ-framed picture, as fractions of its side, that stands for the five-point alignment. The best of
# eleven boxes by the area under the ROC curve (AUC) on 1000 same and 1000 different pairs of the 2,000 CelebA
# validation faces at 128 px: 0.9734. All boxes with sides 0.70 to 0.82 and centres 0.48 to 0.52 down reached 0.9705
# or more, so the exact place hardly matters; alignment by exact landmarks reaches 0.975.
CROP_LEFT, CROP_TOP, CROP_SIZE = 0.110, 0.114, 0.780


class Unit(nn.Module):
    """A convolution, batch normalisation and, where asked, a PReLU; kernels of 1 and 3 keep the size, 7 is unpadded."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        activate: bool = True,
    ) -> None:
        super().__init__()
        padding = 1 if kernel_size == 3 else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels, eps=1e-3)  # MXNet's default eps
        self.act = nn.PReLU(out_channels) if activate else nn.Identity()

    def fold(self) -> None:
        """Folds the normalisation into the convolution: the same result with fewer passes over the features."""
        assert isinstance(self.norm, nn.BatchNorm2d)
        self.conv = fuse_conv_bn_eval(self.conv, self.norm)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C_in, H, W) to (B, C_out, H', W')."""
        return self.act(self.norm(self.conv(x)))


class Bottleneck(nn.Module):
    """An inverted bottleneck: expand by 1x1, filter each channel by 3x3, project by 1x1; stride 1 adds the input."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.sep = Unit(in_channels, width, 1)
        self.dw = Unit(width, width, 3, stride, groups=width)
        self.proj = Unit(width, out_channels, 1, activate=False)
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C_in, H, W) to (B, C_out, H', W')."""
        y = self.proj(self.dw(self.sep(x)))
        return x + y if self.residual else y


class MobileFaceNet(nn.Module):
    """MobileFaceNet "y1": aligned faces to embeddings.

    Its modules bear the names of the MXNet nodes; see `rename_mxnet_tensors`. Only for inference.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {
            "conv_1": Unit(3, 64, 3, stride=2),
            "conv_2_dw": Unit(64, 64, 3, groups=64),
            "dconv_23": Bottleneck(64, 128, 64, stride=2),
            **{f"res_3_block{i}": Bottleneck(64, 128, 64) for i in range(4)},
            "dconv_34": Bottleneck(64, 256, 128, stride=2),
            **{f"res_4_block{i}": Bottleneck(128, 256, 128) for i in range(6)},
            "dconv_45": Bottleneck(128, 512, 128, stride=2),
            **{f"res_5_block{i}": Bottleneck(128, 256, 128) for i in range(2)},
            "conv_6sep": Unit(128, 512, 1),
            "conv_6dw7_7": Unit(512, 512, 7, groups=512, activate=False),
        }
        self.layers = nn.Sequential()
        for name, layer in layers.items():
            self.layers.add_module(name, layer)
        self.fc = nn.Linear(512, EMBEDDING_SIZE)
        self.norm = nn.BatchNorm1d(EMBEDDING_SIZE, eps=2e-5)

    @classmethod
    def from_file(cls, path: Path | str, sha256: str | None = None) -> MobileFaceNet:
        """Loads the network in evaluation mode, with normalisations folded into the convolutions.

        Args:
            path: A `.pt` with a dictionary of tensors by MXNet names.
            sha256: Checksum of the tensors, see `models.pretrained.check_tensors`; None accepts any.

        Raises:
            ValueError: If the file holds other tensors than this network's.
        """
        with torch.device("meta"):  # no time or random numbers for weights that are replaced at once
            network = cls()
        tensors = rename_mxnet_tensors(read_mxnet_tensors(path))
        try:
            network.load_state_dict(tensors, strict=True, assign=True)
        except RuntimeError as error:
            raise ValueError(f"Expected the tensors of MobileFaceNet y1 in {path}: {error}") from error
        if sha256 is not None:
            check_tensors(tensors, sha256, path, "MobileFaceNet y1")
        network.eval().requires_grad_(False)
        for module in network.modules():
            if isinstance(module, Unit):
                module.fold()
        return network.to(memory_format=torch.channels_last)

    def forward(self, faces: Tensor) -> Tensor:
        """Embeds RGB faces (B, 3, 112, 112) in [-1, 1], aligned by five points as ArcFace does: unit vectors (B, 128).

        Raises:
            ValueError: If the faces have another size.
        """
        if faces.ndim != 4 or faces.shape[1:] != (3, FACE_SIZE, FACE_SIZE):
            raise ValueError(
                f"Expected faces of shape (B, 3, {FACE_SIZE}, {FACE_SIZE}), got {tuple(faces.shape)}; "
                "`crop_face` crops and resizes pictures in FFHQ framing."
            )
        # The graph's first nodes: (x255 - 127.5) · 0.0078125, with x255 = 127.5 x + 127.5.
        x = (faces * (127.5 * 0.0078125)).contiguous(memory_format=torch.channels_last)
        x = self.layers(x).flatten(1)  # (B, 512)
        return F.normalize(self.norm(self.fc(x)), dim=1)


def read_mxnet_tensors(path: Path | str) -> dict[str, Tensor]:
    """Reads a `.pt` of tensors by their MXNet names; no code in it is executed. ValueError if it is something else."""
    tensors = safe_load(path)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"Expected {path} to hold a dict of MobileFaceNet's tensors by name; replace it.")
    return tensors


def rename_mxnet_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives the MXNet tensors the names of `MobileFaceNet`.

    | MXNet | here |
    |---|---|
    | `res_3_block0_conv_sep_conv2d_weight` | `layers.res_3_block0.sep.conv.weight` |
    | `…_batchnorm_gamma`, `_beta`, `_moving_mean`, `_moving_var` | `….norm.weight`, `bias`, `running_mean`, … |
    | `…_relu_gamma` | `….act.weight` |
    | `fc1_weight`, `pre_fc1_bias` | `fc.weight`, `fc.bias` |
    | `fc1_gamma` (a node with fix_gamma: taken as 1), `fc1_beta`, … | `norm.weight`, `norm.bias`, … |

    Returns:
        The same tensors by the names of `MobileFaceNet.state_dict()`.
    """
    statistics = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_var": "running_var"}
    renamed = {}
    for name, tensor in tensors.items():
        if name == "fc1_weight":
            new = "fc.weight"
        elif name == "pre_fc1_bias":
            new = "fc.bias"
        elif name.startswith("fc1_"):
            new = f"norm.{statistics.get(name[4:], name[4:])}"
            tensor = torch.ones_like(tensor) if name == "fc1_gamma" else tensor
        else:
            new = re.sub(r"_conv_(sep|dw|proj)_", r".\1_", name)
            new = new.replace("_conv2d_", ".conv.").replace("_relu_gamma", ".act.weight")
            unit, _, statistic = new.partition("_batchnorm_")
            new = f"layers.{unit}.norm.{statistics.get(statistic, statistic)}" if statistic else f"layers.{new}"
        renamed[new] = tensor
        if new.endswith("running_mean"):  # strict loading asks for the step counter, which evaluation never reads
            renamed[new.replace("running_mean", "num_batches_tracked")] = torch.tensor(0)
    return renamed


@lru_cache(maxsize=32)
def crop_matrix(size: int, start: float, extent: float, out: int) -> Tensor:
    """Builds the antialiased bilinear resampling of part of a row as a matrix (out, n) whose rows sum to 1.

    Pillow's convention: a triangle of half-width max(1, scale) around each output's centre, cut at the picture's
    border and normalised. A matrix, because the part need not begin and end on whole pixels; `start` and `extent` are
    fractions of the row of n = `size` pixels.
    """
    scale = extent * size / out
    centres = start * size + (torch.arange(out, dtype=torch.float64) + 0.5) * scale  # (out,)
    pixels = torch.arange(size, dtype=torch.float64) + 0.5  # (n,)
    weights = (1.0 - (pixels - centres[:, None]).abs() / max(scale, 1.0)).clamp(min=0.0)  # (out, n)
    return (weights / weights.sum(dim=1, keepdim=True)).float()


def crop_face(images: Tensor) -> Tensor:
    """Cuts (B, 3, 112, 112) out of faces (B, 3, R, R) in FFHQ framing, as ArcFace's five-point alignment would show.

    Raises:
        ValueError: If the images are not square.
    """
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise ValueError(f"Expected square images (B, 3, R, R), got {tuple(images.shape)}; crop them to FFHQ framing.")
    size = images.shape[-1]
    rows = crop_matrix(size, CROP_TOP, CROP_SIZE, FACE_SIZE).to(images)  # (112, R)
    columns = crop_matrix(size, CROP_LEFT, CROP_SIZE, FACE_SIZE).to(images)
    return rows @ images @ columns.T


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
        """Embeds images (B, 3, R, R) in [-1, 1], FFHQ framing: unit vectors (B, E), compared by their dot product."""
        if images.ndim != 4 or images.shape[2] != images.shape[3]:
            raise ValueError(
                f"Expected square images (B, 3, R, R), got {tuple(images.shape)}; crop them to FFHQ framing."
            )
        return F.normalize(self.network(self.crop(images)), dim=1)


def load_face_embedder(name: str) -> Frozen:
    """Loads "mobilefacenet", "ir_se50" or "inception_resnet".

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


def load_mobilefacenet(path: Path | str | None = None) -> FaceEmbedder:
    """Loads MobileFaceNet behind `crop_face`; embeddings of 128 numbers.

    Args:
        path: The weights, see `MobileFaceNet.from_file`; None looks for `mobilefacenet_y1.pt` with
            `models.pretrained.find_weights`, and accepts only the published tensors.

    Raises:
        FileNotFoundError: If there are no weights; says which file to put where.
        ValueError: If the file holds something else.
    """
    if path:
        return FaceEmbedder(MobileFaceNet.from_file(path), crop_face)
    try:
        path = find_weights(WEIGHTS, source=WEIGHTS_SOURCE)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} Or train with --model.weight_identity 0.") from None
    return FaceEmbedder(MobileFaceNet.from_file(path, WEIGHTS_SHA256), crop_face)


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
    "mobilefacenet": load_mobilefacenet,
    "ir_se50": _load_ir_se50,
    "inception_resnet": _load_inception_resnet,
}
