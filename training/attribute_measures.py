"""How well attributes are recognised: accuracy, balanced accuracy, area under the curve, calibration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multilabel_accuracy,
    multilabel_auroc,
    multilabel_recall,
    multilabel_specificity,
)

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
    """Writes the measures as a table in Markdown, one row per attribute and their mean.

    Args:
        measures: From `measure_attributes`.
        names: Of the attributes.

    Returns:
        The table.
    """
    heads = [name.replace("_", " ") for name in measures]
    lines = [f"| attribute | {' | '.join(heads)} |", f"|---{'|---:' * len(heads)}|"]
    rows = [*zip(names, torch.stack(list(measures.values())).T.tolist(), strict=True)]
    rows.append(("**mean**", [float(values.nanmean()) for values in measures.values()]))
    lines += [f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} |" for name, values in rows]
    return "\n".join(lines) + "\n"
