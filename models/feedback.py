"""Learned feedback: corrects codes by what their faces, downscaled, lack of the LR picture.

    w ← w + σ P ρ N(y, r / ρ, x, w),      r = y − D(x),  x = g(w),  ρ = √mean(r²)

y is the LR picture, x the face that the codes draw, r what is missing, and N a small network. Its input r / ρ and its
output ρ N are scaled alike, so that a pass shrinks small residuals by the same factor as large ones, as a linear solver
would, and passes can be repeated. P are coordinates in which the LR picture changes evenly (`models.curvature`).
What PULSE asks the gradient in a hundred steps, a few passes without any gradient must answer.

Small LR faces may have low-rank additions to all of its layers (`models.adapted`), which they take wholly from × 8 on,
and less and less up to × 4, where none are left: what is learned for small faces takes nothing from larger ones.

Feeding the result of the last pass back in: ReStyle (Alaluf et al. 2021), there with the whole encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.operator import Downscale, downscaling_error, upscale_bicubic
from models.adapted import AdaptedConv2d, AdaptedLinear, can_skip

WIDTHS = {4: 256, 8: 160, 16: 96}  # features per level in pixels; 32 on all larger ones
HIDDEN = 512
NO_ADDITIONS = 1 / 4  # LR sizes from this share of R on take none of the additions, an octave below they take all
LARGEST, SMALLEST = 0.4, 1e-3  # ρ is held between these, in [-1, 1]: nothing explodes, nothing is divided by zero


def on_canvas(pictures: Tensor, canvas: int) -> Tensor:
    """Brings pictures (B, C, s, s) of any one size to a canvas (B, C, canvas, canvas), bicubically."""
    return upscale_bicubic(pictures, canvas) if pictures.shape[3] <= canvas else Downscale(canvas)(pictures)


class ResidualBlock(nn.Module):
    """Two convolutions beside the identity, which it is before training.

    Args:
        channels: Channels.
        rank: Of the additions, see `Feedback`.
    """

    def __init__(self, channels: int, rank: int = 0) -> None:
        super().__init__()
        self.conv0 = AdaptedConv2d(channels, channels, 3, rank, padding=1)
        self.conv1 = AdaptedConv2d(channels, channels, 3, rank, padding=1)
        nn.init.zeros_(self.conv1.weight)

    def forward(self, x: Tensor, share: Tensor | None = None) -> Tensor:
        """Maps features (B, C, H, W) to features of the same shape; `share` is that of the additions (B,)."""
        return x + self.conv1(F.leaky_relu(self.conv0(F.leaky_relu(x, 0.2), share), 0.2), share)


class Feedback(nn.Module):
    """The network N, and the scaling around it.

    Args:
        resolution: Size R of the generator's faces in pixels.
        num_ws: Number of styles L.
        w_dim: Width D of a style.
        hidden: Width of the layer before the codes.
        small_rank: Rank of the additions for small LR faces; 0 for none.
    """

    def __init__(self, resolution: int, num_ws: int, w_dim: int, hidden: int = HIDDEN, small_rank: int = 0) -> None:
        super().__init__()
        self.canvas = min(resolution // 2, 128)
        self.num_ws, self.w_dim, self.resolution, self.small_rank = num_ws, w_dim, resolution, small_rank
        sizes = [2**i for i in range(int(math.log2(self.canvas)), 1, -1)]  # canvas, …, 8, 4
        widths = [WIDTHS.get(size, 32) for size in sizes]
        self.stem = AdaptedConv2d(3 + 3 + 12 + 2, widths[0], 3, small_rank, padding=1)
        self.down = nn.ModuleList(
            AdaptedConv2d(above, below, 3, small_rank, stride=2, padding=1)
            for above, below in zip(widths, widths[1:], strict=False)
        )
        depths = [2 if size in (8, 16) else 1 for size in sizes]
        self.blocks = nn.ModuleList(
            nn.ModuleList(ResidualBlock(width, small_rank) for _ in range(depth))
            for width, depth in zip(widths, depths, strict=True)
        )
        self.codes = AdaptedLinear(num_ws * w_dim, WIDTHS[4], small_rank)
        # The 16 and 8 px levels speak to the codes directly as well, past what the 4 px level has room for.
        self.from16 = AdaptedConv2d(WIDTHS[16], 32, 3, small_rank, padding=1)
        self.from8 = AdaptedConv2d(WIDTHS[8], 64, 3, small_rank, stride=2, padding=1)
        self.hidden = AdaptedLinear(16 * (WIDTHS[4] + 32 + 64), hidden, small_rank)
        self.out = AdaptedLinear(hidden, num_ws * w_dim, small_rank)
        nn.init.normal_(self.out.weight, std=1e-3)
        nn.init.zeros_(self.out.bias)

    def forward(self, lr: Tensor, residual: Tensor, images: Tensor, size: Tensor, offsets: Tensor) -> Tensor:
        """Asks the network for a correction; the rows of a batch may have different LR sizes.

        Args:
            lr: LR pictures on the canvas (B, 3, canvas, canvas) in [-1, 1].
            residual: What the downscaled faces lack of them, on the canvas as well.
            images: The faces, shrunk to twice the canvas (B, 3, 2 canvas, 2 canvas).
            size: LR sizes in pixels (B,).
            offsets: The present codes, (w − w̄) / σ (B, L, D).

        Returns:
            ρ N (B, L, D): the correction, in the coordinates x of `models.curvature`.
        """
        rho = residual.square().mean(dim=(1, 2, 3)).sqrt().clamp(SMALLEST, LARGEST).detach()  # (B,)
        octave = (size.to(rho.dtype) / self.resolution).log2() / 4 + 1
        planes = torch.stack([octave, rho.log() / 3 + 1], dim=1)[:, :, None, None]  # (B, 2, 1, 1)
        planes = planes.expand(-1, -1, self.canvas, self.canvas)
        x = torch.cat([lr, residual / rho[:, None, None, None], F.pixel_unshuffle(images, 2), planes], dim=1)
        share = self._share(size)
        at16, at8, at4 = self._levels(x, offsets, share)
        at8 = F.leaky_relu(self.from8(at8, share), 0.2)
        at16 = F.avg_pool2d(F.leaky_relu(self.from16(at16, share), 0.2), 4)
        flat = torch.cat([f.contiguous().flatten(1) for f in (at4, at8, at16)], dim=1)
        out = self.out(self.hidden(flat, share), share).float()  # (B, L · D)
        return (3 * rho[:, None] * out).unflatten(1, (self.num_ws, self.w_dim))

    def _levels(self, x: Tensor, offsets: Tensor, share: Tensor | None) -> list[Tensor]:
        """The features of 16, 8 and 4 px."""
        levels: list[Tensor] = []
        x = self.stem(x.contiguous(memory_format=torch.channels_last), share)
        for i, blocks in enumerate(self.blocks):
            if i > 0:
                x = self.down[i - 1](F.leaky_relu(x, 0.2), share)
            if i == len(self.blocks) - 1:
                x = x + self.codes(offsets.flatten(1), share)[:, :, None, None]
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, share)
            levels.append(F.leaky_relu(x, 0.2))
        return levels[-3:]

    def _share(self, size: Tensor) -> Tensor | None:
        """How far each row takes the additions (B,): wholly from × 8 on, not at all up to × 4; None for nobody."""
        if not self.small_rank:
            return None
        share = (NO_ADDITIONS * self.resolution / size.float()).log2().clamp(0, 1)
        return None if can_skip(share) else share


class Corrected(NamedTuple):
    """What passes of feedback end with.

    Attributes:
        ws: Codes (N, L, D).
        images: The faces that they draw (N, 3, R, R), about [-1, 1].
    """

    ws: Tensor
    images: Tensor


def take_passes(
    correct: Callable[[Tensor, Tensor, Tensor], Tensor],
    synthesis: Callable[[Tensor], Tensor],
    lr: Tensor,
    ws: Tensor,
    passes: int,
) -> Corrected:
    """Corrects codes several times, each for itself; a correction that makes things worse is taken back and halved.

    Args:
        correct: One pass, such as `Encoder.correct`.
        synthesis: The network that draws, with its stored noise maps.
        lr: LR faces (N, 3, s, s) in [-1, 1], one per row.
        ws: Codes (N, L, D).
        passes: How often, from 0; each draws the faces once, and the first codes are drawn too.

    Returns:
        Codes and their faces, none worse in downscaling error than it was.
    """
    operator = Downscale(lr.shape[3])
    images = synthesis(ws)
    errors = downscaling_error(images.clamp(-1, 1), lr, operator)  # (N,)
    length = torch.ones(len(ws), 1, 1, device=ws.device)
    for _ in range(passes):
        moved = ws + length * (correct(lr, images, ws) - ws)
        drawn = synthesis(moved)
        found = downscaling_error(drawn.clamp(-1, 1), lr, operator)
        better = found < errors
        ws = torch.where(better[:, None, None], moved, ws)
        images = torch.where(better[:, None, None, None], drawn, images)
        errors = torch.where(better, found, errors)
        length = torch.where(better[:, None, None], length, length / 2)
    return Corrected(ws, images)
