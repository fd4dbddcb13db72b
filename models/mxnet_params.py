"""Reads MXNet's `.params` files with numpy alone: MXNet is retired, and its last release fails on today's numpy.

The format, little-endian, is that of `NDArray::Save` in MXNet 0.12 to 1.9:

    file    = u64 0x112, u64 reserved, u64 count, count × array, u64 count, count × (u64 length, name)
    array   = u32 magic, [i32 storage type, from V2 on], u32 ndim, ndim × i64, i32 device, i32 device number,
              i32 number type, numbers in C order

An array without a shape (V1, V2: ndim = 0; V3: ndim = -1) ends after ndim.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np

LIST_MAGIC = 0x112
V1, V2, V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
DENSE = 0
NUMBER_TYPES = ("<f4", "<f8", "<f2", "u1", "<i4", "i1", "<i8")  # by MXNet's type flag
MAX_DIMS = 32


class _Cursor:
    """Reads a file's content from front to back."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.position = 0

    def take(self, size: int) -> bytes:
        """Gives the next `size` bytes."""
        end = self.position + size
        if end > len(self.content):
            raise ValueError(f"it ends at byte {len(self.content)}, where {end} or more were announced")
        piece = self.content[self.position : end]
        self.position = end
        return piece

    def numbers(self, layout: str) -> tuple[int, ...]:
        """Gives the next integers, in a layout of the module struct."""
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))


def read_mxnet_params(path: str | Path) -> dict[str, np.ndarray]:
    """Reads named arrays.

    Args:
        path: A `.params` file, as `mx.model.save_checkpoint` and `mx.nd.save` write it.

    Returns:
        Arrays by name; those of a model's checkpoint begin with "arg:" (trained) or "aux:" (statistics).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no complete list of dense, named arrays; nothing in it is executed.
    """
    cursor = _Cursor(Path(path).read_bytes())
    try:
        magic, _, count = cursor.numbers("QQQ")
        if magic != LIST_MAGIC:
            raise ValueError(f"it begins with {magic:#x} instead of {LIST_MAGIC:#x}")
        arrays = [_read_array(cursor) for _ in range(count)]
        (names_count,) = cursor.numbers("Q")
        if names_count != count:
            raise ValueError(f"it has {count} arrays and {names_count} names")
        names = [cursor.take(cursor.numbers("Q")[0]).decode() for _ in range(count)]
    except ValueError as error:  # a name that is not UTF-8 is one, too
        raise ValueError(
            f"Expected {path} to be MXNet's parameters (.params, a list of named dense arrays), but {error}; "
            "copy or download it again."
        ) from error
    return dict(zip(names, arrays, strict=True))


def _read_array(cursor: _Cursor) -> np.ndarray:
    (magic,) = cursor.numbers("I")
    if magic not in (V1, V2, V3):
        raise ValueError(f"an array begins with {magic:#x}, which is none of the versions 1, 2 and 3")
    if magic != V1:
        (storage,) = cursor.numbers("i")
        if storage != DENSE:
            raise ValueError(f"an array is sparse (storage type {storage})")
    (ndim,) = cursor.numbers("i")
    if ndim < 0 or (ndim == 0 and magic != V3):
        raise ValueError("an array has no shape")
    if ndim > MAX_DIMS:
        raise ValueError(f"an array claims {ndim} dimensions")
    shape = cursor.numbers(f"{ndim}q")
    if min(shape, default=0) < 0:
        raise ValueError(f"an array has the shape {shape}")
    _, _, flag = cursor.numbers("iii")  # the device, and its number, do not matter
    if flag not in range(len(NUMBER_TYPES)):
        raise ValueError(f"an array has numbers of the unknown type {flag}")
    dtype = np.dtype(NUMBER_TYPES[flag])
    content = cursor.take(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(content, dtype).reshape(shape).copy()  # a copy, because frombuffer's result is read-only
