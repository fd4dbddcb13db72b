"""Face pictures straight from a zip, a folder or a Parquet table, resized once and kept in memory where they fit."""

from __future__ import annotations

import hashlib
import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.contents import Contents
from data.image_io import IMAGE_SUFFIXES, from_uint8, read_bytes
from data.shared_memory import ADVICE, SHARED_MEMORY, free_shared_memory
from data.splits import PARTS, check_sizes, split_names

_log = logging.getLogger(__name__)


class Faces(Dataset[Tensor]):
    """Square face pictures at one resolution, as bytes.

    Args:
        source: A zip, a Parquet file, a folder (searched with its subfolders), or what `data.pack` wrote, see
            `data.contents.find_data`. Hidden files and folders (".…"), what macOS adds to zips ("__MACOSX"), and masks
            of CelebAMask-HQ are no faces.
        resolution: Size R in pixels; pictures of another size are resized bicubically, antialiased.
        limit: Use only the first so many pictures in sorted order; None for all.
        cache_bytes: Decoded pictures are kept in memory if all of them fit into so many bytes; packed ones never.
        shared: Keep them in shared memory, so that the workers of a data loader fill one cache; without workers it
            only costs /dev/shm, which is small in containers (64 MB in Docker, unless run with --shm-size). Where it
            has no room for them, nothing is kept, with a warning.
        split: Use one part alone, "celeba", "celebahq", "ffhq" or a folder of lists, see `data.splits.split_names`;
            None for all pictures. A standard split that is not complete is used with a warning.
        part: Which part: "train", "val" or "test".
        replace_broken: Give the next picture in the place of one that cannot be read, which is named in the log; an
            error comes once that is more than half of them. False raises it at once.

    Raises:
        FileNotFoundError: If the source does not exist, or a text that the split needs.
        ValueError: If it is no zip, holds no picture, is packed at another resolution, or does not fit the split.
    """

    def __init__(
        self,
        source: str | Path,
        resolution: int,
        limit: int | None = None,
        cache_bytes: int = 4 * 2**30,
        shared: bool = False,
        split: str | None = None,
        part: str = "train",
        replace_broken: bool = False,
    ) -> None:
        self.replace_broken = replace_broken
        self.contents = Contents(source)
        self.source = self.contents.source
        self.resolution = resolution
        names, self._packed = self.contents.pictures, self.contents.packed
        if self._packed and self._packed.resolution != resolution:
            raise ValueError(f"{self.source} is packed at {self._packed.resolution} px; pack it at {resolution} px.")
        if not names:
            raise ValueError(f"Expected pictures ({', '.join(IMAGE_SUFFIXES)}) in {self.source}, found none.")
        if split is not None:
            names = self._part(names, split, part)
        self.names = names[:limit]
        self._broken = torch.zeros(len(self.names), dtype=torch.bool)
        if shared and replace_broken:
            self._broken.share_memory_()  # so that all workers count together
        self._make_cache(cache_bytes, shared)

    def _make_cache(self, cache_bytes: int, shared: bool) -> None:
        """Makes room for decoded pictures, if all of them fit."""
        shape = (len(self.names), 3, self.resolution, self.resolution)
        needed = int(np.prod(shape))
        self._cache: Tensor | None = None
        if shared and not self._packed and free_shared_memory() < needed <= cache_bytes:
            warnings.warn(
                f"{SHARED_MEMORY} has no room to keep {len(self.names)} decoded faces ({needed / 2**30:.1f} GiB): they "
                f"are decoded anew in every epoch. To keep them {ADVICE}, or pack them once (python -m data.pack).",
                stacklevel=3,
            )
        elif needed <= cache_bytes and not self._packed:
            self._cache = torch.zeros(shape, dtype=torch.uint8)
            self._cached = torch.zeros(len(self.names), dtype=torch.bool)
            if shared:
                self._cache.share_memory_()
                self._cached.share_memory_()

    def _part(self, names: list[str], split: str, part: str) -> list[str]:
        """Selects the pictures of one part of a split."""
        if part not in PARTS:
            raise ValueError(f"Expected a part, {', '.join(PARTS)}, got {part!r}.")
        try:
            parts = split_names(split, names, self.contents.companion)
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from error
        if not parts[part]:
            raise ValueError(f"{self.source}: the split {split} leaves no picture for {part}; check the file names.")
        for problem in check_sizes(split, {part: parts[part]}):
            warnings.warn(f"{self.source} is not complete: {problem}", stacklevel=3)
        return parts[part]

    def __len__(self) -> int:
        """The number of pictures."""
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:
        """Gives picture `index` as uint8 (3, R, R)."""
        return self.load(index)[1]

    def load(self, index: int) -> tuple[int, Tensor]:
        """Gives a picture, uint8 (3, R, R), and its index; where broken ones are replaced the next that can be read.

        Raises:
            ValueError: If it cannot be read and must not be replaced, or most pictures cannot be read.
        """
        while True:
            if not self._broken[index]:
                try:
                    return index, self._face(index)
                except ValueError as error:
                    if not self.replace_broken:
                        raise
                    self._note_broken(index, error)
            index = (index + 1) % len(self)

    def _note_broken(self, index: int, error: ValueError) -> None:
        self._broken[index] = True
        count = int(self._broken.sum())
        if 2 * count > len(self):
            raise ValueError(
                f"{self.source}: {count} of {len(self)} pictures cannot be read, which are most; the last: {error}"
            ) from error
        _log.warning("%s Skipped, another takes its place; %d of %d so far.", error, count, len(self))

    def _face(self, index: int) -> Tensor:
        if self._cache is None:
            return self._decode(index)
        if not self._cached[index]:
            self._cache[index] = self._decode(index)
            self._cached[index] = True
        return self._cache[index]

    def fingerprint(self) -> str:
        """Gives a hash over the names and sizes of the pictures: a run that goes on asks whether they are the same."""
        lines = "".join(f"{name}\0{self.contents.size(name)}\n" for name in self.names)
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()

    def images(self, count: int | None = None) -> Tensor:
        """Gives the first pictures at once, (n, 3, R, R) in [-1, 1]; all of them if None."""
        return from_uint8(torch.stack([self[i] for i in range(len(self))[:count]]))

    def _decode(self, index: int) -> Tensor:
        name = self.names[index]
        if self._packed:
            return torch.from_numpy(self._packed[name])
        image = Image.fromarray(read_bytes(self.contents.open(name), f"{self.source}: {name}"))
        if image.width != image.height:
            raise ValueError(f"{self.source}: expected square pictures, {name} has {image.width}x{image.height} px.")
        if image.width != self.resolution:
            image = image.resize((self.resolution, self.resolution), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
