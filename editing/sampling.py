"""Generated faces with their scores: what boundaries are fitted to and measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.files import atomic_write
from models.attributes import AttributeClassifier
from models.generator import Generator
from models.memory import faces_at_once

CHUNK = 2000


@dataclass(frozen=True)
class Samples:
    """Codes in W and what the classifier says of their faces.

    Attributes:
        w: Codes (N, D), float32.
        logits: Calibrated logits (N, A), float32.
    """

    w: np.ndarray
    logits: np.ndarray


def sample_w(generator: Generator, count: int, seed: int) -> Tensor:
    """Maps standard normal z of a seed to codes w (N, D), truncation 1.

    Args:
        generator: Whose mapping network is used.
        count: N.
        seed: Of z; the first codes are the same for every N.
    """
    rng, parts = np.random.default_rng(seed), []
    device = generator.w_avg.device
    with torch.inference_mode():
        for start in range(0, count, CHUNK):
            z = rng.standard_normal((min(CHUNK, count - start), generator.z_dim), dtype=np.float32)
            parts.append(generator.mapping(torch.from_numpy(z).to(device))[:, 0].cpu())
    return torch.cat(parts)  # (N, D)


@torch.inference_mode()
def draw_and_score(
    generator: Generator, classifier: AttributeClassifier, ws: Tensor, progress: Callable[[int], object] | None = None
) -> Tensor:
    """Draws faces and scores them, in batches.

    Args:
        generator: Draws.
        classifier: Scores.
        ws: Codes (N, D), the same for all styles, or (N, L, D).
        progress: Told the number of faces of each batch.

    Returns:
        Calibrated logits (N, A) on the CPU.
    """
    logits = []
    for part in ws.split(faces_at_once(generator)):
        codes = part.to(generator.w_avg.device)
        codes = codes[:, None].expand(-1, generator.num_ws, -1) if codes.ndim == 2 else codes
        logits.append(classifier(generator.synthesis(codes, noise_mode="const").clamp(-1, 1)).cpu())
        if progress is not None:
            progress(len(part))
    return torch.cat(logits)


def sample_and_score(
    generator: Generator, classifier: AttributeClassifier, count: int, seed: int, cache: Path, made_with: str
) -> Samples:
    """Samples faces and scores them; what was done before an interruption is taken from the cache.

    Args:
        generator: Draws.
        classifier: Scores.
        count: Faces N.
        seed: Of the faces.
        cache: Folder for the scores, one file for every 2,000 faces.
        made_with: Hashes of generator and classifier: scores of others are not taken from the cache.

    Returns:
        The samples.
    """
    w, logits = sample_w(generator, count, seed), []
    with tqdm(total=count, unit="face", disable=None) as bar:
        for start in range(0, count, CHUNK):
            part = w[start : start + CHUNK]
            key = hashlib.sha256(f"{made_with} {seed} {start} {len(part)}".encode()).hexdigest()[:16]
            path = cache / f"scores-{key}.npy"
            if path.is_file():
                bar.update(len(part))
            else:
                scores = draw_and_score(generator, classifier, part, bar.update).numpy()
                with atomic_write(path) as partial, open(partial, "wb") as file:
                    np.save(file, scores)
            logits.append(np.load(path, allow_pickle=False))
    return Samples(w.numpy(), np.concatenate(logits))
