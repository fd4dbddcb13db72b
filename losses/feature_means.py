"""How far the mean picture of a batch lies from that of the truths, in the features of LPIPS.

    Σ_l ‖E[φ_l(x̂) − φ_l(x)]‖²,    φ_l averaged over the pixels

Corrections that fit a low-resolution input leave traces that no single face shows enough of for LPIPS to mind, but that
all faces share: the mean of their features drifts away from that of photos, which is most of what a Fréchet distance
sees. Matching means of features: Salimans et al. 2016 "Improved Techniques for Training GANs", section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def feature_means_distance(drawn: Sequence[Tensor], truth: Sequence[Tensor]) -> Tensor:
    """Estimates the squared distance of the means, without bias, from two halves of a batch.

    The product of two independent means has the square of the true mean as its expectation, where the square of one
    would add its variance. A negative value says that the halves differ by more than the means.

    Args:
        drawn: Features of pictures (B, C_l, H_l, W_l), such as `LPIPS.features`; B ≥ 2.
        truth: Features of their truths, of the same shapes.

    Returns:
        The estimate, a scalar.

    Raises:
        ValueError: If the batch has one picture only.
    """
    if len(drawn[0]) < 2:
        raise ValueError("Expected at least 2 pictures to estimate means from, got 1; use a larger batch.")
    terms = []
    for a, b in zip(drawn, truth, strict=True):
        apart = (a - b).mean(dim=(2, 3))  # (B, C)
        terms.append((apart[::2].mean(dim=0) * apart[1::2].mean(dim=0)).sum())
    return torch.stack(terms).sum()
