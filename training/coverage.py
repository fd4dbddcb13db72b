"""Is a distribution over codes honest? Regions that should hold the truth with some probability, and do or do not."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

LEVELS = (50, 80, 95)  # per cent
GOLDEN = (5**0.5 - 1) / 2


class Density(Protocol):
    """A conditional density, such as those of `models.posterior`."""

    def log_prob(self, context: Tensor, octave: Tensor, u: Tensor) -> Tensor:
        """Log-densities (B,) of codes (B, D), or (n, B) of (n, B, D)."""


def region_levels(density: Density, context: Tensor, octave: Tensor, u: Tensor, samples: Tensor) -> Tensor:
    """Says in which highest-density region each truth lies: 0.5 means on the border of the one that holds half.

    Args:
        density: The distribution.
        context: What it is given (B, C).
        octave: Of the LR sizes (B,).
        u: Truths (B, D).
        samples: Samples of the distribution (B, n, D).

    Returns:
        The share of samples whose density is higher than the truth's (B,); uniform in [0, 1] if the distribution is
        honest.

    References:
        Hyndman 1996, Computing and Graphing Highest Density Regions.
    """
    own = density.log_prob(context, octave, u)  # (B,)
    others = density.log_prob(context, octave, samples.transpose(0, 1))  # (n, B)
    return (others > own).float().mean(dim=0)


def ranks(u: Tensor, samples: Tensor) -> Tensor:
    """Gives the rank of each coordinate of the truth among those of the samples.

    Args:
        u: Truths (B, D).
        samples: Samples (B, n, D).

    Returns:
        Ranks from 0 to n (B, D); uniform if the distribution is honest. A heap in the middle tells of a distribution
        that is too wide, heaps at the ends of one that is too narrow.

    References:
        Talts et al. 2018, Validating Bayesian Inference Algorithms with Simulation-Based Calibration.
    """
    return (samples < u[:, None]).sum(dim=1)


def tarp(u: Tensor, samples: Tensor, references: Tensor) -> Tensor:
    """Gives the credibility levels of tests of accuracy with random points.

    f = share of samples that are nearer to a reference point than the truth is.

    Args:
        u: Truths (B, D).
        samples: Samples (B, n, D).
        references: One point (B, D) per truth, drawn without looking at truth or samples.

    Returns:
        f (B,); uniform in [0, 1] if the distribution is honest.

    References:
        Lemos et al. 2023, Sampling-Based Accuracy Testing of Posterior Estimators for General Inference.
    """
    distance = (u - references).square().sum(dim=1)  # (B,)
    others = (samples - references[:, None]).square().sum(dim=2)  # (B, n)
    return (others < distance[:, None]).float().mean(dim=1)


def expected_coverage(levels: Tensor, credibility: Tensor) -> Tensor:
    """Gives the share of truths within each credibility level.

    Args:
        levels: What `region_levels` or `tarp` gave (B,).
        credibility: Levels α (a,) in [0, 1].

    Returns:
        Shares (a,); equal to α if the distribution is honest.
    """
    return (levels[:, None] <= credibility).float().mean(dim=0)


@torch.no_grad()
def calibrate(density: Any, context: Tensor, octave: Tensor, u: Tensor) -> None:
    """Sets the width of a distribution's noise, and how uncertain it is, to what is most likely on other pairs.

    A network that was fitted to finitely many pairs is surer of itself than it should be; two numbers mend most of it.

    Args:
        density: A distribution of `models.posterior`; `wobble` is left alone where it has none.
        context: Features of the encoder (B, C), of pairs that it was not fitted to.
        octave: Of the LR sizes (B,).
        u: Truths (B, D).
    """

    def fit(number: Tensor, low: float, high: float) -> None:
        """Golden-section search for the best value of one buffer."""
        for _ in range(16):
            places = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
            scores = []
            for place in places:
                number.fill_(place)
                scores.append(float(density.log_prob(context, octave, u).mean()))
            low, high = (low, places[1]) if scores[0] > scores[1] else (places[0], high)
        number.fill_((low + high) / 2)

    fit(density.width, 0.5, 3.0)
    if hasattr(density, "wobble"):
        fit(density.wobble, 1e-3, 0.5)
        fit(density.width, 0.5, 3.0)
