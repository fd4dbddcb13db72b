"""What stands for the content of a foreign file: inert values that run nothing and take no memory of their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_STEPS = 300_000  # some hundred bytes of memory each at most; official networks take about 40,000
MAX_DIMENSIONS = 8
MIN_TENSOR = 128  # bytes that even an empty tensor is counted with, as it takes memory too


class Global(NamedTuple):
    """The name of a class or function; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        """Gives the name as Python writes it."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Record:
    """What a file would have a class or function make.

    Attributes:
        kind: Full name of the class or function.
        args: What it would be called with.
        state: What the object's attributes would be set to.
    """

    kind: str
    args: tuple[Any, ...]
    state: Any = None


@dataclass(eq=False, slots=True)
class Allowance:
    """What reading a file may still cost.

    Attributes:
        size: Bytes of the file.
        tensors: Bytes that its tensors may still take.
        steps: Instructions that may still be carried out.
    """

    size: int
    tensors: int
    steps: int = MAX_STEPS

    def step(self) -> None:
        """Pays for an instruction.

        Raises:
            ValueError: If that was one too many.
        """
        self.steps -= 1
        if self.steps < 0:
            raise ValueError(f"it has more than {MAX_STEPS:,} instructions, which no network needs")

    def take(self, size: int) -> None:
        """Pays for the bytes of a tensor.

        Raises:
            ValueError: If the file's tensors take more than its size explains.
        """
        self.tensors -= size
        if self.tensors < 0:
            raise ValueError(f"its tensors take more memory than its {self.size:,} bytes explain")


@dataclass(eq=False, slots=True)
class Storage:
    """The numbers that tensors look at.

    Attributes:
        dtype: Type of the numbers, None if only the tensors know it.
        size: Bytes.
        allowance: That of the file.
        data: The bytes where they lie in the file; set later where the file has them later.
    """

    dtype: torch.dtype | None
    size: int
    allowance: Allowance
    data: memoryview | None = None


@dataclass(eq=False, slots=True)
class TensorRecord:
    """A tensor that has been checked but not yet made.

    Attributes:
        storage: Its numbers.
        dtype: Their type.
        offset: Index of the first one.
        shape: Shape.
        stride: Distance of neighbours along each axis, in numbers.
    """

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        """Checks that the tensor lies in its storage.

        Raises:
            ValueError: If it does not, or repeats numbers.
        """
        sizes = (*self.shape, *self.stride, self.offset)
        if not all(type(n) is int and 0 <= n < 2**40 for n in sizes) or len(self.shape) != len(self.stride):
            raise ValueError("a tensor's shape, stride or offset is no list of sizes")
        if len(self.shape) > MAX_DIMENSIONS or math.prod(max(n, 1) for n in self.shape) >= 2**48:
            raise ValueError(f"a tensor has {len(self.shape)} dimensions, or more numbers than any memory")
        if max(math.prod(self.shape), self.end) * self.dtype.itemsize > self.storage.size:
            raise ValueError(f"a tensor {self.shape} does not lie in its storage of {self.storage.size:,} bytes")

    @property
    def end(self) -> int:
        """Index after the last number."""
        if 0 in self.shape:
            return self.offset
        return self.offset + 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def tensor(self) -> Tensor:
        """Makes the tensor, without copying the numbers where they lie aligned in memory.

        Returns:
            The tensor, of the file's shape and number type.

        Raises:
            ValueError: If the file's tensors take more than its size explains.
        """
        start, end = self.offset * self.dtype.itemsize, self.end * self.dtype.itemsize
        self.storage.allowance.take(max(math.prod(self.shape) * self.dtype.itemsize, end - start, MIN_TENSOR))
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        if self.storage.data is None:
            raise ValueError("a tensor's numbers are missing")
        window = torch.frombuffer(self.storage.data[start:end], dtype=torch.uint8)
        if window.data_ptr() % self.dtype.itemsize:
            window = window.clone()
        return window.view(self.dtype).as_strided(self.shape, self.stride)


Persistent = Callable[[Any], Any]
