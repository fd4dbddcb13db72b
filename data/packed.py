"""Faces that were decoded once, as a memory map that all workers and processes of a machine share.

A folder with `faces.npy`, uint8 (N, 3, R, R), and `names.txt`, a picture's name in each line; `data.pack` writes it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.files import read_names

ARRAY, NAMES = "faces.npy", "names.txt"


class PackedFaces:
    """Reads packed faces; ValueError if they do not belong together."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = read_names(folder / NAMES)
        self.rows = {name: row for row, name in enumerate(self.names)}
        self._array: np.ndarray | None = None
        shape = self._opened().shape
        if shape[:2] != (len(self.names), 3) or len(shape) != 4:
            raise ValueError(
                f"Expected {len(self.names)} faces (N, 3, R, R) in {folder / ARRAY}, as {NAMES} names so many, got "
                f"{shape}; pack them anew."
            )
        self.resolution: int = shape[2]

    @staticmethod
    def is_one(folder: Path) -> bool:
        """Says whether a folder holds packed faces."""
        return (folder / ARRAY).is_file() and (folder / NAMES).is_file()

    def __getstate__(self) -> dict:
        """Leaves the map behind, which would be copied as a whole: every process opens its own."""
        return {**self.__dict__, "_array": None}

    def __getitem__(self, name: str) -> np.ndarray:
        """Gives a copy of a face by its name, uint8 (3, R, R)."""
        return np.array(self._opened()[self.rows[name]])

    def _opened(self) -> np.ndarray:
        if self._array is None:
            self._array = np.load(self.folder / ARRAY, mmap_mode="r")
        return self._array
