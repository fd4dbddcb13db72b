"""The loss of the attribute classifier: rare attributes weigh more, and the logits can be corrected for it exactly."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def positive_weights(rates: Tensor, power: float = 0.5, least: float = 1e-3) -> Tensor:
    """Gives the weight of a face that has an attribute, relative to one that lacks it, v = ((1 − r) / r)^γ.

    Args:
        rates: Share r of faces with each attribute (A,), in [0, 1].
        power: γ: with 1 both kinds weigh the same in total, with 0 every face does.
        least: Shares are kept this far from 0 and 1: an attribute that no face has is learned as rare.
    """
    rates = rates.clamp(least, 1 - least)
    return ((1 - rates) / rates) ** power


def attribute_loss(logits: Tensor, labels: Tensor, weights: Tensor, rates: Tensor) -> Tensor:
    """Computes the weighted logistic loss of every attribute (B, A), ≥ 0.

    L = (v y softplus(−l) + (1 − y) softplus(l)) / (v r + 1 − r)

    Its minimum for a face that has the attribute with probability p is l = logit(p) + ln v, so l − ln v is calibrated.
    The denominator makes all attributes count the same.

    Args:
        logits: l (B, A).
        labels: y (B, A), 0 or 1.
        weights: v (A,), see `positive_weights`.
        rates: Share r of faces with each attribute (A,).

    Raises:
        ValueError: If logits and labels differ in shape, which would broadcast unnoticed.
    """
    if logits.shape != labels.shape:
        raise ValueError(f"Expected logits and labels of one shape, got {tuple(logits.shape)}, {tuple(labels.shape)}.")
    y = labels.to(logits.dtype)
    losses = weights * y * F.softplus(-logits) + (1 - y) * F.softplus(logits)
    return losses / (weights * rates + 1 - rates)
