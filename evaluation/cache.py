"""What was measured so far, on disk: an interrupted run continues, and several processes share one.

An *entry* is one row of the table in one condition. Its faces are measured in batches; each is a file, complete or not
there at all. The cache's folder is named by a hash of all that every figure depends on (the faces' pixels, seed,
k, networks that measure), an entry by a hash of its method's recipe: what belongs to other circumstances is never read,
and a search need not run again because an encoder changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.files import atomic_write
from pipeline.processes import Processes


class Cache:
    """The files of a run.

    Args:
        out: The run's folder of results.
        circumstances: All that the figures depend on besides the methods, as JSON.
    """

    def __init__(self, out: Path, circumstances: Mapping[str, Any]) -> None:
        text = json.dumps(circumstances, sort_keys=True)
        self.parent = out / "cache"
        self.folder = self.parent / hashlib.sha256(text.encode()).hexdigest()[:16]

    def path(self, entry: str, batch: slice) -> Path:
        """Names the file of a batch."""
        return self.folder / entry / f"{batch.start:08}-{batch.stop:08}.npz"

    def has(self, entry: str, batch: slice) -> bool:
        """Says whether a batch was measured."""
        return self.path(entry, batch).is_file()

    def write(self, entry: str, batch: slice, values: Mapping[str, Tensor]) -> None:
        """Keeps what was measured on a batch, arrays (b, …) by name."""
        arrays: dict[str, Any] = {name: value.numpy() for name, value in values.items()}
        with atomic_write(self.path(entry, batch)) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)

    def read(self, entry: str, total: int, batch: int) -> dict[str, Tensor]:
        """Reads an entry of `total` faces, in their order; a name may be missing from some batches."""
        parts: dict[str, list[Tensor]] = {}
        for part in Processes().share(total, batch):
            for name, value in self.read_batch(entry, part).items():
                parts.setdefault(name, []).append(value)
        return {name: torch.cat(values) for name, values in parts.items()}

    def read_batch(self, entry: str, batch: slice) -> dict[str, Tensor]:
        """Reads what `write` kept of a batch."""
        with np.load(self.path(entry, batch), allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}

    def note(self, name: str, value: float | None = None) -> float | None:
        """Stores a number under a name, or returns the stored one; None if there is none."""
        path = self.folder / f"{name}.json"
        if value is not None:
            with atomic_write(path) as partial:
                partial.write_text(json.dumps(value), encoding="ascii")
            return value
        return float(json.loads(path.read_text(encoding="ascii"))) if path.is_file() else None

    def clear(self) -> None:
        """Takes the files away, once the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.parent.is_dir() and not any(self.parent.iterdir()):
            self.parent.rmdir()
