"""Pro-PULSE (Zhou et al. 2022) as an encoder of this project: coarse to fine, without noise inside.

A base head gives one w for all layers, and three style heads say how the layers differ from it. `partial` replaces the
base code only in the coarse layers, which is how its training supervises them. The paper's two encoders share one
backbone here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.encoder import HEAD_SIZE, FeaturePyramid, StyleHead, near_zero
from models.encoder_base import COARSE_STYLES, MEDIUM_STYLES, EncoderBase, Encoding, Features


class ProPulseEncoder(EncoderBase):
    """A deterministic encoder whose styles start from one base code.

    Args:
        resolution: Size R of the generator's faces in pixels.
        num_ws: Number of styles L.
        w_dim: Width D of a style.
        backbone: See `models.encoder.FeaturePyramid`.
        width: Channels of the pyramid.
        canvas: Size that LR faces are brought to; R up to 128 if None.
        rank: See `EncoderBase`.
    """

    def __init__(
        self,
        resolution: int,
        num_ws: int,
        w_dim: int,
        backbone: str = "resnet18",
        width: int = 160,
        canvas: int | None = None,
        rank: int = 0,
    ) -> None:
        canvas = min(resolution, 128) if canvas is None else canvas
        super().__init__(resolution, num_ws, w_dim, canvas, w_dim, rank)
        self.config |= {"variant": "propulse", "backbone": backbone, "width": width, "canvas": canvas}
        self.pyramid = FeaturePyramid(backbone, 4, width)
        counts = (COARSE_STYLES, MEDIUM_STYLES, num_ws - COARSE_STYLES - MEDIUM_STYLES)
        sizes = (canvas // 8, canvas // 4, canvas // 2)
        self.heads = nn.ModuleList(StyleHead(width, s, n, w_dim) for s, n in zip(sizes, counts, strict=True))
        self.base = near_zero(nn.Linear(width * HEAD_SIZE**2, w_dim))

    @property
    def levels(self) -> int:
        """Levels of `partial`: one for each resolution 4, 8, …, R of the generator."""
        return self.num_ws // 2

    def read(self, canvas: Tensor, size: Tensor, sigma: Tensor) -> Features:
        """Looks at faces, see `EncoderBase.read`; the noise is not looked at."""
        known = self.octave(size)[:, None]
        plane = known.to(canvas.dtype)[:, :, None, None].expand(-1, -1, self.canvas, self.canvas)
        levels = self.pyramid(torch.cat([canvas, plane], dim=1))
        return Features([head.read(f) for head, f in zip(self.heads, levels, strict=True)], [], known)  # type: ignore[operator]

    def point(self, features: Features) -> Tensor:
        """Maps what was seen to codes (B, L, D)."""
        return self.partial(features, self.levels)

    def partial(self, features: Features, level: int) -> Tensor:
        """Maps what was seen to codes (B, L, D) whose finer layers are still the base code.

        Args:
            features: See `read`.
            level: How many of the generator's resolutions 4, 8, …, R have layers of their own, two each: 0 gives the
                base code alone, `levels` the point estimate.
        """
        if not 0 <= level <= self.levels:
            raise ValueError(f"Expected a level from 0 to {self.levels}, got {level}.")
        offsets = torch.cat([head(f) for head, f in zip(self.heads, features.styles, strict=True)], dim=1).float()
        own = torch.arange(self.num_ws, device=offsets.device)[:, None] < 2 * level  # (L, 1)
        base = self.base(features.styles[0]).float()[:, None]  # (B, 1, D)
        return self.latents.w_avg + base + torch.where(own, offsets, 0)

    def sample(self, features: Features, noise: Tensor) -> Encoding:
        """Mixes the fine styles with those of random faces, as pSp does; noise (B, k, D)."""
        return self.mixed_styles(self.point(features), noise, COARSE_STYLES + MEDIUM_STYLES)
