"""The energy score: proper, and a norm underneath."""

from __future__ import annotations

import torch

from losses.energy import Embedded, energy_score, feature_distance

WEIGHTS = (1.0, 0.5, 0.1)


def embedded(values: torch.Tensor, persons: int = 0) -> Embedded:
    """Flat pictures of one value each, whose feature is the value itself."""
    images = values[:, None, None, None].expand(-1, 3, 4, 4)
    people = torch.stack([values.cos(), values.sin()], dim=1)[:persons] if persons else None
    return Embedded(images, [images[:, :1]], people)


def test_the_distance_is_a_norm():
    a, b, c = (embedded(torch.randn(50), persons=20) for _ in range(3))
    ab, bc, ac = (feature_distance(x, y, WEIGHTS) for x, y in ((a, b), (b, c), (a, c)))
    assert (ac <= ab + bc + 1e-4).all()
    torch.testing.assert_close(ab, feature_distance(b, a, WEIGHTS))
    assert feature_distance(a, a, WEIGHTS).max() < 2e-3


def test_only_the_first_faces_are_compared_as_persons():
    a, b = embedded(torch.zeros(4), persons=2), embedded(torch.ones(4), persons=2)
    with_persons, without = feature_distance(a, b, WEIGHTS), feature_distance(a, b, (1.0, 0.5, 0.0))
    assert (with_persons[:2] > without[:2]).all()
    torch.testing.assert_close(with_persons[2:], without[2:])


def test_the_true_distribution_scores_best():
    """Among Gaussians of any spread about the truth's mean, the truth's own spread has the least score."""
    rng = torch.Generator().manual_seed(0)
    truth, first, second = torch.randn(3, 200_000, generator=rng)
    scores = {
        spread: float(energy_score(*map(embedded, (truth, spread * first, spread * second)), WEIGHTS).score.mean())
        for spread in (0.0, 0.5, 0.8, 1.0, 1.25, 2.0)
    }
    assert min(scores, key=scores.get) == 1.0


def test_a_score_of_one_sample_alone_would_have_no_spread():
    """Why the losses are parts of the score: as losses on one sample the best spread is zero."""
    rng = torch.Generator().manual_seed(0)
    truth, first, second = torch.randn(3, 100_000, generator=rng)
    to_truth = {
        s: float(energy_score(*map(embedded, (truth, s * first, s * second)), WEIGHTS).to_truth.mean())
        for s in (0.0, 1.0)
    }
    assert to_truth[0.0] < to_truth[1.0]


def independent_places(values: torch.Tensor) -> Embedded:
    """Pictures (N, 4, 4) of independent values, which are their own feature."""
    return Embedded(values[:, None].expand(-1, 3, -1, -1), [values[:, None]])


def test_patches_tell_where_samples_spread():
    """Over 16 places the whole face scarcely tells spreads of 0.5 and 1.5 from one of 1.12 everywhere."""
    rng = torch.Generator().manual_seed(0)
    truth, first, second = torch.randn(3, 50_000, 4, 4, generator=rng)
    spread = torch.full((4, 4), 0.5)
    spread[2:] = 1.5
    even = spread.square().mean().sqrt()
    excess = {}
    for patches in (1, 4):
        right, wrong = (
            energy_score(
                *map(independent_places, (spread * truth, s * first, s * second)), WEIGHTS, patches
            ).score.mean()
            for s in (spread, even)
        )
        excess[patches] = wrong / right - 1
    assert 0 < excess[1] < excess[4] / 3
