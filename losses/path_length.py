"""The lengths that path length regularisation keeps equal: how far the image moves for a step in W+."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def path_lengths(images: Tensor, ws: Tensor, directions: Tensor) -> Tensor:
    """Estimates the generator's local stretch by one random direction in image space.

    a = ‖J_wᵀ y‖₂ with y ~ N(0, I / (H W)); the squared norm is summed over D and averaged over the layers L. The loss
    is (a − ā)² with ā the running mean of a (the caller's). Karras et al. 2020, "Analyzing and Improving the Image
    Quality of StyleGAN", eq. 4; the mean over the layers is the official implementation's.

    Args:
        images: Images (B, 3, H, W), synthesized from `ws` with the graph kept.
        ws: Style codes (B, L, D) in that graph, requiring a gradient.
        directions: y √(H W), standard normal (B, 3, H, W).

    Returns:
        Lengths (B,), ≥ 0, that can be differentiated once more.

    Raises:
        ValueError: If the codes have the wrong shape or carry no gradient.
    """
    if ws.ndim != 3 or not ws.requires_grad:
        raise ValueError(
            f"Expected style codes (B, L, D) that require a gradient, got {tuple(ws.shape)} with "
            f"requires_grad={ws.requires_grad}; synthesize the images from the very tensor that is passed here."
        )
    height, width = images.shape[-2:]
    y = directions / math.sqrt(height * width)
    (gradient,) = torch.autograd.grad((images * y).sum(), ws, create_graph=True)  # (B, L, D)
    return gradient.square().sum(dim=2).mean(dim=1).sqrt()
