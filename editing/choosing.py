"""Chooses by measuring which attributes an edit is conditioned on, and which layers it changes.

Everything is measured on generated faces that no boundary was fitted to, by the classifier that scored the samples. The
figures that are published come from another classifier (benchmarks/editing.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from editing.fitting import Hyperplane, Whitening, direction_of
from editing.names import attribute_of, synonyms_of
from editing.sampling import draw_and_score, sample_w
from models.attributes import AttributeClassifier
from models.generator import Generator

STRENGTH = 2.0
FACES = 96
ROUNDS = 8  # of adding conditions
CONDITIONS_A_ROUND = 4  # those that are dragged along most; every condition also costs some of the edit's own change
DRIFT_SHARE = 0.15  # of its own change that an edit may move another attribute before that may become a condition
TARGET = 0.22  # drift for every bit of its own change below which no condition is added
GOOD = 0.27  # the same, that costs nothing; published figures allow a third
COST = 3.0  # in own change, of every bit of drift above that
PERCENTILE = 90


@dataclass(frozen=True)
class Trial:
    """What an edit did.

    Attributes:
        own: Mean change of its own attribute's score, in the edit's direction, as a share of the range.
        drift: Mean change of each other attribute's score, by name, synonyms left out.
    """

    own: float
    drift: dict[str, float]

    @property
    def typical(self) -> float:
        """The 90th percentile of the others' drift."""
        return float(np.percentile(np.abs(list(self.drift.values())), PERCENTILE))

    @property
    def disentanglement(self) -> float:
        """Drift for every bit of its own change; small is good."""
        return self.typical / max(self.own, 1e-3)

    @property
    def worth(self) -> float:
        """Its own change, less what it drags along beyond what may be expected."""
        return self.own - COST * max(0.0, self.typical - GOOD * self.own)


@dataclass(frozen=True)
class Choice:
    """How an edit is made.

    Attributes:
        conditions: Attributes that are projected out, in the order in which they were added; none where it is learned.
        direction: Its step (D,) for all its layers, or (l, D), a row for each.
        layers: The first style and the first after the last.
        trial: What it did.
    """

    conditions: list[str]
    direction: np.ndarray
    layers: tuple[int, int]
    trial: Trial


def score_changes(before: Tensor, after: Tensor) -> Tensor:
    """Mean change of the scores, probabilities in [0, 1]: logits (N, A) before and after, (A,)."""
    return (after.sigmoid() - before.sigmoid()).mean(dim=0)


def rarer_side(rate: float, sign: int) -> int:
    """The side of an edit that fewer faces are on: +1 or −1.

    Args:
        rate: Share of faces with the edit's attribute.
        sign: −1 where the edit is the opposite of the attribute.
    """
    return 1 if (rate if sign > 0 else 1 - rate) <= 0.5 else -1


class Chooser:
    """Measures edits on the same faces.

    Args:
        generator: Draws.
        classifier: Scores.
        planes: Hyperplanes by attribute, all those that may become conditions.
        whitening: Of W.
        seed: Of the faces.
    """

    def __init__(
        self,
        generator: Generator,
        classifier: AttributeClassifier,
        planes: dict[str, Hyperplane],
        whitening: Whitening,
        seed: int,
    ) -> None:
        self.generator, self.classifier, self.planes, self.whitening = generator, classifier, planes, whitening
        w = sample_w(generator, FACES, seed)
        self.ws = w[:, None].expand(-1, generator.num_ws, -1)  # (N, L, D)
        self.before = classifier.balanced(draw_and_score(generator, classifier, self.ws).to(classifier.rates)).cpu()

    def side(self, name: str) -> int:
        """The side of an edit on which there is room: away from what most faces are."""
        attribute, sign = attribute_of(name)
        return rarer_side(float(self.classifier.rates[self.classifier.names.index(attribute)]), sign)

    def direction(self, name: str, conditions: Sequence[str]) -> np.ndarray:
        """The step (D,) of an edit under conditions."""
        attribute, sign = attribute_of(name)
        planes = [self.planes[condition] for condition in conditions]
        return sign * direction_of(self.planes[attribute], planes, self.whitening)

    def trial(self, name: str, direction: np.ndarray, layers: tuple[int, int]) -> Trial:
        """Measures an edit of strength 2 towards the side where there is room.

        Args:
            name: Of the edit.
            direction: Its step (D,), or (l, D), a row for each layer.
            layers: The first style that it changes, and the first after the last.

        Returns:
            What it did.
        """
        attribute, sign = attribute_of(name)
        side = self.side(name)
        ws = self.ws.clone()
        ws[:, layers[0] : layers[1]] += side * STRENGTH * torch.from_numpy(direction).float()
        logits = draw_and_score(self.generator, self.classifier, ws).to(self.classifier.rates)
        changes = score_changes(self.before, self.classifier.balanced(logits).cpu()).tolist()
        by_name = dict(zip(self.classifier.names, changes, strict=True))
        own = by_name.pop(attribute) * sign * side
        return Trial(own, {other: c for other, c in by_name.items() if other not in synonyms_of(name)})

    def choose(self, name: str) -> Choice:
        """Finds the conditions and the layers of an edit together.

        Attributes that the edit drags along become conditions, a few at a time, until it is good enough; with each such
        set, every range of layers with even ends is tried.

        Args:
            name: Of the edit.

        Returns:
            The choice of most worth, see `Trial.worth`.
        """
        count = self.generator.num_ws
        ranges = [(start, stop) for start in range(0, count, 2) for stop in range(start + 2, count + 1, 2)]
        conditions: list[str] = []
        best: Choice | None = None
        for _ in range(ROUNDS + 1):
            try:
                direction = self.direction(name, conditions)
            except ValueError:  # the conditions leave nothing of it
                break
            trials = {layers: self.trial(name, direction, layers) for layers in ranges}
            for layers, trial in trials.items():
                if best is None or trial.worth > best.trial.worth:
                    best = Choice(list(conditions), direction, layers, trial)
            everything = trials[0, count]
            dragged = [
                other
                for other, change in sorted(everything.drift.items(), key=lambda item: -abs(item[1]))
                if abs(change) > DRIFT_SHARE * everything.own and other in self.planes and other not in conditions
            ]
            if not dragged or everything.disentanglement <= TARGET:
                break
            conditions = conditions + dragged[:CONDITIONS_A_ROUND]
        assert best is not None
        return best
