"""The adversarial losses: StyleGAN2's non-saturating logistic one, with the R1 penalty on real images, and the hinge.

Sources: Goodfellow et al. 2014 (non-saturating loss), Mescheder et al. 2018 "Which Training Methods for GANs do
actually Converge?" (R1, eq. 9), Lim & Ye 2017 "Geometric GAN" (hinge).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Computes the non-saturating loss −log σ(D(G(z))) = softplus(−D(G(z))) ≥ 0 of each logit."""
    return F.softplus(-fake_logits)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Computes softplus(−D(x)) + softplus(D(G(z))) ≥ 0 for each pair of logits, 2 log 2 where it is undecided.

    Raises:
        ValueError: If the shapes differ, which would broadcast to B × B pairs unnoticed.
    """
    if real_logits.shape != fake_logits.shape:
        raise ValueError(
            f"Expected real and fake logits of one shape, got {tuple(real_logits.shape)} and "
            f"{tuple(fake_logits.shape)}; use the same batch size for both and flatten (B, 1) to (B,)."
        )
    return F.softplus(-real_logits) + F.softplus(fake_logits)


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Computes the mean of max(0, 1 − D(x)) + max(0, 1 + D(G(z))); the generator's loss to it is −D(G(z))."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> tuple[Tensor, Tensor]:
    """Measures R1(x) = ‖∇ₓ D(x)‖² at real images; the loss adds γ/2 times it.

    Args:
        discriminator: Maps images (B, 3, H, W) to logits (B,) or (B, 1).
        real: Images (B, 3, H, W) in [-1, 1]; they need not require a gradient and stay untouched.

    Returns:
        The logits and the penalties (B,); both can be differentiated.
    """
    real = real.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = discriminator(real)
        # Logits of one image do not depend on the others but through batch statistics, so one backward pass serves all.
        (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        return logits, gradient.square().sum(dim=(1, 2, 3))
