"""The encoders of pSp and e4e, so that their published weights can be compared with ours.

An IR-SE50 backbone (the residual units of Deng et al. 2019 with the channel attention of Hu et al. 2018) gives
features at 1/4, 1/8 and 1/16 of a face of 256 px; a feature pyramid (Lin et al. 2017) merges them, and one
convolutional head per style reads a level down to a single place: styles 0 to 2 from 1/16, 3 to 6 from 1/8, the rest
from 1/4. In pSp (Richardson et al. 2021) each head gives its style as an offset from the mean latent. In e4e (Tov et
al. 2021) the first head gives one offset for all styles, and the others what their style adds to it.

Tensor names are those of the published checkpoints under `encoder.`.

`PspVariant` is called like our own encoder. It sees the LR face blown up bilinearly to 256 px, as in pSp's
super-resolution, and is not told its size. Its styles are offsets from the mean latent; for a generator whose styles
are not 512 wide, a last linear layer narrows them. Samples mix the fine styles, l ≥ 7, with those of random faces (pSp,
section 4.4).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.checkpoints.generators import make_generator
from models.checkpoints.layouts import find_generator, is_named_tensor
from models.checkpoints.unpickler import Opaque, safe_load
from models.encoder_base import EncoderBase, Encoding, Features
from models.layers import EqualLinear
from models.pretrained import find_weights

SIZE = 256
UNITS = (3, 4, 14, 3)  # residual units per stage of a network 50 deep; the first of each halves the size
FIRST_MEDIUM, FIRST_FINE = 3, 7
WIDTHS = (64, 64, 128, 256, 512)  # channels of the stem and of the stages
KINDS = {"GradualStyleEncoder": "psp", "Encoder4Editing": "e4e"}
BACKBONE = "model_ir_se50.pth"
BACKBONE_SOURCE = (
    "IR-SE50 trained for face recognition (github.com/TreB1eN/InsightFace_Pytorch); the README of "
    "github.com/eladrich/pixel2style2pixel links to it"
)


class Squeeze(nn.Module):
    """Channel attention: x · σ(W₂ relu(W₁ mean(x))), with 1/16 of the channels in between (Hu et al. 2018)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Weighs the channels of features (B, C, H, W)."""
        mean = x.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * self.fc2(self.fc1(mean).relu()).sigmoid()


class ResidualUnit(nn.Module):
    """A unit of IR-SE: normalise, convolve, PReLU, convolve, normalise, weigh the channels; added to its input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.shortcut_layer = (
            nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
            if in_channels != out_channels
            else None
        )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.PReLU(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            Squeeze(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C_in, H, W) to (B, C_out, H / stride, W / stride)."""
        skip = x[:, :, :: self.stride, :: self.stride] if self.shortcut_layer is None else self.shortcut_layer(x)
        return skip + self.res_layer(x)


def ir_se50_layers(widths: Sequence[int]) -> tuple[nn.Sequential, nn.Sequential]:
    """Makes the stem and the residual units of IR-SE50, from images (B, 3, H, W) to (B, C, H / 16, W / 16)."""
    below, *stages = widths
    stem = nn.Sequential(nn.Conv2d(3, below, 3, padding=1, bias=False), nn.BatchNorm2d(below), nn.PReLU(below))
    units = []
    for width, count in zip(stages, UNITS, strict=True):
        for i in range(count):
            units.append(ResidualUnit(below, width, 1 if i else 2))
            below = width
    return stem, nn.Sequential(*units)


class Map2Style(nn.Module):
    """Reads one style from a level of the pyramid: convolutions of stride 2 down to one place, and a linear layer."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while size > 1:
            layers += [nn.Conv2d(width, width, 3, stride=2, padding=1), nn.LeakyReLU()]
            size //= 2
        self.convs = nn.Sequential(*layers)
        self.linear = EqualLinear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (B, D, S, S) to styles (B, D)."""
        return self.linear(self.convs(features).flatten(1))


class PspEncoder(nn.Module):
    """The encoder of pSp, or of e4e, from faces of 256 px to W+.

    Args:
        num_ws: Number of styles L.
        kind: "psp", or "e4e" whose first head gives all styles and whose others add to it.
        widths: Channels of the stem and of the backbone's four stages; the last is also the width D of a style.

    Raises:
        ValueError: If the kind is unknown.
    """

    latent_avg: Tensor

    def __init__(self, num_ws: int, kind: str = "psp", widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        if kind not in KINDS.values():
            raise ValueError(f"Expected the kind 'psp' or 'e4e', got {kind!r}.")
        _, *stages = widths
        self.num_ws, self.kind, self.w_dim, self.widths = num_ws, kind, stages[-1], tuple(widths)
        self.input_layer, self.body = ir_se50_layers(widths)
        self.latlayer1 = nn.Conv2d(stages[2], self.w_dim, 1)
        self.latlayer2 = nn.Conv2d(stages[1], self.w_dim, 1)
        self.styles = nn.ModuleList(Map2Style(self.w_dim, SIZE // self._stride(i)) for i in range(num_ws))
        self.register_buffer("latent_avg", torch.zeros(num_ws, self.w_dim))

    @staticmethod
    def _stride(style: int) -> int:
        return 16 if style < FIRST_MEDIUM else 8 if style < FIRST_FINE else 4

    def forward(self, images: Tensor) -> Tensor:
        """Encodes faces (B, 3, 256, 256) in [-1, 1], aligned as in its training: styles (B, L, D), w̄ added.

        Raises:
            ValueError: If the images have another shape.
        """
        if images.ndim != 4 or images.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(
                f"Expected colour faces (B, 3, {SIZE}, {SIZE}), got {tuple(images.shape)}; resize them first, for "
                "example by data.operator."
            )
        return self.offsets(self.pyramid(images)) + self.latent_avg

    def offsets(self, levels: dict[int, Tensor]) -> Tensor:
        """Reads the styles from the levels of `pyramid`: offsets from the mean latent (B, L, D)."""
        styles = [head(levels[self._stride(i)]) for i, head in enumerate(self.styles)]
        codes = torch.stack(styles, dim=1)  # (B, L, D)
        return codes if self.kind == "psp" else torch.cat([codes[:, :1], codes[:, 1:] + codes[:, :1]], dim=1)

    def pyramid(self, images: Tensor) -> dict[int, Tensor]:
        """Gives the levels (B, D, 256 / s, 256 / s) by their stride s = 16, 8, 4, for faces (B, 3, 256, 256)."""
        x, ends = self.input_layer(images), []
        for i, unit in enumerate(self.body):
            x = unit(x)
            if i + 1 in (sum(UNITS[:2]), sum(UNITS[:3]), sum(UNITS)):
                ends.append(x)
        fine, medium, coarse = ends
        medium = self.latlayer1(medium) + _enlarged(coarse)
        return {16: coarse, 8: medium, 4: self.latlayer2(fine) + _enlarged(medium)}


def _enlarged(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def load_psp_encoder(path: str | Path, device: torch.device | str = "cpu", kind: str | None = None) -> PspEncoder:
    """Reads the encoder of a pSp or e4e checkpoint; `load_generator` reads the generator from the same file.

    Args:
        path: The `.pt` file.
        device: Where to put it.
        kind: "psp" or "e4e", for files that do not say; both have the same tensors. None for what the file says.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file holds no such encoder, or one that reads anything but colour pictures.
    """
    path = Path(path)
    content = safe_load(path)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a pSp or e4e checkpoint, a dictionary with tensors under 'state_dict'.")
    options = _options(content)
    start = re.compile(r"(.*\.)?encoder\.")  # under whatever prefix, such as that of DataParallel
    tensors = {start.sub("", n, count=1): t for n, t in state.items() if is_named_tensor(n, t) and start.match(n)}
    encoder = _empty(tensors, kind or _kind(options, path), path)
    tensors["latent_avg"] = _offset(content, options, encoder, path)
    wanted = {name: t.shape for name, t in encoder.state_dict().items()}
    wrong = sorted(n for n in wanted.keys() | tensors.keys() if n not in tensors or wanted.get(n) != tensors[n].shape)
    if wrong:
        raise ValueError(f"{path}: tensors do not make a pSp encoder; missing, surplus or misshaped: {wrong[:10]}.")
    encoder.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}, assign=True)
    return encoder.eval().requires_grad_(False).to(memory_format=torch.channels_last).to(device)


def _options(content: dict) -> dict[str, Any]:
    options = content.get("opts", {})
    options = options.state if isinstance(options, Opaque) and options.state else options  # argparse.Namespace
    return options if isinstance(options, dict) else {}


def _kind(options: dict[str, Any], path: Path) -> str:
    name = options.get("encoder_type")
    if name is None:
        raise ValueError(
            f"{path}: does not say its encoder's type (opts, encoder_type), and pSp and e4e have the same tensors; "
            "pass kind='psp' or kind='e4e'."
        )
    if name not in KINDS:
        raise ValueError(f"{path}: expected an encoder of the type {' or '.join(KINDS)}, got {name}.")
    return KINDS[name]


def _empty(tensors: dict[str, Tensor], kind: str, path: Path) -> PspEncoder:
    """Builds the encoder with the widths and the number of styles of a file's tensors, without memory for its own."""
    stem = tensors.get("input_layer.0.weight")
    ends = [tensors.get(f"body.{last - 1}.res_layer.3.weight") for last in accumulate(UNITS)]  # of every stage
    count = sum(bool(re.fullmatch(r"styles\.\d+\.linear\.weight", name)) for name in tensors)
    kernels = [k for k in (stem, *ends) if k is not None and k.ndim == 4 and 0 not in k.shape]
    if len(kernels) < 5 or count == 0:
        raise ValueError(
            f"{path}: expected the tensors of a pSp or e4e encoder with an IR-SE50 backbone under 'encoder.', "
            f"got {sorted(tensors)[:5] or 'none'}."
        )
    channels = kernels[0].shape[1]
    if channels != 3:
        raise ValueError(
            f"{path}: expected an encoder of colour pictures, got one that reads {channels} channels: sketches or "
            "label maps (label_nc, input_nc), or a picture with a first guess; only those of 3 channels are read."
        )
    with torch.device("meta"):
        return PspEncoder(count, kind, [kernel.shape[0] for kernel in kernels])


def _offset(content: dict, options: dict[str, Any], encoder: PspEncoder, path: Path) -> Tensor:
    """Finds what is added to every code (L, D): the mean latent, unless the encoder was trained without."""
    average = content.get("latent_avg")
    if not options.get("start_from_latent_avg", average is not None):
        return torch.zeros(encoder.num_ws, encoder.w_dim)
    if average is None:  # e4e computes it from its decoder then
        average = make_generator(find_generator(content, path), path).w_avg
    shapes = ((encoder.w_dim,), (1, encoder.w_dim), (encoder.num_ws, encoder.w_dim))
    if not isinstance(average, Tensor) or tuple(average.shape) not in shapes:
        found = tuple(average.shape) if isinstance(average, Tensor) else type(average).__name__
        raise ValueError(
            f"{path}: expected the mean latent {shapes[0]} or {shapes[2]} under 'latent_avg', got {found}."
        )
    return average.float().expand(encoder.num_ws, -1).clone()


class PspVariant(EncoderBase):
    """The encoder of pSp, called like ours.

    Args:
        resolution: Size R of the generator's faces in pixels.
        num_ws: Number of styles L.
        w_dim: Width D of a style.
        rank: See `EncoderBase`.
        widths: Channels of the stem and of the backbone's four stages, see `models.psp.PspEncoder`.
        kind: "psp", or "e4e", whose first head speaks for all styles (Tov et al. 2021).
    """

    def __init__(
        self,
        resolution: int,
        num_ws: int,
        w_dim: int,
        rank: int = 0,
        widths: Sequence[int] = WIDTHS,
        kind: str = "psp",
    ) -> None:
        super().__init__(resolution, num_ws, w_dim, SIZE, w_dim, rank)
        self.config |= {"variant": "psp"} | ({"widths": list(widths)} if tuple(widths) != WIDTHS else {})
        self.config |= {"kind": kind} if kind != "psp" else {}
        self.network = PspEncoder(num_ws, kind, widths)
        self.network.latent_avg = None  # type: ignore[assignment]  # the generator's own, in `latents`, takes its place
        self.narrow = EqualLinear(self.network.w_dim, w_dim) if self.network.w_dim != w_dim else nn.Identity()

    def on_canvas(self, lr: Tensor) -> Tensor:
        """Brings LR faces (B, 3, s, s) of any one size to 256 px, bilinearly as torchvision's Resize does."""
        return F.interpolate(lr, size=(SIZE, SIZE), mode="bilinear", antialias=True)

    def read(self, canvas: Tensor, size: Tensor, sigma: Tensor) -> Features:
        """Looks at faces of 256 px (B, 3, 256, 256); size and noise are not looked at.

        Returns:
            Levels of the pyramid (B, C, 16, 16), (B, C, 32, 32) and (B, C, 64, 64) as features for the styles.
        """
        levels = self.network.pyramid(canvas.contiguous(memory_format=torch.channels_last))
        return Features([levels[stride] for stride in sorted(levels, reverse=True)], [], size[:, None])

    def point(self, features: Features) -> Tensor:
        """Maps the levels of `read` to codes (B, L, D)."""
        coarse, medium, fine = features.styles
        offsets = self.network.offsets({16: coarse, 8: medium, 4: fine})
        return self.latents.w_avg + self.narrow(offsets).float()

    def sample(self, features: Features, noise: Tensor) -> Encoding:
        """Mixes the fine styles with those of random faces; noise (B, k, D)."""
        return self.mixed_styles(self.point(features), noise, FIRST_FINE)

    # ---------------------------------------------------------------- weights of others

    @torch.no_grad()
    def load_backbone(self, file: str | Path = BACKBONE) -> None:
        """Takes the backbone from a face recognition network, as pSp's training does; the heads stay as they are.

        Raises:
            FileNotFoundError: If there is no such file; says which file to put where.
            ValueError: If it holds another network.
        """
        path = Path(file) if Path(file).is_file() else find_weights(str(file), source=BACKBONE_SOURCE)
        content = safe_load(path)
        given = content if isinstance(content, dict) else {}
        tensors = {n: t for n, t in given.items() if is_named_tensor(n, t)}
        wanted = {n: t for n, t in self.network.state_dict().items() if n.startswith(("input_layer.", "body."))}
        wrong = sorted(n for n, t in wanted.items() if n not in tensors or tensors[n].shape != t.shape)
        if wrong:
            raise ValueError(f"{path}: expected the tensors of an IR-SE50 network; missing or misshaped: {wrong[:10]}.")
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])

    @torch.no_grad()
    def load_psp(self, path: str | Path) -> None:
        """Takes all weights from a checkpoint of pSp or e4e; its codes stay exactly its codes.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no encoder of this shape.
        """
        loaded = load_psp_encoder(path)
        found = {"kind": loaded.kind, "num_ws": loaded.num_ws, "w_dim": loaded.w_dim}
        expected = {"kind": self.network.kind, "num_ws": self.num_ws, "w_dim": self.w_dim}
        if found != expected or self.network.w_dim != self.w_dim:
            raise ValueError(f"{path}: expected an encoder with {expected}, found one with {found}.")
        state = loaded.state_dict()
        average = state.pop("latent_avg")  # (L, D); whatever it differs from ours by goes into the heads
        self.network.load_state_dict(state)
        lacking = average - self.latents.w_avg
        if self.network.kind == "e4e":  # the others add to the first
            lacking[1:] -= lacking[0].clone()
        for style, missing in zip(self.network.styles, lacking, strict=True):
            style.linear.bias += missing  # type: ignore[operator, union-attr]
