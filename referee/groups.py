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
from torch import Tensor

Z = 1.959964  # of the normal distribution, for 95 %
RESAMPLES = 2000
FILE_COLUMNS = ("file", "image_id", "filename", "name")


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """Gives the 95 % interval of a share.

    (p + z²/2n ± z √(p (1 − p)/n + z²/4n²)) / (1 + z²/n)

    Args:
        successes: How often.
        total: Of how many, at least 1.

    Returns:
        Lower and upper end, within [0, 1].

    References:
        Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    p, shift = successes / total, Z**2 / (2 * total)
    half = Z * math.sqrt(p * (1 - p) / total + Z**2 / (4 * total**2))
    return max(0.0, (p + shift - half) / (1 + 2 * shift)), min(1.0, (p + shift + half) / (1 + 2 * shift))


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Gives the 95 % interval of a mean, from the percentiles of resampled means.

    Args:
        values: Numbers (N,), N ≥ 1.
        seed: Of the resampling.

    Returns:
        Lower and upper end.
    """
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


@dataclass(frozen=True)
class Grouping:
    """Which group each face belongs to.

    Attributes:
        column: The column's name.
        groups: One per face, "" where the file does not say.
    """

    column: str
    groups: tuple[str, ...]


def read_grouping(where: str, names: Sequence[str]) -> Grouping:
    """Reads a column of a table of labels.

    Args:
        where: "FILE:COLUMN"; FILE is a CSV with a header, or one packed with gzip. Its column file, image_id, filename
            or name holds the names of the pictures, of which folders and suffixes do not count.
        names: The faces' names.

    Returns:
        The grouping.

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


def by_group(grouping: Grouping, faces: Mapping[str, Tensor], epsilon: float) -> dict[str, dict[str, Any]]:
    """Measures a method per group.

    Args:
        grouping: Of all faces.
        faces: `Outcome.faces`: `rows` (N,), `error` (N, c), `lpips` (N,).
        epsilon: Tolerance of the downscaling error.

    Returns:
        By group, in sorted order: `faces`; `within` (share of best guesses), `within_all` (of all candidates), `error`
        and `lpips` (means of the best guess), each with its `…_interval`. That of within_all resamples faces, since
        candidates of one face are alike.
    """
    groups = np.array(grouping.groups)[faces["rows"].numpy()]
    error, lpips = faces["error"].double().numpy(), faces["lpips"].double().numpy()
    results: dict[str, dict[str, Any]] = {}
    for group in sorted(set(groups) - {""}):
        own = groups == group
        within = error[own] <= epsilon  # (n, c)
        row: dict[str, Any] = {"faces": int(own.sum()), "within": float(within[:, 0].mean())}
        row["within_interval"] = wilson_interval(int(within[:, 0].sum()), int(own.sum()))
        for name, values in (("within_all", within.mean(axis=1)), ("error", error[own][:, 0]), ("lpips", lpips[own])):
            row |= {name: float(values.mean()), f"{name}_interval": bootstrap_interval(values)}
        results[str(group)] = row
    return results
