"""What all encoders share: how they are called, and the noise that makes their samples differ.

An encoder looks at LR faces that lie on a canvas of one size (`read`), and makes codes of what it saw: the point
estimate for the noise 0, samples for standard normal noise (`sample`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data import noise
from data.image_io import to_uint8
from data.operator import Downscale, upscale_bicubic
from models.latents import LatentStatistics

COARSE_STYLES, MEDIUM_STYLES = 3, 4  # as in pSp; all further ones are fine


class Features(NamedTuple):
    """What an encoder sees in faces."""

    styles: Sequence[Tensor]  # features for the coarse, medium and fine styles, one tensor each
    levels: Sequence[Tensor]  # maps (B, C, S, S) for the details, coarse to fine; may be empty
    known: Tensor  # LR size and noise level as the networks see them (B, 2)


class Encoding(NamedTuple):
    """k explanations of each face."""

    ws: Tensor  # style codes (B, k, L, D)
    details: dict[int, Tensor]  # by r, added to the generator's features at r px (B, k, C, r, r)


def face_keys(lr: Tensor) -> list[int]:
    """Gives LR faces (B, 3, s, s) in [-1, 1] numbers that depend on their pixels alone, and seed their searches."""
    keys = (noise.face_key(face, seed=0) for face in to_uint8(_array(lr)))
    return [low | high << 32 for low, high in keys]


def face_noise(lr: Tensor, k: int, noise_dim: int, seed: int) -> Tensor:
    """Samples the noise (B, k, E) of k encodings of faces (B, 3, s, s); the first is 0, for the point estimate.

    It depends on the seed and the face alone, never on the batch, on k or on the machine; float32 on the CPU.
    """
    return torch.from_numpy(noise.face_noise(_array(lr), k, noise_dim, seed))


def _array(lr: Tensor) -> np.ndarray:
    return lr.detach().cpu().float().numpy()


class EncoderBase(nn.Module):
    """Encodes LR faces of any size from 4 px to the generator's resolution.

    Args:
        resolution: Size R of the generator's faces in pixels.
        num_ws: Number of styles L.
        w_dim: Width D of a style.
        canvas: Size that LR faces are brought to.
        noise_dim: Width E of the noise of one encoding.
        rank: Directions of the search's preconditioner, see `models.latents`; 0 for none.
    """

    lacking: Tensor

    def __init__(self, resolution: int, num_ws: int, w_dim: int, canvas: int, noise_dim: int, rank: int = 0) -> None:
        super().__init__()
        self.resolution, self.num_ws, self.w_dim = resolution, num_ws, w_dim
        self.canvas, self.noise_dim = canvas, noise_dim
        self.config: dict[str, Any] = {"resolution": resolution, "num_ws": num_ws, "w_dim": w_dim}
        self.config |= {"rank": rank} if rank else {}
        self.latents = LatentStatistics(w_dim, num_ws, rank)
        self.register_buffer("lacking", torch.full((), 0.01))  # τ²: mean square of y − D(G(w)) for clean faces

    # ---------------------------------------------------------------- what an encoder does in its own way

    def read(self, canvas: Tensor, size: Tensor, sigma: Tensor) -> Features:
        """Looks at faces that are already on the canvas; those of one batch may have different sizes.

        Args:
            canvas: LR faces as `on_canvas` gives them (B, 3, canvas, canvas), in [-1, 1].
            size: Their LR sizes in pixels (B,).
            sigma: Standard deviation of their noise in grey levels of 255 (B,).
        """
        raise NotImplementedError

    def point(self, features: Features) -> Tensor:
        """Maps what was seen to the codes of the point estimate before its details (B, L, D)."""
        raise NotImplementedError

    def sample(self, features: Features, noise: Tensor) -> Encoding:
        """Maps what was seen and noise (B, k, E) to k encodings; the noise 0 gives the point estimate."""
        raise NotImplementedError

    def noise_ratio(self, sigma: Tensor) -> Tensor:
        """Gives σ²/τ² of `data.operator.trusted_part` for noise in grey levels (B,)."""
        return (sigma / 127.5).square() / self.lacking

    def noise_level(self, lr: Tensor) -> Tensor:
        """Estimates the standard deviation of the noise in LR faces (B, 3, s, s), in grey levels (B,)."""
        return lr.new_zeros(lr.shape[0])

    # ---------------------------------------------------------------- calling it

    def on_canvas(self, lr: Tensor) -> Tensor:
        """Brings LR faces (B, 3, s, s) of any one size to the canvas, bicubically."""
        return upscale_bicubic(lr, self.canvas) if lr.shape[3] <= self.canvas else Downscale(self.canvas)(lr)

    def forward(self, lr: Tensor, noise: Tensor | None = None, sigma: Tensor | None = None) -> Encoding:
        """Encodes faces of one size.

        Args:
            lr: LR faces (B, 3, s, s) in [-1, 1], 4 ≤ s ≤ R.
            noise: Noise (B, k, E), see `face_noise`; None for the point estimate alone, k = 1.
            sigma: Standard deviation of the noise in the faces, in grey levels (B,); 0 if None.

        Returns:
            k encodings of each face.

        Raises:
            ValueError: If the faces' shape is out of range.
        """
        if lr.ndim != 4 or lr.shape[1] != 3 or lr.shape[2] != lr.shape[3]:
            raise ValueError(f"Expected square colour faces (B, 3, s, s), got {tuple(lr.shape)}.")
        if not 4 <= lr.shape[3] <= self.resolution:
            raise ValueError(
                f"Expected faces of 4 to {self.resolution} px, got {lr.shape[3]} px; downscale larger ones first."
            )
        size = torch.full((lr.shape[0],), float(lr.shape[3]), device=lr.device)
        noise = lr.new_zeros(lr.shape[0], 1, self.noise_dim) if noise is None else noise
        sigma = torch.zeros_like(size) if sigma is None else sigma
        return self.sample(self.read(self.on_canvas(lr), size, sigma), noise)

    def octave(self, size: Tensor) -> Tensor:
        """LR sizes in pixels (B,) as the networks see them: about [0, 1] (B,)."""
        return (size.to(self.latents.w_avg.dtype) / self.resolution).log2() / 4 + 1

    def mixed_styles(self, point: Tensor, noise: Tensor, first: int) -> Encoding:
        """Samples as pSp does (section 4.4): from the style `first` on, those of a random face; noise (B, k, D)."""
        fine = torch.arange(self.num_ws, device=point.device) >= first  # (L,)
        mixed = fine[:, None] & (noise != 0).any(dim=-1)[..., None, None]  # (B, k, L, 1)
        return Encoding(torch.where(mixed, self.latents.sample(noise)[:, :, None], point[:, None]), {})
