"""What was measured so far, on disk: a run that was interrupted goes on, and several processes share one.

A *cell* is one method in one setting (LR size and degradation). Its faces are measured in batches, each batch has a
file of its own, and a file is there complete or not at all. Who comes next, after a kill or as another process, leaves
out what is there. The name of the run's folder is a hash of the circumstances that all methods share, the name of a
cell has one of what its method is made of: nothing else is ever mixed in, and a search whose generator stayed the same
need not be measured again because an encoder changed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.faces import Faces
from data.report import complete_file

BATCH = 16
PROBLEMS = "problems"  # names of faces that cannot be read, among the arrays of a batch
ROWS = "rows"  # places of the faces in the data set


@dataclass(frozen=True)
class Processes:
    """The processes that share a run, as torchrun starts them; one alone otherwise.

    Attributes:
        rank: This one's number, from 0.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def join(cls) -> Processes:
        """Meets the others, if torchrun started this process."""
        rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if count > 1 and not dist.is_initialized():
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=2))  # a slow one is waited for
        return cls(rank, count)

    def wait(self) -> None:
        """Waits for all."""
        if self.count > 1:
            dist.barrier()

    def leave(self) -> None:
        """Ends the meeting."""
        if self.count > 1:
            dist.destroy_process_group()

    def mine(self, total: int, batch: int) -> Iterator[slice]:
        """Gives this process's batches of `total` faces; the last one is as long as it is."""
        for start in range(self.rank * batch, total, self.count * batch):
            yield slice(start, min(start + batch, total))


class Store:
    """The files of a run.

    Args:
        out: The run's folder of results.
        circumstances: All that the figures depend on besides the methods, as JSON.
    """

    def __init__(self, out: Path, circumstances: Mapping[str, Any]) -> None:
        text = json.dumps(circumstances, sort_keys=True)
        self.holder = out / "partial"
        self.folder = self.holder / hashlib.sha256(text.encode()).hexdigest()[:16]

    def path(self, cell: str, batch: slice) -> Path:
        """Names the file of a batch."""
        return self.folder / cell / f"{batch.start:08}-{batch.stop:08}.npz"

    def has(self, cell: str, batch: slice) -> bool:
        """Says whether a batch was measured."""
        return self.path(cell, batch).is_file()

    def write(self, cell: str, batch: slice, values: Mapping[str, Tensor], problems: list[str]) -> None:
        """Keeps what was measured on a batch.

        Args:
            cell: The cell's name.
            batch: Its faces.
            values: Arrays (b, …) of those that could be read, with their places as `rows`.
            problems: Names of those that could not, each with the reason.
        """
        arrays: dict[str, Any] = {name: value.numpy() for name, value in values.items()}
        arrays[PROBLEMS] = np.array(problems, dtype=np.str_)
        with complete_file(self.path(cell, batch)) as partial, partial.open("wb") as file:
            np.savez(file, **arrays)

    def batches(self, cell: str, total: int, batch: int) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
        """Reads a cell in the order of the faces, one batch after the other.

        Args:
            cell: The cell's name.
            total: Number of faces.
            batch: Faces per batch.

        Yields:
            Values and problems of each batch.

        Raises:
            FileNotFoundError: If a batch is missing.
        """
        for part in Processes().mine(total, batch):
            with np.load(self.path(cell, part), allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            problems = [str(name) for name in arrays.pop(PROBLEMS)]
            yield {name: torch.from_numpy(array) for name, array in arrays.items()}, problems

    def note(self, name: str, value: float | None = None) -> float | None:
        """Keeps a number by its name, or gives the one that was kept; None if there is none."""
        path = self.folder / f"{name}.json"
        if value is not None:
            with complete_file(path) as partial:
                partial.write_text(json.dumps(value), encoding="ascii")
            return value
        return float(json.loads(path.read_text(encoding="ascii"))) if path.is_file() else None

    def clear(self) -> None:
        """Takes the files away, once the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.holder.is_dir() and not any(self.holder.iterdir()):
            self.holder.rmdir()


def read_faces(faces: Faces, part: slice, device: torch.device) -> tuple[Tensor, list[int], list[str]]:
    """Reads a batch of faces; one that cannot be read never costs the others.

    Args:
        faces: The truths.
        part: Which of them.
        device: Where to put them.

    Returns:
        Faces (b, 3, R, R), uint8; their places; and a line for each that cannot be read.
    """
    read: list[Tensor] = []
    places: list[int] = []
    problems: list[str] = []
    for i in range(part.start, part.stop):
        try:
            read.append(faces[i])
            places.append(i)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    shape = (3, faces.resolution, faces.resolution)
    batch = torch.stack(read) if read else torch.empty(0, *shape, dtype=torch.uint8)
    return batch.to(device), places, problems
