"""Distances between two sets of faces, always named after the network that sees them.

    d² = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)        (Heusel et al. 2017)

`fid` is the usual one on Inception features. `fd_vgg11` has the same formula on the 256 mean-pooled features of an
ImageNet VGG11-BN up to relu3_2: it works offline, on small pictures and small sets, and is *not* comparable to FID.
`kid_vgg11` is the unbiased squared maximum mean discrepancy of the same features (Bińkowski et al. 2018), and is no
more comparable to KID on Inception.
"""

from __future__ import annotations

import warnings
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from evaluation.features import InceptionFeatures, VGG11Features
from training.batches import BatchRandom, step_rng
from training.run import RunRefused


class _Given(nn.Identity):
    """Takes the place of the network where there are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Measures d² ≥ 0 between two sets of features (N, F) and (M, F), N and M ≥ 2."""
    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Measures KID between two sets of features (N, F): the unbiased squared MMD of the kernel (fᵀ f′ / F + 1)³."""
    return float(poly_mmd(real.double(), fake.double()))


def frechet_metric(name: str = "auto") -> tuple[str, FrechetInceptionDistance]:
    """Makes the metric object; feed it with `update(images_uint8, real=…)`.

    It reads, and may download, a network's weights: make it when it is first needed.

    Args:
        name: "fid" (Inception, 91 MB), "fd_vgg11" (VGG11-BN), or "auto": fd_vgg11 where its weights can be had, else
            fid.

    Returns:
        The name under which the figure must be reported, and the metric.

    Raises:
        ValueError: If the name is unknown, or weights that were found are not the published ones.
        FileNotFoundError: If weights are missing and cannot be downloaded; says which file to put where.
    """
    _check_name(name)
    reasons = []
    for choice in ("fd_vgg11", "fid") if name == "auto" else (name,):
        try:
            network = VGG11Features() if choice == "fd_vgg11" else InceptionFeatures()
            return choice, FrechetInceptionDistance(feature=network, reset_real_features=False)
        except FileNotFoundError as error:
            reasons.append(f"{choice}: {error}")
    raise FileNotFoundError("Expected the weights of a network for the Fréchet distance. " + " ".join(reasons))


def _check_name(name: str) -> None:
    if name not in ("auto", "fid", "fd_vgg11"):
        raise ValueError(f"Expected a Fréchet distance named auto, fid or fd_vgg11, got {name!r}.")


class FrechetDistance(Callback):
    """Measures the Fréchet distance of the averaged generator of a `StyleGAN2Training` at every validation.

    A run continues without it where the network's weights are missing.

    Args:
        metric: See `frechet_metric`.
        samples: Generated faces per validation, 2 or more.

    Raises:
        ValueError: If the metric is unknown, or the samples are fewer.
        RunRefused: Before the first step, if there are fewer than two faces to compare with.
    """

    def __init__(self, metric: str = "auto", samples: int = 2000) -> None:
        _check_name(metric)
        if samples < 2:
            raise ValueError(f"Expected 2 samples or more for a Fréchet distance, got {samples}.")
        self.choice, self.samples = metric, samples
        self._metric: tuple[str, FrechetInceptionDistance] | None = None
        self._known = False  # whether the real faces were seen, which stay the same
        self._missing = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts the validation faces."""
        faces = len(getattr(trainer.datamodule, "val_faces", range(2)))  # type: ignore[attr-defined]
        if faces < 2 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise RunRefused(f"--data.val: expected 2 faces or more for a Fréchet distance, got {faces}.")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the metric when it is first needed."""
        if self._metric is not None or self._missing or trainer.sanity_checking:
            return
        try:
            name, metric = frechet_metric(self.choice)
            self._metric = name, metric.to(pl_module.device)
        except (OSError, ImportError) as error:
            warnings.warn(f"No Fréchet distance is measured: {error}", stacklevel=2)
            self._missing = True

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Shows the metric real faces, uint8 (B, 3, R, R)."""
        if self._metric is not None and not self._known:
            self._metric[1].update(batch, real=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Generates faces, measures and logs."""
        if self._metric is None:
            return
        self._known = True
        name, metric = self._metric
        rng = step_rng(pl_module.hparams["seed"], -1, 0, pl_module.device)
        own = -(-self.samples // trainer.world_size)
        random = BatchRandom(rng, trainer.global_rank, trainer.world_size)
        for first in range(0, own, 50):
            images = pl_module.sample(random.randn(min(50, own - first), pl_module.generator.z_dim))
            metric.update(((images.clamp(-1, 1) + 1) * 127.5).round().byte(), real=False)
        pl_module.log(name, metric.compute().float(), prog_bar=True)
        metric.reset()
