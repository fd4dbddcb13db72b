"""Success and errors per group of people, with confidence intervals, as PULSE's model card gives them.

Shares have Wilson's interval, means the percentile bootstrap's, both at 95 %.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap
from torch import Tensor

from data.operator import EPSILON

RESAMPLES = 2000
SUCCESS = -10 * math.log10(EPSILON)  # dB; an LR-PSNR that counts as success, PULSE's tolerance
FILE_COLUMNS = ("file", "image_id", "filename", "name")


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """Gives Wilson's 95 % interval of a share, its lower and upper end."""
    interval = binomtest(successes, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Gives the percentile bootstrap's 95 % interval of a mean of values (N,); the value itself where N is 1."""
    if len(values) < 2:
        return float(values[0]), float(values[0])
    options = {"n_resamples": RESAMPLES, "method": "percentile", "rng": np.random.default_rng(seed)}
    interval = bootstrap((values,), np.mean, **options).confidence_interval
    return float(interval.low), float(interval.high)


@dataclass(frozen=True)
class Grouping:
    """Which group each face belongs to, by a column of a table; "" where the table does not say."""

    column: str
    groups: tuple[str, ...]


def read_grouping(where: str, names: Sequence[str]) -> Grouping:
    """Reads a column of a table of labels.

    Args:
        where: "FILE:COLUMN"; FILE is a CSV with a header, or one packed with gzip. Its column file, image_id, filename
            or name holds the names of the pictures, of which folders and suffixes do not count.
        names: The faces' names.

    Raises:
        ValueError: If there is no such column, or the file knows none of the faces.
        OSError: If it cannot be read.
    """
    file, separator, column = where.rpartition(":")
    if not separator or not file or not column:
        raise ValueError(f"--group-by: expected FILE:COLUMN, got {where!r}.")
    content = Path(file).expanduser().read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig")))
    known = rows.fieldnames or []
    key = next((name for name in FILE_COLUMNS if name in known), None)
    if column not in known or key is None:
        raise ValueError(
            f"--group-by: expected the columns {column} and file (or {', '.join(FILE_COLUMNS[1:])}) in {file}, found "
            f"{', '.join(known)}."
        )
    label = {PurePosixPath(row[key]).stem: row[column].strip() for row in rows}
    groups = tuple(label.get(PurePosixPath(name).stem, "") for name in names)
    if not any(groups):
        raise ValueError(f"--group-by: {file} knows none of the faces, such as {names[0]}; is it for another data set?")
    return Grouping(column, groups)


def by_group(grouping: Grouping, faces: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Measures a method per group.

    Args:
        grouping: Of all faces.
        faces: `Outcome.faces`: `index` (N,), `lr_psnr` (N, c), `lpips` and `identity` (N, c) where measured.

    Returns:
        By group, in sorted order: `faces`; of point estimates `success` (share with an LR-PSNR of `SUCCESS` or more)
        and the means `lr_psnr`, `lpips`, `identity`, each with its `…_interval`.
    """
    groups = np.array(grouping.groups)[faces["index"].numpy()]
    measured = {name: faces[name][:, 0].double().numpy() for name in ("lr_psnr", "lpips", "identity") if name in faces}
    if "identity" in measured:
        measured["identity"] = 1 - measured["identity"]
    results: dict[str, dict[str, Any]] = {}
    for group in sorted(set(groups) - {""}):
        own = groups == group
        total, successes = int(own.sum()), int((measured["lr_psnr"][own] >= SUCCESS).sum())
        row: dict[str, Any] = {"faces": total, "success": successes / total}
        row["success_interval"] = wilson_interval(successes, total)
        for name, values in measured.items():
            row |= {name: float(values[own].mean()), f"{name}_interval": bootstrap_interval(values[own])}
        results[str(group)] = row
    return results
