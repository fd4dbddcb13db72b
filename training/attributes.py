"""Trains the attribute classifier on labelled faces.

    L = mean over attributes of (v y softplus(−l) + (1 − y) softplus(l)) / (v r + 1 − r),   v = ((1 − r) / r)^γ

with the share r of faces that have an attribute; l − ln v is what the classifier gives, a calibrated logit. An
exponential moving average of the weights is measured and saved.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import CatMetric
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multilabel_accuracy,
    multilabel_auroc,
    multilabel_recall,
    multilabel_specificity,
)

from data.files import atomic_write
from data.labels import ATTRIBUTES
from losses.attributes import attribute_loss, positive_weights
from models.attributes import AttributeClassifier, save_attributes
from training.batches import faces_from_bytes
from training.optimizers import scheduled, update_average

BINS = 15


def measure_attributes(logits: Tensor, labels: Tensor, balanced: Tensor) -> dict[str, Tensor]:
    """Measures a classifier, attribute by attribute.

    Args:
        logits: Calibrated logits (N, A).
        labels: 0 or 1 (N, A).
        balanced: The logits without the attributes' frequencies (N, A), which decide for the balanced accuracy.

    Returns:
        Each (A,): `rate` of faces that have the attribute, `accuracy` and `majority` (that of always answering the more
        frequent value), `balanced_accuracy` (mean of sensitivity and specificity), `auc` (of the ROC curve; NaN where
        the faces show but one value) and `ece` (expected calibration error in 15 bins of equal width).
    """
    count, probabilities = logits.shape[1], logits.sigmoid()
    rate = labels.double().mean(dim=0).float()
    auc = multilabel_auroc(probabilities, labels, count, average=None)
    assert isinstance(auc, Tensor)
    both = torch.stack([
        multilabel_recall(balanced.sigmoid(), labels, count, average=None),
        multilabel_specificity(balanced.sigmoid(), labels, count, average=None),
    ])  # fmt: skip
    ece = [
        binary_calibration_error(probabilities[:, i].contiguous(), labels[:, i], n_bins=BINS, norm="l1")
        for i in range(count)
    ]
    return {
        "rate": rate,
        "accuracy": multilabel_accuracy(probabilities, labels, count, average=None),
        "majority": torch.maximum(rate, 1 - rate),
        "balanced_accuracy": both.mean(dim=0),
        "auc": torch.where((rate > 0) & (rate < 1), auc, torch.nan),
        "ece": torch.stack(ece),
    }


def table_of(measures: dict[str, Tensor], names: Sequence[str]) -> str:
    """Writes the measures as a table in Markdown, one row per attribute and their mean."""
    heads = [name.replace("_", " ") for name in measures]
    lines = [f"| attribute | {' | '.join(heads)} |", f"|---{'|---:' * len(heads)}|"]
    rows = [*zip(names, torch.stack(list(measures.values())).T.tolist(), strict=True)]
    rows.append(("**mean**", [float(values.nanmean()) for values in measures.values()]))
    lines += [f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |" for name, values in rows]
    return "\n".join(lines) + "\n"


OPTIMISERS = {"adamw": torch.optim.AdamW, "adamax": torch.optim.Adamax}


class AttributeTraining(LightningModule):
    """Training of an attribute classifier.

    Args:
        resolution: Size R of the faces in pixels.
        backbone: A timm model.
        options: Further arguments of `timm.create_model`.
        stem_pool: See `models.attributes.AttributeClassifier`.
        optimiser: adamw or adamax.
        learning_rate: Its rate at the peak; a short warm-up, then a cosine to zero at `trainer.max_steps`.
        warmup_steps: Steps over which the rate rises.
        weight_decay: Of the optimiser.
        weight_power: γ: 0 counts every face the same, 1 makes up for the rareness of an attribute in full.
        ema_steps: Half-life of the moving average, in steps.
        export_to: File where the averaged classifier is saved in float16 at every validation and at the end, relative
            to the run's folder, with a table of the measures next to it; None for nowhere.
        notes: Licence and training data, for the file.
        seed: Of the first weights; the data has its own.
    """

    def __init__(
        self,
        resolution: int = 64,
        backbone: str = "resnet18",
        options: dict[str, Any] | None = None,
        stem_pool: bool = True,
        optimiser: str = "adamw",
        learning_rate: float = 2e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.05,
        weight_power: float = 0.5,
        ema_steps: float = 100,
        export_to: str | None = None,
        notes: dict[str, str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if optimiser not in OPTIMISERS:
            raise ValueError(f"Expected an optimiser among {', '.join(OPTIMISERS)}, got {optimiser!r}.")
        self.classifier = AttributeClassifier(ATTRIBUTES, resolution, backbone, options, stem_pool)
        self.average = copy.deepcopy(self.classifier).eval().requires_grad_(False)
        self._logits, self._labels = CatMetric(), CatMetric()

    # ---------------------------------------------------------------- set-up

    def setup(self, stage: str) -> None:
        """Takes the frequencies of the attributes from the training faces; ValueError if they do not fit."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.val_faces.names != ATTRIBUTES:
            raise ValueError(
                f"Expected labels for CelebA's {len(ATTRIBUTES)} attributes in their order, got {data.val_faces.names}."
            )
        if data.hparams["resolution"] != self.classifier.resolution:
            raise ValueError(
                f"Expected model and data of one resolution, got {self.classifier.resolution} and "
                f"{data.hparams['resolution']}."
            )
        self.to(memory_format=torch.channels_last)
        if stage == "fit":
            rates = data.train_faces.labels.double().mean(dim=0).float()
            log_weights = positive_weights(rates, self.hparams["weight_power"]).log()
            for network in (self.classifier, self.average):
                network.rates.copy_(rates.clamp(1e-3, 1 - 1e-3))
                network.log_weights.copy_(log_weights)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser with warm-up and cosine."""
        h = self.hparams
        optimiser = OPTIMISERS[h["optimiser"]](
            self.classifier.parameters(), h["learning_rate"], weight_decay=h["weight_decay"]
        )

        return scheduled(optimiser, self.trainer, h["warmup_steps"])

    # ---------------------------------------------------------------- one step

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss on faces uint8 (B, 3, R, R) with labels uint8 (B, A)."""
        faces, labels = batch
        logits = self.classifier.weighted(faces_from_bytes(faces))
        loss = attribute_loss(logits, labels, self.classifier.log_weights.exp(), self.classifier.rates).mean()
        self.log("loss", loss.detach(), prog_bar=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Improves the classifier, then its average; here, so that a checkpoint of this step holds both."""
        super().optimizer_step(*args, **kwargs)
        update_average(self.average, self.classifier, self.hparams["ema_steps"], self.global_step)

    # ---------------------------------------------------------------- validation

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Scores faces uint8 (B, 3, R, R) with the averaged classifier, in full precision as it is used later."""
        with torch.autocast(self.device.type, enabled=False):
            self._logits.update(self.average(faces_from_bytes(batch[0])))
        self._labels.update(batch[1])

    def on_validation_epoch_end(self) -> None:
        """Measures all attributes, logs the means and saves the classifier."""
        if self.trainer.sanity_checking:
            return
        measures = self.measures()
        self.log_dict({f"val/{name}": values.nanmean() for name, values in measures.items()}, prog_bar=True)
        self._logits.reset()
        self._labels.reset()
        trainer, target = self.trainer, self.hparams["export_to"]
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # waits for all processes
        if target and trainer.state.fn == "fit" and self.global_rank == 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = folder / target
            save_attributes(self.average, path, {**(self.hparams["notes"] or {}), "steps": str(self.global_step)})
            with atomic_write(path.with_suffix(".md")) as partial:
                partial.write_text(table_of(measures, self.average.names), encoding="utf-8")

    def measures(self) -> dict[str, Tensor]:
        """The measures of the faces seen since the last reset, each (A,)."""
        labels = torch.as_tensor(self._labels.compute()).view(-1, len(self.average.names)).long()
        logits = torch.as_tensor(self._logits.compute()).view(-1, len(self.average.names))
        return measure_attributes(logits, labels, self.average.balanced(logits))
