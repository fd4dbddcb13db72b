"""The latent regularisation of pSp: styles that stay near the mean face give realistic faces."""

from __future__ import annotations

from torch import Tensor


def mean_latent_distance(ws: Tensor, w_avg: Tensor) -> Tensor:
    """Measures how far styles (B, L, D) lie from the mean latent (D,) or (L, D): (1/L) Σ_l ‖w_l − w̄‖₂ ≥ 0 (B,).

    Richardson et al. 2021, "Encoding in Style" (pSp), eq. 4, where the encoder's output is the offset from w̄.
    """
    return (ws - w_avg).norm(dim=2).mean(dim=1)
