"""The energy score: a strictly proper loss for two samples of a distribution, whose minimum is the true posterior.

    S = ½ d(x, s) + ½ d(x, s′) − ½ d(s, s′)

x is the truth, s and s′ are independent samples. It is proper for any distance that is the norm of a difference in some
feature space, and a sum of proper scores is proper. Here d is a sum of three such norms, for the losses of pSp
(Richardson et al. 2021); as losses on one sample alone each of them would pull all samples to one face:

    d(a, b) = √(c_lpips LPIPS(a, b) + c_l2 mean (a − b)²)  +  the same over patches  +  c_identity ‖f(a) − f(b)‖

Over a whole face the first is the root of a sum that hardly varies: it tells how far samples spread in all, and
scarcely in what. So every level of LPIPS, and the pixels, are also scored apart, in each of some patches, and so is the
identity.

Sources: Gneiting & Raftery 2007, "Strictly Proper Scoring Rules", section 4.3; Székely & Rizzo 2013, "Energy
statistics"; Shen & Meinshausen 2024, "Engression" (as a training loss).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Embedded(NamedTuple):
    """Images and what the distance compares of them."""

    images: Tensor  # (B, 3, R, R) in [-1, 1]
    features: Sequence[Tensor]  # `LPIPS.features` of the images, each (B, C_l, H_l, W_l)
    identities: Tensor | None = None  # unit embeddings (b, E) of the first b ≤ B images


def feature_distance(a: Embedded, b: Embedded, weights: tuple[float, float, float], patches: int = 1) -> Tensor:
    """Gives d(a, b), a sum of norms of differences of features.

    Args:
        a: The first images.
        b: The second.
        weights: c_lpips, c_l2 and c_identity.
        patches: Patches along a side in which each level and the pixels are compared apart; 1 for the whole face alone.

    Returns:
        Distances (B,), > 0.
    """
    lpips, l2, identity = weights
    maps = [lpips * (p - q).square().sum(dim=1) for p, q in zip(a.features, b.features, strict=True)]
    maps.append(l2 * (a.images - b.images).square().mean(dim=1))
    distance = _root(torch.stack([m.mean(dim=(1, 2)) for m in maps]).sum(dim=0))
    if patches > 1:
        levels = [_root(F.adaptive_avg_pool2d(m, min(patches, m.shape[2]))).mean(dim=(1, 2)) for m in maps]
        distance = (distance + torch.stack(levels).sum(dim=0) / len(maps) ** 0.5) / 2
    if a.identities is not None and b.identities is not None:
        apart = identity * _root((a.identities - b.identities).square().sum(dim=1))
        distance = distance + F.pad(apart, (0, len(distance) - len(apart)))
    return distance


def _root(squared: Tensor) -> Tensor:
    return (squared + 1e-6).sqrt()  # the constant keeps the gradient finite where images are equal


class EnergyScore(NamedTuple):
    """The score and its parts, each (B,).

    Attributes:
        to_truth: ½ d(x, s) + ½ d(x, s′).
        between: d(s, s′).
    """

    to_truth: Tensor
    between: Tensor

    @property
    def score(self) -> Tensor:
        """S (B,)."""
        return self.to_truth - self.between / 2


def energy_score(
    truth: Embedded,
    a: Embedded,
    b: Embedded,
    weights: tuple[float, float, float],
    patches: int = 1,
) -> EnergyScore:
    """Scores two samples a and b of each face against the truth; see `feature_distance`."""
    to_truth = (feature_distance(truth, a, weights, patches) + feature_distance(truth, b, weights, patches)) / 2
    return EnergyScore(to_truth, feature_distance(a, b, weights, patches))
