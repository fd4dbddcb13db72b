"""Boundaries of attributes: linear support vector machines in W, on generated faces that a classifier has scored.

The codes are whitened first, w = μ + C u with Σ = C Cᵀ, so that u has unit variance in every direction: the machine's
penalty then means the same everywhere, and the step of one standard deviation that changes the attribute's score with
the least departure from the distribution of faces is the unit normal a in u, d = C a in W.

Conditions are InterFaceGAN's projection (Shen et al. 2020, equation 5, for any number of conditions): a loses its part
in the span of the other attributes' normals,

    a' = a − A⁺ A a,    d = C a' / (a · a'),

so that the conditions' scores stay as they are, and the attribute's own still changes by one standard deviation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.files import atomic_write
from models.attributes import AttributeClassifier
from models.device import faces_at_once
from models.generator import Generator

CHUNK = 2000
LEAST_END = 400  # faces at either end; fewer leave the normal in 256 dimensions to chance
LARGEST_SHARE = 0.1  # of the samples at either end
CONFIDENT = 0.8  # probability among faces of which half have the attribute
PENALTY = 1e-4  # C of the support vector machine; small: the surest faces are noisy guides in 256 dimensions
HELD_OUT = 0.2
LEAST_REST = 0.05  # of a normal that conditions must leave: what is left of less is noise


@torch.inference_mode()
def sample_w(generator: Generator, count: int, seed: int) -> Tensor:
    """Maps standard normal z of a seed to codes w (N, D), truncation 1; the first are the same for every N."""
    rng, device, parts = np.random.default_rng(seed), generator.w_avg.device, []
    for start in range(0, count, CHUNK):
        z = rng.standard_normal((min(CHUNK, count - start), generator.z_dim), dtype=np.float32)
        parts.append(generator.mapping(torch.from_numpy(z).to(device))[:, 0].cpu())
    return torch.cat(parts)  # (N, D)


@torch.inference_mode()
def score(generator: Generator, classifier: AttributeClassifier, w: Tensor) -> Tensor:
    """Synthesizes faces of codes (N, D) in batches and scores them: calibrated logits (N, A) on the CPU."""
    logits = []
    for part in w.split(faces_at_once(generator)):
        codes = part.to(generator.w_avg.device)[:, None].expand(-1, generator.num_ws, -1)
        logits.append(classifier(generator.synthesis(codes).clamp(-1, 1)).cpu())
    return torch.cat(logits)


def sample_and_score(
    generator: Generator, classifier: AttributeClassifier, count: int, seed: int, cache: Path, made_with: str
) -> tuple[np.ndarray, np.ndarray]:
    """Samples faces and scores them; what was done before an interruption is taken from the cache.

    Args:
        generator: Synthesizes.
        classifier: Scores.
        count: Faces N.
        seed: Of the faces.
        cache: Folder for the scores, one file for every 2,000 faces.
        made_with: Hashes of generator and classifier: scores of others are not taken from the cache.

    Returns:
        Codes (N, D) and calibrated logits (N, A), float32.
    """
    w, logits = sample_w(generator, count, seed), []
    for start in tqdm(range(0, count, CHUNK), unit="chunk", disable=None):
        part = w[start : start + CHUNK]
        key = hashlib.sha256(f"{made_with} {seed} {start} {len(part)}".encode()).hexdigest()[:16]
        path = cache / f"scores-{key}.npy"
        if not path.is_file():
            scores = score(generator, classifier, part).numpy()
            with atomic_write(path) as partial, open(partial, "wb") as file:
                np.save(file, scores)
        logits.append(np.load(path, allow_pickle=False))
    return w.numpy(), np.concatenate(logits)


@dataclass(frozen=True)
class Whitening:
    """w = μ + C u."""

    mean: np.ndarray  # μ (D,)
    factor: np.ndarray  # C (D, D), the lower Cholesky factor of the covariance

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
    """a · u + b = 0 in whitened coordinates."""

    normal: np.ndarray  # a (D,), of unit length
    intercept: float  # b
    accuracy: float = 0.0  # share of held-out confident faces on the right side
    ends: int = 0  # faces used at each end

    def in_w(self, whitening: Whitening) -> tuple[np.ndarray, float]:
        """The unit normal n (D,) and the intercept of the same hyperplane in W."""
        normal = np.linalg.solve(whitening.factor.T, self.normal)
        length = float(np.linalg.norm(normal))
        return normal / length, (self.intercept - float(normal @ whitening.mean)) / length

    @classmethod
    def of_w(cls, normal: np.ndarray, intercept: float, whitening: Whitening) -> Hyperplane:
        """The inverse of `in_w`: n · w + b = 0 in whitened coordinates."""
        u = whitening.factor.T @ normal
        length = float(np.linalg.norm(u))
        return cls(u / length, (intercept + float(normal @ whitening.mean)) / length)


def confident_ends(logits: np.ndarray, name: str, least: int = LEAST_END) -> tuple[np.ndarray, np.ndarray]:
    """Picks the faces that surely have an attribute, and those that surely lack it, by its logits (N,).

    Returns:
        Indices of as many faces at either end, the surest: where one end is short, so is the other.

    Raises:
        ValueError: If an end has fewer than `least`; says how many samples are needed.
    """
    order = np.argsort(logits, kind="stable")
    threshold = math.log(CONFIDENT / (1 - CONFIDENT))
    counts = int((logits >= threshold).sum()), int((logits <= -threshold).sum())
    if min(counts) < least:
        kind = "with" if counts[0] < counts[1] else "without"
        needed = math.ceil(len(logits) * least / max(min(counts), 1) / 1000) * 1000
        guess = "at least " if min(counts) == 0 else "about "
        raise ValueError(
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

    Raises:
        ValueError: See `confident_ends`.
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
    """Takes from a normal (D,) its part in the span of others, a' = a − A⁺ A a, without normalising it.

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


def step_of(plane: Hyperplane, conditions: Sequence[Hyperplane], whitening: Whitening) -> np.ndarray:
    """Gives the step d (D,) in W of one standard deviation: n · d = σ, and 0 for the conditions' normals."""
    rest = project_out(plane.normal, [condition.normal for condition in conditions])
    return whitening.factor @ (rest / float(plane.normal @ rest))
