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
    """Rewards images that the discriminator takes for real.

    L_G = softplus(−D(G(z))) = −log σ(D(G(z)))

    Args:
        fake_logits: The discriminator's logits for generated images (B,) or (B, 1), high for real.

    Returns:
        Losses in the shape of the logits, ≥ 0; log 2 at an undecided discriminator.
    """
    return F.softplus(-fake_logits)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Rewards a discriminator that tells real images from generated ones.

    L_D = softplus(−D(x)) + softplus(D(G(z)))

    Args:
        real_logits: Logits for real images (B,) or (B, 1).
        fake_logits: Logits for generated images, in the same shape.

    Returns:
        Losses in the shape of the logits, ≥ 0; 2 log 2 at an undecided discriminator.

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
    """Rewards a discriminator that tells real images from generated ones by a margin, and no more than that.

    L_D = max(0, 1 − D(x)) + max(0, 1 + D(G(z))), averaged. The generator's loss to it is −D(G(z)).

    Args:
        real_logits: Logits for real images, of any shape.
        fake_logits: Logits for generated images.

    Returns:
        The loss, a scalar ≥ 0; 2 at an undecided discriminator.
    """
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def r1_penalty(discriminator: Callable[[Tensor], Tensor], real: Tensor) -> tuple[Tensor, Tensor]:
    """Measures how steep the discriminator is at real images.

    R1(x) = ‖∇ₓ D(x)‖²; the loss adds γ/2 times it (γ is the caller's).

    Args:
        discriminator: Maps images (B, 3, H, W) to logits (B,) or (B, 1).
        real: Real images (B, 3, H, W) in [-1, 1]; they need not require a gradient and stay untouched.

    Returns:
        The logits, as the discriminator gives them, and the penalties (B,); both can be differentiated.
    """
    real = real.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = discriminator(real)
        # Logits of one image do not depend on the others but through batch statistics, so one backward pass serves all.
        (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        return logits, gradient.square().sum(dim=(1, 2, 3))
