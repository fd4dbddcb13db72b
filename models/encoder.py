"""The encoder: a low-resolution face straight to style codes in W+, as an offset from the mean latent.

A timm backbone sees the LR face enlarged bicubically onto a canvas, with its size as a fourth channel. A feature
pyramid (Lin et al. 2017) hands its levels to three style heads, as in pSp (Richardson et al. 2021): coarse styles from
the smallest level, medium ones from the next, fine ones from the largest. A head keeps the place of features: it
shrinks its level to 4x4 and reads all 16 places at once, where pSp convolves down to 1x1 for every single style.

For k > 1 the further candidates mix the fine styles with those of random faces (pSp, section 4.4), each layer as far
as `spread` says; what the input shows stays, what it cannot show varies. A posterior (`models.posterior`) does better.

Coarse to fine (`base`, after Pro-PULSE, Zhou et al. 2022): a base head gives one w for all layers, and the three heads
say how the layers differ from it; `Encoder.partial` replaces the base code only in the coarse layers.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoder_base import COARSE_STYLES, MEDIUM_STYLES, EncoderBase
from models.feedback import HIDDEN
from models.psp_variant import PspVariant

HEAD_SIZE = 4


def _near_zero(linear: nn.Linear) -> nn.Linear:
    """Lets a layer start near the mean latent, whose faces are sane."""
    nn.init.normal_(linear.weight, std=0.1 / math.sqrt(linear.in_features))
    nn.init.zeros_(linear.bias)
    return linear


class StyleHead(nn.Module):
    """Reads a level of the pyramid and gives the styles of several layers.

    Args:
        channels: Channels of the level.
        size: Its height and width.
        num_styles: Number of styles.
        w_dim: Width D of a style.
        rank: Width of a bottleneck before the styles; 0 for none.
    """

    def __init__(self, channels: int, size: int, num_styles: int, w_dim: int, rank: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while size > HEAD_SIZE:
            layers += [nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
            size //= 2
        self.shrink = nn.Sequential(*layers)
        inside, out = channels * HEAD_SIZE**2, num_styles * w_dim
        self.linear: nn.Module = _near_zero(nn.Linear(rank or inside, out))
        if rank:
            self.linear = nn.Sequential(nn.Linear(inside, rank, bias=False), self.linear)
        self.num_styles = num_styles

    def read(self, features: Tensor) -> Tensor:
        """Shrinks features (B, C, S, S) to what the styles are made of (B, C · 16)."""
        return self.shrink(features).contiguous().flatten(1)

    def forward(self, flat: Tensor) -> Tensor:
        """Maps what `read` gave (B, C · 16) to styles (B, num_styles, D)."""
        return self.linear(flat).unflatten(1, (self.num_styles, -1))


class Encoder(EncoderBase):
    """Encodes LR faces of any size from 4 px to the generator's resolution.

    Args:
        resolution: Size R of the generator's faces in pixels.
        num_ws: Number of styles L.
        w_dim: Width D of a style.
        backbone: A timm model that gives features at 1/2, 1/4 and 1/8 once its stem's pooling is taken out.
        width: Channels of the pyramid.
        canvas: Size that LR faces are brought to; R up to 128 if None (half of it with `stem_stride` 1).
        feedback: See `EncoderBase`.
        rank: See `EncoderBase`. Without feedback, the heads speak in these coordinates, unless `scaled_heads` says no.
        posterior: See `EncoderBase`.
        base: A base head gives one w for all layers, from which the others start.
        stem_stride: 2 as the backbone comes, or 1: a canvas half as large gives levels of the same sizes.
        scaled_heads: Whether the heads speak in the coordinates of `models.curvature`; None means what `rank` says.
        head_rank: Width of a bottleneck in the heads, see `models.compression`; 0 for none.
        feedback_hidden: See `EncoderBase`.
        context_rank: See `EncoderBase`.
        feedback_small_rank: See `EncoderBase`.

    Raises:
        ValueError: If resolution or canvas are no powers of two or too small, or a setting contradicts another.
    """

    def __init__(
        self,
        resolution: int,
        num_ws: int,
        w_dim: int,
        backbone: str = "resnet18",
        width: int = 160,
        canvas: int | None = None,
        feedback: int = 0,
        rank: int = 0,
        posterior: str | None = None,
        base: bool = False,
        stem_stride: int = 2,
        scaled_heads: bool | None = None,
        head_rank: int = 0,
        feedback_hidden: int = HIDDEN,
        context_rank: int = 0,
        feedback_small_rank: int = 0,
    ) -> None:
        import timm  # late: it takes longer to import than to encode a face

        canvas = min(resolution, 128) * stem_stride // 2 if canvas is None else canvas
        self._check(resolution, canvas, stem_stride)
        context_dim = 2 * width * HEAD_SIZE**2
        shape = resolution, num_ws, w_dim, canvas
        ranks = context_rank, feedback_small_rank
        super().__init__(*shape, feedback, rank, posterior, context_dim, feedback_hidden, *ranks)
        self.scaled_heads = (rank > 0 and not feedback) if scaled_heads is None else scaled_heads
        if self.scaled_heads and not rank:
            raise ValueError("Expected a rank for scaled heads, got 0; give them one, such as rank 640.")
        self.config |= {"backbone": backbone, "width": width, "canvas": canvas}
        options = {
            "feedback": feedback, "rank": rank, "posterior": posterior, "base": base, "scaled_heads": self.scaled_heads,
            "head_rank": head_rank, "feedback_hidden": feedback_hidden if feedback_hidden != HIDDEN else 0,
            "context_rank": context_rank, "feedback_small_rank": feedback_small_rank,
        }  # fmt: skip
        self.config |= {name: value for name, value in options.items() if value}  # none of them in older bundles
        if stem_stride != 2:
            self.config["stem_stride"] = stem_stride
        self.context_dim = context_dim
        self.backbone = timm.create_model(
            backbone, in_chans=4, features_only=True, out_indices=(1, 2, 3), pretrained=False
        )
        self.backbone.maxpool = nn.Identity()
        if stem_stride == 1:
            first = next(m for m in self.backbone.modules() if isinstance(m, nn.Conv2d))
            first.stride = (1, 1)
        channels: list[int] = self.backbone.feature_info.channels()  # type: ignore[union-attr, operator]
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        counts = (COARSE_STYLES, MEDIUM_STYLES, num_ws - COARSE_STYLES - MEDIUM_STYLES)
        levels = [canvas * 2 // stem_stride // 2**i for i in (3, 2, 1)]
        self.heads = nn.ModuleList(
            StyleHead(width, s, n, w_dim, head_rank) for s, n in zip(levels, counts, strict=True)
        )
        self.base = _near_zero(nn.Linear(width * HEAD_SIZE**2, w_dim)) if base else None

    @staticmethod
    def _check(resolution: int, canvas: int, stem_stride: int) -> None:
        if stem_stride not in (1, 2):
            raise ValueError(f"Expected stem_stride to be 1 or 2, got {stem_stride}.")
        for name, size, smallest in (("resolution", resolution, 32), ("canvas", canvas, 16 * stem_stride)):
            if size < smallest or size & (size - 1):
                raise ValueError(f"Expected {name} to be a power of two from {smallest} px, got {size}.")

    @property
    def levels(self) -> int:
        """Levels of `partial`: one for each resolution 4, 8, …, R of the generator."""
        return self.num_ws // 2

    def read(self, canvas: Tensor, size: Tensor) -> list[Tensor]:
        """Looks at faces that are already on the canvas; those of one batch may have different sizes.

        Args:
            canvas: LR faces as `on_canvas` gives them (B, 3, canvas, canvas), in [-1, 1].
            size: Their LR sizes in pixels (B,).

        Returns:
            Features (B, C · 16) for the coarse, medium and fine styles. The first two are the posterior's context.
        """
        plane = self.octave(size).to(canvas.dtype)[:, None, None, None].expand(-1, 1, self.canvas, self.canvas)
        x = torch.cat([canvas, plane], dim=1).contiguous(memory_format=torch.channels_last)
        levels = [lateral(f) for lateral, f in zip(self.lateral, self.backbone(x), strict=True)]  # fine to coarse
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], scale_factor=2.0, mode="nearest")
        return [head.read(f) for head, f in zip(self.heads, reversed(levels), strict=True)]  # type: ignore[operator]

    def codes(self, features: list[Tensor]) -> Tensor:
        """Maps features to the best guess (B, L, D)."""
        codes = self.latents.w_avg + self._offsets(features)
        return codes if self.base is None else codes + self._base_offset(features)

    def partial(self, features: list[Tensor], level: int) -> Tensor:
        """Maps features to codes whose finer layers are still the base code.

        Args:
            features: See `read`.
            level: How many of the generator's resolutions 4, 8, …, R have layers of their own, two each: 0 gives the
                base code alone, `levels` the best guess.

        Returns:
            Style codes (B, L, D).

        Raises:
            ValueError: If the encoder has no base head, or the level is out of range.
        """
        if self.base is None:
            raise ValueError("Expected an encoder with a base head, this one has none; make it with base=True.")
        if not 0 <= level <= self.levels:
            raise ValueError(f"Expected a level from 0 to {self.levels}, got {level}.")
        offsets = self._offsets(features)
        own = torch.arange(self.num_ws, device=offsets.device)[:, None] < 2 * level  # (L, 1)
        return self.latents.w_avg + self._base_offset(features) + torch.where(own, offsets, 0)

    def _offsets(self, features: list[Tensor]) -> Tensor:
        """What the three heads say (B, L, D), in the units of W."""
        offsets = torch.cat([head(f) for head, f in zip(self.heads, features, strict=True)], dim=1).float()
        return self.latents.unscale(offsets) if self.scaled_heads else offsets

    def _base_offset(self, features: list[Tensor]) -> Tensor:
        assert self.base is not None
        return self.base(features[0]).float()[:, None]  # (B, 1, D)


def create_encoder(
    resolution: int, variant: str = "base", w_dim: int = 512, **architecture: Any
) -> Encoder | PspVariant:
    """Makes an untrained encoder for a generator of a resolution.

    Args:
        resolution: Size R of the generator's faces in pixels.
        variant: "base" is ours, "psp" that of Richardson et al. 2021, see `models.psp_variant`.
        w_dim: Width D of the generator's styles.
        architecture: Further arguments of `Encoder` or `PspVariant`.

    Returns:
        The encoder.

    Raises:
        ValueError: If the variant is unknown.
    """
    num_ws = 2 * int(math.log2(resolution)) - 2
    config = {"resolution": resolution, "num_ws": num_ws, "w_dim": w_dim, **architecture}
    return make_encoder(config if variant == "base" else {"variant": variant, **config})


def make_encoder(config: dict[str, Any]) -> Encoder | PspVariant:
    """Makes an untrained encoder from what `config` of another one says.

    Args:
        config: Arguments of `Encoder`, or with "variant": "psp" those of `PspVariant`.

    Returns:
        The encoder.

    Raises:
        ValueError: If the variant is unknown, or has no such argument.
    """
    kinds: dict[str, type[Encoder] | type[PspVariant]] = {"base": Encoder, "psp": PspVariant}
    arguments = dict(config)
    variant = arguments.pop("variant", "base")
    if variant not in kinds:
        raise ValueError(f"Expected the variant 'base' or 'psp', got {variant!r}.")
    known = inspect.signature(kinds[variant]).parameters
    wrong = sorted(arguments.keys() - known.keys())
    if wrong:
        raise ValueError(f"Expected arguments of {kinds[variant].__name__} ({', '.join(known)}), got {wrong}.")
    return kinds[variant](**arguments)
