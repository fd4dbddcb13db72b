"""The stochastic encoder E(y, ε): a low-resolution face and noise straight to style codes in W+ and details.

    y ─► backbone ─► pyramid ─┬─► style heads ──► w̄ + offsets ─┐
                              ├─► sampler(·, ε) ──► moves ──────┴─► ws (B, k, L, D)
                              └─► detail heads(·, sampler) ───────► details {r: (B, k, C, r, r)}

A timm backbone sees the face enlarged bicubically onto a canvas, with its size and its noise level as two more
channels. A feature pyramid (Lin et al. 2017) hands its levels to three style heads, as in pSp (Richardson et al. 2021).
A head keeps the place of features: it shrinks its level to 4x4 and reads all 16 places at once, where pSp convolves
down to 1x1 for every single style.

The noise enters the sampler, a small network that sees what the heads see, so how far samples spread follows from the
face: each ε is one explanation of it. ε = 0 is the point estimate. A part of ε lies in planes over the face and goes
to the details alone.

W+ is too narrow for faces of 24 px and more, and loses small traits of 16 px: details are added to the generator's
features at two sizes, as in GLEAN (Chan et al. 2021) and GFPGAN (Wang et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoder_base import COARSE_STYLES, MEDIUM_STYLES, EncoderBase, Encoding, Features

HEAD_SIZE = 4
NOISE_PER_STYLE = 32
NOISE_PLANES = 2  # per size of details
# Grey levels, from 16 px on; more for smaller faces. The most that one of 500 clean faces was guessed to have: 12.6 at
# 8 px, 6.5 at 16 px, 7.1 at 32 px.
LEAST_NOISE = 8.0


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
        self.linear: nn.Module = near_zero(nn.Linear(rank or inside, out))
        if rank:
            self.linear = nn.Sequential(nn.Linear(inside, rank, bias=False), self.linear)
        self.num_styles = num_styles

    def read(self, features: Tensor) -> Tensor:
        """Shrinks features (B, C, S, S) to what the styles are made of (B, C · 16)."""
        return self.shrink(features).contiguous().flatten(1)

    def forward(self, flat: Tensor) -> Tensor:
        """Maps what `read` gave (B, C · 16) to styles (B, num_styles, D)."""
        return self.linear(flat).unflatten(1, (self.num_styles, -1))


def near_zero(linear: nn.Linear) -> nn.Linear:
    """Lets a layer start near the mean latent, whose faces are sane."""
    nn.init.normal_(linear.weight, std=0.1 / math.sqrt(linear.in_features))
    nn.init.zeros_(linear.bias)
    return linear


class FeaturePyramid(nn.Module):
    """A timm backbone and the levels above it (Lin et al. 2017), at 1/8, 1/4 and 1/2 of the canvas.

    Args:
        backbone: A timm model that gives features at 1/2, 1/4 and 1/8 once its stem's pooling is taken out.
        in_channels: Channels of the input.
        width: Channels of every level.
    """

    def __init__(self, backbone: str, in_channels: int, width: int) -> None:
        super().__init__()
        import timm  # late: it takes longer to import than to encode a face

        self.backbone = timm.create_model(
            backbone, in_chans=in_channels, features_only=True, out_indices=(1, 2, 3), pretrained=False
        )
        self.backbone.maxpool = nn.Identity()
        channels: list[int] = self.backbone.feature_info.channels()  # type: ignore[union-attr, operator]
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps images (B, C, S, S) to three levels (B, width, ·, ·), coarse to fine."""
        features = self.backbone(x.contiguous(memory_format=torch.channels_last))
        levels = [lateral(f) for lateral, f in zip(self.lateral, features, strict=True)]  # fine to coarse
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], scale_factor=2.0, mode="nearest")
        return levels[::-1]


class Sampler(nn.Module):
    """A residual multilayer perceptron that sees a face and noise.

    Args:
        seen: Width of what is seen of the face.
        noise_dim: Width E of the noise.
        hidden: Width H.
        num_ws: Number of styles L.
        w_dim: Width D of a style.
        depth: Residual layers.
    """

    def __init__(self, seen: int, noise_dim: int, hidden: int, num_ws: int, w_dim: int, depth: int = 3) -> None:
        super().__init__()
        self.seen, self.noise = nn.Linear(seen, hidden), nn.Linear(noise_dim, hidden)
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(depth + 1))
        self.out = nn.Linear(hidden, num_ws * w_dim)
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.zeros_(self.out.bias)
        self.num_ws = num_ws

    def forward(self, seen: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Maps what is seen (B, C) and noise (B, k, E) to features (B, k, H) and moves of the codes (B, k, L, D)."""
        h = self.seen(seen)[:, None] + 2 * self.noise(noise)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            h = h + layer(F.silu(norm(h)))
        h = F.silu(self.norms[-1](h))
        return h, self.out(h).unflatten(-1, (self.num_ws, -1))


class DetailHead(nn.Module):
    """Makes features to add to the generator's at one size: a level of the pyramid, modulated by the sampler.

    Noise of its own at every place lets distant parts of a face vary independently; the level says how much, where.

    Args:
        width: Channels of the level.
        hidden: Width H of the sampler's features.
        channels: Channels C of the generator at this size.
    """

    def __init__(self, width: int, hidden: int, channels: int) -> None:
        super().__init__()
        self.shared = nn.Conv2d(width, channels, 3, padding=1)
        self.modulation = near_zero(nn.Linear(hidden, 2 * channels))
        self.grain = nn.Conv2d(NOISE_PLANES, channels, 3, padding=1, bias=False)
        self.gain = nn.Conv2d(width, channels, 1)
        nn.init.zeros_(self.gain.weight)
        nn.init.constant_(self.gain.bias, 0.2)  # type: ignore[arg-type]
        self.out = nn.Conv2d(channels, channels, 3, padding=1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, level: Tensor, hidden: Tensor, noise: Tensor) -> Tensor:
        """Maps a level (B, width, r, r), sampler features (B, k, H) and noise (B, k, 2, r, r) to (B, k, C, r, r)."""
        scale, shift = self.modulation(hidden)[..., None, None].chunk(2, dim=2)  # (B, k, C, 1, 1)
        grain = self.grain(noise.flatten(0, 1)).unflatten(0, noise.shape[:2])
        x = F.silu(self.shared(level)[:, None] * (1 + scale) + shift + self.gain(level)[:, None] * grain)
        rows = x.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.out(rows).unflatten(0, hidden.shape[:2])


class NoiseEstimator(nn.Module):
    """Guesses the standard deviation of the noise in LR faces of any size from their second differences.

    Noise is as strong in second differences as in the picture, faces are weak there, and weaker still in differences of
    colours (Immerkær 1996, "Fast Noise Variance Estimation", has the first filter). A small network weighs how strong
    each filter answers in each colour.

    Args:
        width: Width of the network.
    """

    filters: Tensor
    colours: Tensor

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        second, flat = torch.tensor([1.0, -2.0, 1.0]), torch.tensor([0.0, 1.0, 0.0])
        pairs = ((second, second), (second, flat), (flat, second))
        bank = torch.stack([torch.outer(a, b) / torch.outer(a, b).norm() for a, b in pairs])
        self.register_buffer("filters", bank[:, None], persistent=False)  # (3, 1, 3, 3)
        colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])
        self.register_buffer("colours", F.normalize(colours), persistent=False)  # brightness and two differences
        self.layers = nn.Sequential(
            nn.Linear(19, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1)
        )

    def forward(self, lr: Tensor, octave: Tensor) -> Tensor:
        """Maps LR faces (B, 3, s, s) and `EncoderBase.octave` of their size (B,) to log(1 + σ), σ in grey levels."""
        x = (self.colours.to(lr) @ lr.flatten(2)).unflatten(2, lr.shape[2:]) * 127.5
        x = F.conv2d(x.flatten(0, 1)[:, None], self.filters.to(lr)).unflatten(0, lr.shape[:2]).flatten(1, 2)
        strong = [(x.square().mean(dim=(2, 3)) + 0.1).log(), (x.abs().mean(dim=(2, 3)) + 0.1).log()]  # (B, 9) each
        return self.layers(torch.cat([*strong, octave[:, None].to(lr)], dim=1))[:, 0].float()


class Encoder(EncoderBase):
    """The stochastic encoder of LR faces of any size from 4 px to the generator's resolution.

    Args:
        resolution: Size R of the generator's faces in pixels.
        num_ws: Number of styles L.
        w_dim: Width D of a style.
        channels: The generator's widths per resolution 4, 8, …, R.
        backbone: See `FeaturePyramid`.
        width: Channels of the pyramid.
        canvas: Size that LR faces are brought to; R up to 128 if None.
        rank: See `EncoderBase`.
        head_rank: Width of the bottlenecks in the style heads; 0 for none.
        hidden: Width of the sampler.

    Raises:
        ValueError: If resolution or canvas are no powers of two or too small.
    """

    w_std: Tensor

    def __init__(
        self,
        resolution: int,
        num_ws: int,
        w_dim: int,
        channels: Sequence[int],
        backbone: str = "resnet18",
        width: int = 160,
        canvas: int | None = None,
        rank: int = 0,
        head_rank: int = 160,
        hidden: int = 512,
    ) -> None:
        canvas = min(resolution, 128) if canvas is None else canvas
        for name, size in (("resolution", resolution), ("canvas", canvas)):
            if size < 32 or size & (size - 1):
                raise ValueError(f"Expected {name} to be a power of two from 32 px, got {size}.")
        sizes = (canvas // 8, canvas // 4, canvas // 2)
        widths = [num_ws * NOISE_PER_STYLE, *(NOISE_PLANES * size**2 for size in sizes[1:])]
        super().__init__(resolution, num_ws, w_dim, canvas, sum(widths), rank)
        self.detail_sizes = sizes[1:]
        self.noise_widths = widths  # what the sampler sees, then the planes of each size of details
        self.config |= {"channels": list(channels), "backbone": backbone, "width": width, "canvas": canvas}
        self.config |= {"head_rank": head_rank, "hidden": hidden}
        self.register_buffer("w_std", torch.ones(w_dim))  # spread of the generator's codes
        self.pyramid = FeaturePyramid(backbone, 5, width)
        counts = (COARSE_STYLES, MEDIUM_STYLES, num_ws - COARSE_STYLES - MEDIUM_STYLES)
        self.heads = nn.ModuleList(StyleHead(width, s, n, w_dim, head_rank) for s, n in zip(sizes, counts, strict=True))
        self.sampler = Sampler(3 * width * HEAD_SIZE**2 + 2, widths[0], hidden, num_ws, w_dim)
        self.details = nn.ModuleList(
            DetailHead(width, hidden, channels[int(math.log2(size)) - 2]) for size in self.detail_sizes
        )
        self.noise_estimator = NoiseEstimator()

    def read(self, canvas: Tensor, size: Tensor, sigma: Tensor) -> Features:
        """Looks at faces, see `EncoderBase.read`."""
        known = torch.stack([self.octave(size), (1 + sigma).log() / 4], dim=1)  # (B, 2)
        planes = known.to(canvas.dtype)[:, :, None, None].expand(-1, -1, self.canvas, self.canvas)
        levels = self.pyramid(torch.cat([canvas, planes], dim=1))
        styles = [head.read(f) for head, f in zip(self.heads, levels, strict=True)]  # type: ignore[operator]
        return Features(styles, levels[1:], known)

    def point(self, features: Features) -> Tensor:
        """Maps what was seen to codes without noise (B, L, D)."""
        offsets = [head(f) for head, f in zip(self.heads, features.styles, strict=True)]
        return self.latents.w_avg + torch.cat(offsets, dim=1).float()

    def sample(self, features: Features, noise: Tensor) -> Encoding:
        """Samples k explanations, see `EncoderBase.sample`."""
        seen = torch.cat([*features.styles, features.known.to(features.styles[0].dtype)], dim=1)
        noise, *planes = noise.split(self.noise_widths, dim=2)
        hidden, moves = self.sampler(seen, noise)
        ws = self.point(features)[:, None] + moves.float() * self.w_std
        details = {}
        for size, head, level, plane in zip(self.detail_sizes, self.details, features.levels, planes, strict=True):
            details[size] = head(level, hidden, plane.unflatten(2, (NOISE_PLANES, size, size)))
        return Encoding(ws, details)

    def noise_level(self, lr: Tensor) -> Tensor:
        """Estimates the noise in LR faces, see `EncoderBase.noise_level`; what could be a clean face's counts as 0."""
        # Not float(lr.shape[3]), which would end a trace.
        size = torch.full((lr.shape[0],), lr.shape[3], dtype=torch.float32, device=lr.device)
        sigma = self.noise_estimator(lr, self.octave(size)).expm1()
        return torch.where(sigma < LEAST_NOISE * (16 / size).clamp(min=1), 0, sigma)
