"""The encoder: a low-resolution face straight to style codes in W+, as an offset from the mean latent.

A timm backbone sees the LR face enlarged bicubically onto a canvas, with its size as a fourth channel. A feature
pyramid (Lin et al. 2017) hands its levels to three style heads, as in pSp (Richardson et al. 2021): coarse styles from
the 1/8 level, medium ones from 1/4, fine ones from 1/2. A head keeps the place of features: it shrinks its level to 4x4
and reads all 16 places at once, where pSp convolves down to 1x1 for every single style.

For k > 1 the further candidates mix the fine styles with those of random faces (pSp, section 4.4), each layer as far
as `spread` says; what the input shows stays, what it cannot show varies.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.operator import Downscale, upscale_bicubic
from models.latents import LatentStatistics

COARSE_STYLES, MEDIUM_STYLES = 3, 4  # as in pSp; all further ones are fine
HEAD_SIZE = 4


class StyleHead(nn.Module):
    """Reads a level of the pyramid and gives the styles of several layers.

    Args:
        channels: Channels of the level.
        size: Its height and width.
        num_styles: Number of styles.
        w_dim: Width D of a style.
    """

    def __init__(self, channels: int, size: int, num_styles: int, w_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        while size > HEAD_SIZE:
            layers += [nn.Conv2d(channels, channels, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
            size //= 2
        self.shrink = nn.Sequential(*layers)
        self.linear = nn.Linear(channels * HEAD_SIZE**2, num_styles * w_dim)
        # Start near the mean latent, whose faces are sane.
        nn.init.normal_(self.linear.weight, std=0.1 / math.sqrt(self.linear.in_features))
        nn.init.zeros_(self.linear.bias)
        self.num_styles = num_styles

    def forward(self, features: Tensor) -> Tensor:
        """Maps features (B, C, S, S) to styles (B, num_styles, D)."""
        flat = self.shrink(features).contiguous().flatten(1)  # (B, C · 16)
        return self.linear(flat).unflatten(1, (self.num_styles, -1))


class Encoder(nn.Module):
    """Encodes LR faces of any size from 4 px to the generator's resolution.

    Args:
        resolution: Size R of the generator's faces in pixels.
        num_ws: Number of styles L.
        w_dim: Width D of a style.
        backbone: A timm model that gives features at 1/2, 1/4 and 1/8 once its stem's pooling is taken out.
        width: Channels of the pyramid.
        canvas: Size that LR faces are enlarged to; R up to 256 if None.
    """

    spread: Tensor
    spread_sizes: Tensor

    def __init__(
        self,
        resolution: int,
        num_ws: int,
        w_dim: int,
        backbone: str = "resnet18",
        width: int = 160,
        canvas: int | None = None,
    ) -> None:
        super().__init__()
        import timm  # late: it takes longer to import than to encode a face

        self.resolution, self.num_ws, self.w_dim = resolution, num_ws, w_dim
        self.canvas = min(resolution, 256) if canvas is None else canvas
        for name, size in (("resolution", resolution), ("canvas", self.canvas)):
            if size < 32 or size & (size - 1):
                raise ValueError(f"Expected {name} to be a power of two from 32 px, got {size}.")
        self.config = {
            "resolution": resolution,
            "num_ws": num_ws,
            "w_dim": w_dim,
            "backbone": backbone,
            "width": width,
            "canvas": self.canvas,
        }
        self.backbone = timm.create_model(
            backbone, in_chans=4, features_only=True, out_indices=(1, 2, 3), pretrained=False
        )
        self.backbone.maxpool = nn.Identity()
        channels: list[int] = self.backbone.feature_info.channels()  # type: ignore[union-attr, operator]
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        counts = (COARSE_STYLES, MEDIUM_STYLES, num_ws - COARSE_STYLES - MEDIUM_STYLES)
        levels = (self.canvas // 8, self.canvas // 4, self.canvas // 2)
        self.heads = nn.ModuleList(StyleHead(width, s, n, w_dim) for s, n in zip(levels, counts, strict=True))
        self.latents = LatentStatistics(w_dim)
        sizes = [2**i for i in range(2, int(math.log2(resolution)) + 1)]
        self.register_buffer("spread_sizes", torch.tensor(sizes, dtype=torch.float32))
        self.register_buffer("spread", torch.zeros(len(sizes), num_ws))

    def forward(self, lr: Tensor, k: int = 1, rng: np.random.Generator | None = None) -> Tensor:
        """Encodes faces; the first of the k codes is the best guess.

        Args:
            lr: LR faces (B, 3, s, s) in [-1, 1], 4 ≤ s ≤ R.
            k: Codes per face.
            rng: Source of the further codes; a fixed seed if None.

        Returns:
            Style codes (B, k, L, D).

        Raises:
            ValueError: If the faces' shape or k is out of range.
        """
        if lr.ndim != 4 or lr.shape[1] != 3 or lr.shape[2] != lr.shape[3]:
            raise ValueError(f"Expected square colour faces (B, 3, s, s), got {tuple(lr.shape)}.")
        if not 4 <= lr.shape[3] <= self.resolution:
            raise ValueError(
                f"Expected faces of 4 to {self.resolution} px, got {lr.shape[3]} px; downscale larger ones first."
            )
        if k < 1:
            raise ValueError(f"Expected k ≥ 1 codes per face, got {k}.")
        size = torch.full((len(lr),), lr.shape[3], device=lr.device)
        best = self.best_guess(self.on_canvas(lr), size)  # (B, L, D)
        if k == 1:
            return best[:, None]
        rng = np.random.default_rng(0) if rng is None else rng
        noise = rng.standard_normal((len(lr), k - 1, self.w_dim), dtype=np.float32)
        return self.mix(best, torch.from_numpy(noise).to(lr.device), self.spread_at(lr.shape[3]))

    def on_canvas(self, lr: Tensor) -> Tensor:
        """Brings LR faces (B, 3, s, s) of any one size to the canvas, bicubically."""
        return upscale_bicubic(lr, self.canvas) if lr.shape[3] <= self.canvas else Downscale(self.canvas)(lr)

    def best_guess(self, canvas: Tensor, size: Tensor) -> Tensor:
        """Encodes faces that are already on the canvas; those of one batch may have different sizes.

        Args:
            canvas: LR faces as `on_canvas` gives them (B, 3, canvas, canvas), in [-1, 1].
            size: Their LR sizes in pixels (B,).

        Returns:
            Style codes (B, L, D).
        """
        octave = (size.to(canvas.dtype) / self.resolution).log2() / 4 + 1  # about [0, 1]
        plane = octave[:, None, None, None].expand(-1, 1, self.canvas, self.canvas)
        x = torch.cat([canvas, plane], dim=1).contiguous(memory_format=torch.channels_last)
        levels = [lateral(f) for lateral, f in zip(self.lateral, self.backbone(x), strict=True)]  # fine to coarse
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], scale_factor=2.0, mode="nearest")
        offsets = torch.cat([head(f) for head, f in zip(self.heads, reversed(levels), strict=True)], dim=1)
        return self.latents.w_avg + offsets.float()

    def spread_at(self, size: int) -> Tensor:
        """Interpolates the spread (L,) for an LR size in pixels, linearly in its logarithm."""
        octaves = self.spread_sizes.log2()
        position = (math.log2(size) - float(octaves[0])) / float(octaves[-1] - octaves[0]) * (len(octaves) - 1)
        row = min(max(int(position), 0), len(octaves) - 2)
        return torch.lerp(self.spread[row], self.spread[row + 1], position - row)

    def mix(self, best: Tensor, noise: Tensor, spread: Tensor) -> Tensor:
        """Adds candidates whose styles are drawn towards random faces: w_l + spread_l (w'_l − w̄).

        Args:
            best: Best guesses (B, L, D).
            noise: Standard normal (B, k − 1, D); one random face each.
            spread: How far each layer moves (L,).

        Returns:
            Style codes (B, k, L, D), the best guess first.
        """
        offset = self.latents.sample(noise) - self.latents.w_avg  # (B, k - 1, D)
        others = best[:, None] + spread[:, None] * offset[:, :, None]  # (B, k - 1, L, D)
        return torch.cat([best[:, None], others], dim=1)


def create_encoder(resolution: int, variant: str = "base", w_dim: int = 512) -> Encoder:
    """Makes an untrained encoder for a generator of a resolution.

    Args:
        resolution: Size R of the generator's faces in pixels.
        variant: "base" is the only one so far.
        w_dim: Width D of the generator's styles.

    Returns:
        The encoder.

    Raises:
        ValueError: If the variant is unknown.
    """
    if variant != "base":
        raise ValueError(f"Expected the variant 'base', got {variant!r}.")
    return Encoder(resolution, num_ws=2 * int(math.log2(resolution)) - 2, w_dim=w_dim)
