"""The energy score: a strictly proper loss for two samples of a distribution, whose minimum is the true posterior.

    S = ½ d(x, s) + ½ d(x, s′) − ½ d(s, s′)

x is the truth, s and s′ are independent samples. It is proper for any distance that is the norm of a difference in some
feature space; here

    d(a, b)² = c_lpips LPIPS(a, b) + c_l2 mean (a − b)² + c_identity ‖f(a) − f(b)‖²

which holds the three losses of pSp (Richardson et al. 2021) inside one norm. Beside it, as a loss on one sample alone,
each of them would pull all samples to one face.

Sources: Gneiting & Raftery 2007, "Strictly Proper Scoring Rules", section 4.3; Székely & Rizzo 2013, "Energy
statistics"; Shen & Meinshausen 2024, "Engression" (as a training loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Embedded(NamedTuple):
    """Images and what the distance compares of them."""

    images: Tensor  # (B, 3, R, R) in [-1, 1]
    features: Sequence[Tensor]  # `LPIPS.features` of the images, each (B, C_l, H_l, W_l)
    identities: Tensor | None = None  # unit embeddings (b, E) of the first b ≤ B images


def feature_distance(a: Embedded, b: Embedded, weights: tuple[float, float, float]) -> Tensor:
    """Computes d(a, b) > 0 (B,), a norm of the difference of features; weights are c_lpips, c_l2 and c_identity."""
    lpips, l2, identity = weights
    terms = [(p - q).square().sum(dim=1).mean(dim=(1, 2)) for p, q in zip(a.features, b.features, strict=True)]
    squared = lpips * torch.stack(terms).sum(dim=0) + l2 * (a.images - b.images).square().mean(dim=(1, 2, 3))
    if a.identities is not None and b.identities is not None:
        apart = (a.identities - b.identities).square().sum(dim=1)
        squared = squared + identity * torch.nn.functional.pad(apart, (0, len(squared) - len(apart)))
    return (squared + 1e-6).sqrt()  # the constant keeps the gradient finite where the images are equal


class EnergyScore(NamedTuple):
    """The score and its parts, each (B,)."""

    to_truth: Tensor  # ½ d(x, s) + ½ d(x, s′)
    between: Tensor  # d(s, s′)

    @property
    def score(self) -> Tensor:
        """S (B,)."""
        return self.to_truth - self.between / 2


def energy_score(truth: Embedded, a: Embedded, b: Embedded, weights: tuple[float, float, float]) -> EnergyScore:
    """Scores two samples a and b of each face against the truth; see `feature_distance` for the weights."""
    to_truth = (feature_distance(truth, a, weights) + feature_distance(truth, b, weights)) / 2
    return EnergyScore(to_truth, feature_distance(a, b, weights))
