"""The latent regularisation of pSp: styles that stay near the mean face give realistic faces."""

from __future__ import annotations

from torch import Tensor


def mean_latent_distance(ws: Tensor, w_avg: Tensor) -> Tensor:
    """Measures how far styles lie from the mean latent.

    L_reg = (1/L) Σ_l ‖w_l − w̄‖₂

    Args:
        ws: Style codes (B, L, D).
        w_avg: The mean latent w̄, (D,) or one per layer (L, D).

    Returns:
        Distances (B,), ≥ 0, in the units of W.

    References:
        Richardson et al. 2021, "Encoding in Style" (pSp), eq. 4, where the encoder's output is the offset from w̄.
    """
    return (ws - w_avg).norm(dim=2).mean(dim=1)
