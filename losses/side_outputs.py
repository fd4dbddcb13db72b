"""Side outputs: the generator's skip connections as pictures of every size, in one pass.

What the ToRGB layers have added up to at a resolution is not yet a picture: later layers are trained to complete it. An
affine map of colours per resolution, picture ≈ A [rgb; 1] with A (3, 4), makes the best of it; A is the least-squares
solution on samples of the generator, whose downscaled faces are the target. How good it is, R² tells.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from data.operator import Downscale
from models.device import faces_at_once
from models.generator import Generator


class SideOutputs(nn.Module):
    """Synthesizes a face at every resolution of a generator.

    Args:
        generator: The generator, on its device; its gradients pass, its weights stay.
        samples: Faces that the colour maps are fitted to.
        seed: Of the faces.
    """

    def __init__(self, generator: Generator, samples: int = 256, seed: int = 0) -> None:
        super().__init__()
        # In a tuple: the generator is no part of this module, and in no state dict.
        self._generator = (generator,)
        self.sizes = generator.synthesis.resolutions[:-1]
        self.r_squared: dict[int, float] = {}
        for size, (matrix, r_squared) in self._fit(samples, seed).items():
            self.register_buffer(f"map{size}", matrix, persistent=False)
            self.r_squared[size] = r_squared

    def forward(self, ws: Tensor) -> list[Tensor]:
        """Maps codes (B, L, D) to pictures (B, 3, r, r) for r = 4, 8, …, R; the last one is the face itself."""
        *sums, face = self._generator[0].synthesis.partial_sums(ws)
        maps = [self.get_buffer(f"map{size}") for size in self.sizes]
        return [*(_recolour(rgb, matrix) for rgb, matrix in zip(sums, maps, strict=True)), face]

    @torch.no_grad()
    def _fit(self, samples: int, seed: int) -> dict[int, tuple[Tensor, float]]:
        """Solves for A at every resolution; gives A (3, 4) and R², the share of the variance that it explains."""
        generator = self._generator[0]
        z = np.random.default_rng((seed, samples)).standard_normal((samples, generator.z_dim), dtype=np.float32)
        device = generator.w_avg.device
        inner = {size: torch.zeros(4, 4, dtype=torch.float64, device=device) for size in self.sizes}
        outer = {size: torch.zeros(4, 3, dtype=torch.float64, device=device) for size in self.sizes}
        energy = {size: torch.zeros(3, dtype=torch.float64, device=device) for size in self.sizes}
        for part in torch.from_numpy(z).to(device).split(faces_at_once(generator)):
            *sums, faces = generator.synthesis.partial_sums(generator.mapping(part))
            for size, rgb in zip(self.sizes, sums, strict=True):
                x = _columns(rgb)  # (N, 3)
                x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)  # (N, 4)
                y = _columns(Downscale(size)(faces.clamp(-1, 1)))  # (N, 3)
                inner[size] += x.T @ x
                outer[size] += x.T @ y
                energy[size] += y.square().sum(dim=0)
        return {size: _solve(inner[size], outer[size], energy[size]) for size in self.sizes}


def _columns(images: Tensor) -> Tensor:
    """Lists the pixels of images (B, 3, H, W) as (B · H · W, 3), in float64."""
    return images.movedim(1, 3).reshape(-1, 3).double()


def _solve(inner: Tensor, outer: Tensor, energy: Tensor) -> tuple[Tensor, float]:
    solution = torch.linalg.lstsq(inner, outer).solution  # (4, 3)
    residual = energy - 2 * (solution * outer).sum(dim=0) + (solution * (inner @ solution)).sum(dim=0)
    variance = energy - outer[3].square() / inner[3, 3]  # the last of the four is 1
    return solution.T.float().contiguous(), float(1 - residual.sum() / variance.sum())


def _recolour(rgb: Tensor, matrix: Tensor) -> Tensor:
    """Applies A (3, 4) to every pixel of (B, 3, r, r)."""
    return torch.einsum("oc,bchw->bohw", matrix[:, :3], rgb.float()) + matrix[:, 3, None, None]
