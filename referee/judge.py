"""The referee: measures methods on the same faces, and takes their time."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from data.faces import Faces
from data.operator import EPSILON, Downscale, downscaling_error
from data.reading import from_uint8
from losses.perceptual import LPIPS
from models.identity import Identity
from referee.measures import as_written, candidates_that_count, diversity, low_resolution, psnr
from referee.methods import Method
from training.frechet import frechet_metric

BATCH = 16
FRECHET_FACES = 1000  # below, the covariance of the features is too uncertain
TIMED_FACES, WARM_UP = 20, 3
SHOWN_FACES = 6


def batches(faces: Faces, size: int, device: torch.device) -> Iterator[Tensor]:
    """Gives the faces in order, uint8 (B, 3, R, R)."""
    for start in range(0, len(faces), size):
        yield torch.stack([faces[i] for i in range(start, min(start + size, len(faces)))]).to(device)


@dataclass
class Outcome:
    """What one method did at one LR size.

    Attributes:
        means: Mean over faces by the name of the measure; None where it does not apply or cannot be measured.
        shown: Pictures (n, 1 or 2, 3, R, R), uint8: best guess and second candidate of the first faces.
    """

    means: dict[str, float | None]
    shown: Tensor


class Referee:
    """Measures methods; holds the faces and the networks that measure.

    Args:
        faces: The truths.
        device: Where everything is computed.

    Raises:
        FileNotFoundError: If LPIPS has no weights. Other networks without weights leave their measure out and warn.
    """

    def __init__(self, faces: Faces, device: torch.device) -> None:
        self.faces, self.device = faces, device
        self.lpips = LPIPS().to(device)
        self.identity: Identity | None = None
        self.frechet: tuple[str, FrechetInceptionDistance] | None = None
        try:
            self.identity = Identity().to(device)
        except FileNotFoundError as error:
            warnings.warn(f"The identity similarity is left out (n/a). {error}", stacklevel=2)
        if len(faces) >= FRECHET_FACES:
            try:
                self._prepare_frechet()
            except (OSError, ImportError) as error:  # a download or a package that is not to be had
                warnings.warn(f"The Fréchet distance is left out (n/a). {error}", stacklevel=2)

    @torch.no_grad()
    def _prepare_frechet(self) -> None:
        name, metric = frechet_metric()
        metric = metric.to(self.device)
        for truth in batches(self.faces, BATCH, self.device):
            metric.update(truth, real=True)  # kept through reset()
        self.frechet = name, metric

    @property
    def networks(self) -> dict[str, str | None]:
        """The networks by the measure they serve; None for a measure that is left out."""
        return {
            "lpips": "LPIPS 0.1, SqueezeNet 1.1",
            "identity": "MobileFaceNet y1, cosine" if self.identity else None,
            "frechet": self.frechet[0] if self.frechet else None,
        }

    @torch.no_grad()
    def judge(self, method: Method, lr_size: int, k: int, seed: int, progress: tqdm | None = None) -> Outcome:
        """Measures one method at one LR size, in batches.

        Args:
            method: The method.
            lr_size: Width s of the LR pictures in pixels.
            k: Candidates per face to ask for.
            seed: Seed of the random numbers, which depend on the LR size too, and on nothing else.
            progress: A bar to move on by the number of faces.

        Returns:
            Means and pictures.

        Raises:
            ValueError: If the method returns pictures of another shape, or not finite.
        """
        rng = np.random.default_rng([seed, lr_size])
        values: dict[str, list[Tensor]] = defaultdict(list)
        shown: list[Tensor] = []
        if self.frechet:
            self.frechet[1].reset()
        for truth in batches(self.faces, BATCH, self.device):  # (B, 3, R, R)
            lr = low_resolution(truth, lr_size)
            pictures = as_written(method(lr, k, rng), len(truth), self.faces.resolution)  # (B, c, 3, R, R)
            for name, value in self._measure(pictures, truth, lr).items():
                values[name].append(value.cpu().double())
            if self.frechet:
                self.frechet[1].update(pictures[:, 0], real=False)
            if sum(map(len, shown)) < SHOWN_FACES:
                shown.append(pictures[:SHOWN_FACES, :2].cpu())
            if progress is not None:
                progress.update(len(truth))
        means: dict[str, float | None] = {name: torch.cat(value).mean().item() for name, value in values.items()}
        if self.frechet:
            means["frechet"] = self.frechet[1].compute().item()
        return Outcome(means, torch.cat(shown)[:SHOWN_FACES])

    def _measure(self, pictures: Tensor, truth: Tensor, lr: Tensor) -> dict[str, Tensor]:
        """Measures a batch: pictures (B, c, 3, R, R) and truth (B, 3, R, R) in uint8; values (B,)."""
        images, faces = from_uint8(pictures), from_uint8(truth)
        best, c = images[:, 0], images.shape[1]
        errors = downscaling_error(images.flatten(0, 1), lr.repeat_interleave(c, 0), Downscale(lr.shape[-1]))
        errors = errors.unflatten(0, (-1, c))  # (B, c)
        features = [f.unflatten(0, (-1, c)) for f in self.lpips.features(images.flatten(0, 1))]
        ssim = structural_similarity_index_measure((best + 1) / 2, (faces + 1) / 2, reduction="none", data_range=1.0)
        assert isinstance(ssim, Tensor)
        values = {
            "psnr": psnr(best, faces),
            "ssim": ssim,
            "lpips": self.lpips.distance([f[:, 0] for f in features], self.lpips.features(faces)),
            "error": errors[:, 0],
            "within": (errors[:, 0] <= EPSILON).float(),
        }
        if self.identity:
            values["identity"] = (self.identity(best) * self.identity(faces)).sum(dim=1)
        if c > 1:
            counts = candidates_that_count(errors)
            values["diversity"] = diversity(self.lpips, features, counts)
            values["count"] = counts.float().mean(dim=1)
        return values

    @torch.no_grad()
    def seconds(self, method: Method, lr_size: int) -> float:
        """Takes the median time in seconds for one face, one candidate, batch 1, after warming up."""
        rng, times = np.random.default_rng(0), []
        truths = [truth for truth, _ in zip(batches(self.faces, 1, self.device), range(TIMED_FACES), strict=False)]
        for i in range(-WARM_UP, len(truths)):
            lr = low_resolution(truths[max(i, 0)], lr_size)
            self._synchronize()
            start = time.perf_counter()
            method(lr, 1, rng)
            self._synchronize()
            if i >= 0:
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
