"""Boundaries from samples: linear support vector machines in W, and directions that leave other attributes alone.

The codes are whitened first, w = μ + C u with Σ = C Cᵀ, so that u has unit variance in every direction: the machine's
penalty then means the same everywhere, and the step of one standard deviation that changes the attribute's score with
the least departure from the distribution of faces is the unit normal a in u, d = C a in W.

Conditions are InterFaceGAN's projection (Shen et al. 2020, equation 5, for any number of conditions): a loses its part
in the span of the other attributes' normals,

    a' = a − A⁺ A a,    d = C a' / (a · a'),

so that the conditions' scores stay as they are, and the attribute's own still changes by one standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from editing.sampling import Samples

LEAST_END = 400  # faces at either end; fewer leave the normal in 256 dimensions to chance
LARGEST_SHARE = 0.1  # of the samples at either end
CONFIDENT = 0.8  # probability among faces of which half have the attribute
PENALTY = 1e-4  # C of the support vector machine; small: the surest faces are noisy guides in 256 dimensions
HELD_OUT = 0.2
LEAST_REST = 0.05  # of a normal that conditions must leave: what is left of less is noise


class TooFewSamples(ValueError):
    """There are too few confident faces; the message says how many samples are needed."""


@dataclass(frozen=True)
class Whitening:
    """w = μ + C u.

    Attributes:
        mean: μ (D,).
        factor: C (D, D), the lower Cholesky factor of the covariance.
    """

    mean: np.ndarray
    factor: np.ndarray

    @classmethod
    def of(cls, w: np.ndarray) -> Whitening:
        """Measures mean and covariance of codes (N, D)."""
        covariance = np.cov(w.astype(np.float64), rowvar=False)
        jitter = 1e-6 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        return cls(w.mean(axis=0, dtype=np.float64), np.linalg.cholesky(covariance + jitter))

    def whiten(self, w: np.ndarray) -> np.ndarray:
        """Maps codes w (N, D) to u (N, D)."""
        return np.linalg.solve(self.factor, (w - self.mean).T).T


@dataclass(frozen=True)
class Hyperplane:
    """a · u + b = 0 in whitened coordinates.

    Attributes:
        normal: a (D,), of unit length.
        intercept: b.
        accuracy: Share of held-out confident faces on the right side.
        ends: Faces used at each end.
    """

    normal: np.ndarray
    intercept: float
    accuracy: float
    ends: int

    def in_w(self, whitening: Whitening) -> tuple[np.ndarray, float]:
        """The unit normal n (D,) and the intercept of the same hyperplane in W."""
        normal = np.linalg.solve(whitening.factor.T, self.normal)
        length = float(np.linalg.norm(normal))
        return normal / length, (self.intercept - float(normal @ whitening.mean)) / length


def confident_ends(logits: np.ndarray, name: str, least: int = LEAST_END) -> tuple[np.ndarray, np.ndarray]:
    """Picks the faces that have an attribute for sure, and those that have it not.

    Args:
        logits: Of one attribute, 0 where it is undecided (N,).
        name: Of the attribute, for the message.
        least: Faces needed at either end.

    Returns:
        Indices of as many faces at either end, the surest: where one end is short, so is the other.

    Raises:
        TooFewSamples: If an end has fewer than `least`; says how many samples are needed.
    """
    order = np.argsort(logits, kind="stable")
    threshold = math.log(CONFIDENT / (1 - CONFIDENT))
    counts = int((logits >= threshold).sum()), int((logits <= -threshold).sum())
    if min(counts) < least:
        kind = "with" if counts[0] < counts[1] else "without"
        needed = math.ceil(len(logits) * least / max(min(counts), 1) / 1000) * 1000
        guess = "at least " if min(counts) == 0 else "about "
        raise TooFewSamples(
            f"{name}: expected {least} faces surely {kind} it, {len(logits)} samples hold {min(counts)}; "
            f"{guess}{needed} are needed: --samples {needed}"
        )
    ends = min(*counts, max(least, int(LARGEST_SHARE * len(logits))))
    return order[-ends:], order[:ends]


def fit_hyperplane(u: np.ndarray, logits: np.ndarray, name: str, seed: int = 0, least: int = LEAST_END) -> Hyperplane:
    """Fits the hyperplane between the confident ends of an attribute.

    Args:
        u: Whitened codes (N, D).
        logits: Of the attribute, 0 where it is undecided (N,).
        name: Of the attribute.
        seed: Decides which faces are held out.
        least: Faces needed at either end.

    Returns:
        The hyperplane; its normal points to the faces that have the attribute.

    Raises:
        TooFewSamples: See `confident_ends`.
    """
    from sklearn.svm import LinearSVC  # late: it takes a second

    positive, negative = confident_ends(logits, name, least)
    rng = np.random.default_rng(seed)
    held, kept = [], []
    for end in (positive, negative):
        shuffled = rng.permutation(end)
        cut = round(HELD_OUT * len(end))
        held.append(shuffled[:cut])
        kept.append(shuffled[cut:])
    machine = LinearSVC(C=PENALTY, dual=False, random_state=0)
    machine.fit(u[np.concatenate(kept)], np.repeat([1, 0], [len(part) for part in kept]))
    accuracy = machine.score(u[np.concatenate(held)], np.repeat([1, 0], [len(part) for part in held]))
    normal, length = machine.coef_[0], float(np.linalg.norm(machine.coef_[0]))
    return Hyperplane(normal / length, float(machine.intercept_[0]) / length, float(accuracy), len(positive))


def project_out(normal: np.ndarray, conditions: Sequence[np.ndarray]) -> np.ndarray:
    """Takes from a normal its part in the span of others: a' = a − A⁺ A a.

    Args:
        normal: a (D,).
        conditions: Other normals (D,), any number.

    Returns:
        a' (D,), orthogonal to all of them, not normalised.

    Raises:
        ValueError: If next to nothing is left: the conditions say the same as the attribute.
    """
    if not len(conditions):
        return normal
    basis, sizes, _ = np.linalg.svd(np.stack(conditions).T, full_matrices=False)  # (D, m), orthonormal
    basis = basis[:, sizes > 1e-6 * sizes[0]]  # conditions may say the same twice
    rest = normal - basis @ (basis.T @ normal)
    if np.linalg.norm(rest) < LEAST_REST * np.linalg.norm(normal):
        raise ValueError("the conditions leave next to nothing of the direction; take out those that mean the same")
    return rest


def direction_of(plane: Hyperplane, conditions: Sequence[Hyperplane], whitening: Whitening) -> np.ndarray:
    """Gives the step d (D,) in W of one standard deviation, under conditions.

    Args:
        plane: Of the attribute.
        conditions: Of those that shall stay as they are.
        whitening: Of W.

    Returns:
        d, with n · d = σ for the attribute and n · d = 0 for the conditions.

    Raises:
        ValueError: See `project_out`.
    """
    rest = project_out(plane.normal, [condition.normal for condition in conditions])
    return whitening.factor @ (rest / float(plane.normal @ rest))


def planes_of(
    samples: Samples,
    balance: np.ndarray,
    names: Sequence[str],
    wanted: Sequence[str],
    seed: int = 0,
    others: bool = True,
) -> tuple[Whitening, dict[str, Hyperplane], dict[str, str]]:
    """Fits the hyperplanes of attributes.

    Args:
        samples: Codes and calibrated logits.
        balance: Logits of the attributes' frequencies (A,), taken off: a rare attribute is confident earlier.
        names: Of the attributes.
        wanted: Attributes that must have one.
        seed: Of the held-out faces.
        others: Of the other attributes, those that have enough samples get one too, to be conditions.

    Returns:
        The whitening, the hyperplanes by attribute, and for those that got none the reason.

    Raises:
        TooFewSamples: If a wanted attribute has too few confident faces.
    """
    whitening = Whitening.of(samples.w)
    u = whitening.whiten(samples.w)
    planes, left_out = {}, {}
    for i, name in enumerate(names):
        if not others and name not in wanted:
            continue
        try:
            planes[name] = fit_hyperplane(u, samples.logits[:, i] - balance[i], name, seed)
        except TooFewSamples as error:
            if name in wanted:
                raise
            left_out[name] = str(error)
    return whitening, planes, left_out
