"""Adaptive discriminator augmentation: keeps the discriminator from learning a short dataset by heart.

Every picture that the discriminator sees, real or not, passes through random flips, rotations, translations, scalings
and colour changes, each with probability p. p rises while the discriminator is too sure of real pictures,
E[sign D(real)] > target, and falls again otherwise; with enough data it stays at 0 and costs nothing.

Source: Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data".
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.batches import BatchRandom


def augment(images: Tensor, p: float, random: BatchRandom) -> Tensor:
    """Applies each change to each picture (B, 3, H, W) in [-1, 1] with probability p; differentiable."""
    batch = images.shape[0]

    def uniform() -> Tensor:
        return random.rand(batch) * 2 - 1

    def chosen(value: Tensor, otherwise: float) -> Tensor:
        use = random.rand(batch) < p
        return torch.where(use, value, otherwise)

    angle = chosen(uniform() * math.pi / 8, 0.0)
    scale = torch.exp2(chosen(uniform() * 0.4, 0.0))
    flip = chosen(torch.sign(uniform()), 1.0)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift_x, shift_y = chosen(uniform() * 0.25, 0.0), chosen(uniform() * 0.25, 0.0)
    theta = torch.stack([cos * flip, -sin, shift_x, sin * flip, cos, shift_y], dim=1).view(batch, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid.to(images.dtype), padding_mode="reflection", align_corners=False)

    brightness = chosen(uniform() * 0.4, 0.0)[:, None, None, None]
    contrast = torch.exp2(chosen(uniform() * 0.5, 0.0))[:, None, None, None]
    saturation = torch.exp2(chosen(uniform(), 0.0))[:, None, None, None]
    grey = images.mean(dim=1, keepdim=True)
    return (grey + (images - grey) * saturation) * contrast + brightness


class AdaptiveAugment(nn.Module):
    """Augmentation whose probability follows the discriminator's confidence.

    Args:
        target: Wanted mean sign of the logits of real pictures; 0.6 in the paper.
        images_to_full: Pictures after which p can at most go from 0 to 1.
    """

    p: Tensor
    sign: Tensor

    def __init__(self, target: float = 0.6, images_to_full: int = 500_000) -> None:
        super().__init__()
        self.target = target
        self.images_to_full = images_to_full
        self.register_buffer("p", torch.zeros([]))
        self.register_buffer("sign", torch.zeros([]))

    def forward(self, images: Tensor, random: BatchRandom) -> Tensor:
        """Augments images (B, 3, H, W) with the current probability."""
        return augment(images, float(self.p), random) if self.p > 0 else images

    def adapt(self, sign: Tensor, count: int) -> None:
        """Moves p by the mean sign of the logits of `count` real pictures."""
        self.sign.lerp_(sign, 0.05)
        step = torch.sign(self.sign - self.target) * (count / self.images_to_full)
        self.p.add_(step).clamp_(0.0, 1.0)
