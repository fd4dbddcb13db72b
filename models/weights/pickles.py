"""Reads NVIDIA's `.pkl` files as data: no code that a file holds or names is executed."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import torch

from models.weights.calls import Calls, storage_type
from models.weights.checkpoint import FORMATS
from models.weights.machine import PickleMachine
from models.weights.records import Allowance, Storage

MAGIC = 0x1950A86A20F9469CFC6C  # of `torch.save` before its zip files
_PROTOCOL = 1001


def read_pickle(path: Path) -> Any:
    """Reads a pickle of tensors, plain containers, and networks of NVIDIA's `torch_utils.persistence`.

    Args:
        path: The file.

    Returns:
        Its content: numbers, texts, lists, tuples and dictionaries as such; bytes as `memoryview`; a tensor as a
        `TensorRecord`, whose `tensor()` makes it; a class or function as a `Global`; what it would make as a `Record`.

    Raises:
        ValueError: If it holds anything else, is damaged, or would take more memory than its size explains.
    """
    try:
        data = map_file(path)
        allowance = Allowance(len(data), tensors=len(data))
        calls = Calls(allowance, lambda storage: _read_own_storage(storage, allowance))
        content, end = PickleMachine(data, calls).run()
        if end != len(data):
            raise ValueError(f"{len(data) - end:,} bytes follow its end")
        return content
    except (ValueError, OSError, OverflowError, struct.error) as error:
        raise refusal(path, "pickle of networks", error) from error


def refusal(path: Path, expected: str, error: Exception) -> ValueError:
    """Gives the error for a file that is not read.

    Args:
        path: The file.
        expected: What it was taken for.
        error: What is wrong with it.

    Returns:
        The error to raise.
    """
    return ValueError(f"{path}: not a safe and complete {expected} ({error}); nothing in it was executed. {FORMATS}")


def map_file(path: Path) -> memoryview:
    """Maps a file's bytes into memory, where they take room only once they are looked at.

    Args:
        path: The file.

    Returns:
        The bytes. They count as writable, as torch demands, but writing would not change the file.

    Raises:
        ValueError: If the file is empty.
    """
    with open(path, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


class Storages:
    """The storages of a file by their keys.

    Args:
        allowance: What reading the file may still cost.
        entries: The storages' bytes by key, None where they follow later in the file.
    """

    def __init__(self, allowance: Allowance, entries: dict[str, memoryview] | None = None) -> None:
        self.allowance = allowance
        self.entries = entries
        self.by_key: dict[str, Storage] = {}
        self.announced = 0  # bytes

    def get(self, ident: Any) -> Storage:
        """Gives the storage of a persistent id; wherever it was saved from, its numbers go to the CPU.

        Args:
            ident: ("storage", class, key, location, count) or the same with None at the end.

        Returns:
            The storage, the same one for the same key.

        Raises:
            ValueError: If the id is another one, or announces more bytes than there are.
        """
        known = type(ident) is tuple and len(ident) >= 5 and ident[0] == "storage" and ident[5:] in ((), (None,))
        if not known:
            raise ValueError("a persistent id is not that of a storage")
        kind, key, count = ident[1], ident[2], ident[4]
        if type(key) is not str or type(count) is not int or count < 0:
            raise ValueError("a storage is described in an unknown way")
        dtype = storage_type(kind)
        size = count * _itemsize(dtype)
        if key not in self.by_key:
            self.by_key[key] = self._make(key, dtype, size)
        storage = self.by_key[key]
        if (storage.dtype, storage.size) != (dtype, size):
            raise ValueError(f"storage {key[:40]!r} is described in two ways")
        return storage

    def _make(self, key: str, dtype: torch.dtype | None, size: int) -> Storage:
        self.announced += size
        data = None if self.entries is None else self.entries.get(key)
        missing = self.entries is not None and (data is None or len(data) != size)
        if missing or self.announced > self.allowance.size:
            raise ValueError(f"storage {key[:40]!r} announces {size:,} bytes, more or less than there are")
        return Storage(dtype, size, self.allowance, data)


def read_legacy(data: memoryview, calls: Calls) -> Any:
    """Reads what `torch.save` wrote before its zip files: five pickles, then the numbers of every storage.

    Args:
        data: The bytes, all of them.
        calls: Knows what names are allowed.

    Returns:
        The content.

    Raises:
        ValueError: If it is of another format, damaged or not safe.
    """
    magic, position = PickleMachine(data, calls).run()
    protocol, position = PickleMachine(data, calls, position).run()
    system, position = PickleMachine(data, calls, position).run()
    if magic != MAGIC or protocol != _PROTOCOL or type(system) is not dict or system.get("little_endian") is not True:
        raise ValueError("it does not start as a little-endian file of torch.save does")
    storages = Storages(calls.allowance)
    content, position = PickleMachine(data, calls, position, storages.get).run()
    keys, position = PickleMachine(data, calls, position).run()
    if type(keys) is not list or any(type(k) is not str for k in keys) or sorted(keys) != sorted(storages.by_key):
        raise ValueError("its storages are not those that it lists")
    for key in keys:
        storage = storages.by_key[key]
        count = data[position : position + 8]
        start = position + 8
        position = start + storage.size
        if bytes(count) != (storage.size // _itemsize(storage.dtype)).to_bytes(8, "little") or position > len(data):
            raise ValueError(f"storage {key[:40]!r} has not the {storage.size:,} bytes that it announces")
        storage.data = data[start:position]
    if position != len(data):
        raise ValueError(f"{len(data) - position:,} bytes follow its end")
    return content


def _itemsize(dtype: torch.dtype | None) -> int:
    return 1 if dtype is None else dtype.itemsize


def _read_own_storage(data: memoryview, allowance: Allowance) -> Storage:
    """Reads a storage that was pickled on its own, which torch does by `torch.save` in its format of old."""
    storage = read_legacy(data, Calls(allowance))
    if type(storage) is not Storage:
        raise ValueError("a storage's bytes hold something else")
    return storage
