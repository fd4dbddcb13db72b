"""Reads other people's `.pkl`, `.pt` and `.pth` as data: no code that such a file holds or names is executed.

A pickle is a program. Here it runs on Python's own unpickler, in its plain Python form, with three restrictions: every
class or function is an `Opaque` stand-in but for a few that make tensors; only the instructions that files of weights
need are known; and only texts and small integers become keys, since some keys take exponential time to hash.
`torch.load` is no alternative: it trusts the sizes that a file claims, and with `weights_only=True` it refuses harmless
objects.
"""

from __future__ import annotations

import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.signatures import describe_file

MAX_INSTRUCTIONS = 500_000  # a network of NVIDIA's takes 40,000; each may cost some hundred bytes of memory
MAX_KEY = 2**31  # larger integers can be made to collide in a dictionary
MAX_NAME = 256  # characters of the name of a class
MIN_TENSOR = 128  # bytes that even an empty tensor takes
SMALL = 2**16  # bytes; larger pieces are not copied
LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before its zip files

_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_LIST EMPTY_DICT APPEND APPENDS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE "
    "BINPERSID"
).split()
_CODES = {operation.name: ord(operation.code) for operation in pickletools.opcodes}
_NAMES = {code: name for name, code in _CODES.items()}
_DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)}
_STORAGES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
        "Untyped": torch.uint8,
    }.items()
}
_NUMPY_SCALARS = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "b1": "<?"}


def safe_load(path: str | Path) -> Any:
    """Reads a pickle, or a file of `torch.save` in today's zip format or the one before.

    Returns:
        Its content: tensors on the CPU in plain containers; anything else as an `Opaque`, or in it. The tensors lie in
        the mapped file, which must not be overwritten in place while they are used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is another kind of file, is damaged, or would take more memory than its size explains.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file of weights at {path}, found no such file.")
    try:
        with open(path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))  # writable, as torch demands
        limits = _Limits(len(data))
        if data[:2] == b"PK":
            return _read_zip(path, data, limits)
        content, end = _read_legacy(data, limits) if _is_legacy(data) else _read_plain(data, limits)
        if end != len(data):
            raise ValueError(f"{len(data) - end:,} bytes follow its end")
        return content
    except Exception as error:  # what a hostile program can raise is open-ended
        what = describe_file(path) or f"not a safe and complete file of weights ({_reason(error)})"
        raise ValueError(f"{path}: {what}; nothing in it was executed.") from error


class Opaque(dict):
    """Stands for an object whose class is not known here; it does nothing."""

    __slots__ = ("args", "kind", "state")

    def __init__(self, kind: str, *args: Any, **options: Any) -> None:
        super().__init__()
        self.kind, self.args, self.state = kind, args, None

    def append(self, value: Any) -> None:
        """Drops an item of a class of lists, or several of them."""

    extend = append


class _Limits:
    """What reading may still cost; shared by all pickles of a file."""

    def __init__(self, size: int) -> None:
        self.size, self.instructions, self.tensors = size, MAX_INSTRUCTIONS, 2 * size + SMALL

    def take(self, size: int) -> None:
        """Pays for the bytes of a tensor."""
        self.tensors -= size
        if self.tensors < 0:
            raise ValueError(f"its tensors take more memory than its {self.size:,} bytes explain")


class _Storage(NamedTuple):
    memory: Tensor | None  # (bytes,) uint8; None while it is only announced
    dtype: torch.dtype


class _Memory:
    """A file in memory; large pieces of it are not copied."""

    def __init__(self, data: memoryview, position: int = 0) -> None:
        self.data, self.position = data, position

    def take(self, size: int) -> memoryview:
        """Gives the next bytes."""
        if not 0 <= size <= len(self.data) - self.position:
            raise ValueError(f"it ends at byte {len(self.data):,}, too early")
        self.position += size
        return self.data[self.position - size : self.position]

    def read(self, size: int) -> bytes | memoryview:
        """Gives the next bytes; the unpickler asks for plain ones where it looks at them."""
        return self.take(size) if size > SMALL else bytes(self.take(size))

    def readline(self) -> bytes:
        """Gives a line, which can only be part of a name."""
        end = bytes(self.data[self.position : self.position + MAX_NAME]).find(b"\n")
        if end < 0:
            raise ValueError(f"a name is longer than {MAX_NAME} characters")
        return bytes(self.take(end + 1))


class _Dispatch(dict[int, Callable[[Any], None]]):
    """The instructions that are allowed, and how many of them."""

    def __init__(self, limits: _Limits) -> None:
        known = pickle._Unpickler.dispatch  # type: ignore[attr-defined]
        super().__init__({_CODES[name]: known[_CODES[name]] for name in _INSTRUCTIONS} | _REPLACED)
        self.limits = limits

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.limits.instructions -= 1
        if self.limits.instructions < 0:
            raise ValueError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise ValueError(f"the instruction {_NAMES.get(code, hex(code))} is not allowed")


class _Unpickler(pickle._Unpickler):  # type: ignore[misc, name-defined]
    """Python's unpickler, restricted.

    Args:
        file: The pickle.
        limits: What it may cost.
        storage: Gives a storage by key, number type and count; None if the pickle must not have any.
        nested: Whether this is a storage that a pickle holds as bytes, which must not hold further ones.
    """

    def __init__(
        self,
        file: _Memory,
        limits: _Limits,
        storage: Callable[[str, torch.dtype, int], _Storage] | None = None,
        nested: bool = False,
    ) -> None:
        super().__init__(file)  # type: ignore[arg-type]  # large pieces come as memoryview, which serves as well
        self.limits, self.storage, self.nested = limits, storage, nested
        self.dispatch = _Dispatch(limits)  # type: ignore[misc]

    def find_class(self, module: str, name: str) -> Any:
        """Gives what stands for a class or function; nothing is imported."""
        if len(module) + len(name) > MAX_NAME:
            raise ValueError(f"a name is longer than {MAX_NAME} characters")
        full = f"{module}.{name}"
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        method = {
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_tensor_v3": self._typed_tensor,
            "torch._utils._rebuild_parameter": _first,
            "torch._utils._rebuild_parameter_with_state": _first,
            "torch._tensor._rebuild_from_type_v2": _call_inner,
            "torch.storage._load_from_bytes": self._load_storage,
            "numpy.core.multiarray.scalar": _numpy_scalar,
            "numpy._core.multiarray.scalar": _numpy_scalar,
            "_codecs.encode": _encode,
            "torch.Size": _first,
            "builtins.set": _items,
            "__builtin__.set": _items,
        }.get(full)
        return method or partial(Opaque, full)

    def persistent_load(self, ident: Any) -> Any:
        """Gives what a persistent id stands for: a storage, or the class of a module that comes with its source."""
        match ident:
            case ("storage", torch.dtype() as dtype, str(key), _, int(count), *rest) if not any(rest) and self.storage:
                return self.storage(key, dtype, count)
            case ("module", container, *_):
                return container
        raise ValueError("a persistent id is not that of a storage")

    def _load_storage(self, data: Any) -> _Storage:
        if self.nested or not isinstance(data, bytes | memoryview):
            raise ValueError("a storage is not where it should be")
        data = data if isinstance(data, memoryview) else memoryview(bytearray(data))
        content, _ = _read_legacy(data, self.limits, nested=True)
        if type(content) is not _Storage:
            raise ValueError("the bytes of a storage hold something else")
        return content

    def _tensor(self, storage: Any, offset: int, shape: tuple, stride: tuple, *_: Any) -> Tensor | None:
        return self._view(storage, storage.dtype, offset, shape, stride)

    def _typed_tensor(self, storage: Any, offset: int, shape: tuple, stride: tuple, *rest: Any) -> Tensor | None:
        return self._view(storage, rest[2], offset, shape, stride)

    def _view(self, storage: _Storage, dtype: torch.dtype, offset: int, shape: Any, stride: Any) -> Tensor | None:
        if not all(type(n) is int and 0 <= n < 2**40 for n in (offset, *shape, *stride)) or len(shape) > 8:
            raise ValueError("a tensor's shape, stride or offset is no list of sizes")
        if storage.memory is None:
            return None
        self.limits.take(max(math.prod(shape) * dtype.itemsize, MIN_TENSOR))
        memory = storage.memory.clone() if storage.memory.data_ptr() % dtype.itemsize else storage.memory
        numbers = memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype)
        return numbers.as_strided(shape, stride, offset)  # torch refuses what leaves the storage


def _set_items(unpickler: Any, items: list[Any]) -> None:
    target = unpickler.stack[-1]
    if not isinstance(target, dict):
        raise ValueError(f"items are set on {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is str or (type(key) is int and abs(key) < MAX_KEY):
            target[key] = value


def _set_item(unpickler: Any) -> None:
    value, key = unpickler.stack.pop(), unpickler.stack.pop()
    _set_items(unpickler, [key, value])


def _set_state(unpickler: Any) -> None:
    state = unpickler.stack.pop()
    if type(unpickler.stack[-1]) is Opaque:
        unpickler.stack[-1].state = state


def _make_object(unpickler: Any) -> None:
    args, kind = unpickler.stack.pop(), unpickler.stack.pop()
    unpickler.stack.append(kind(*args))


def _make_object_with_options(unpickler: Any) -> None:
    del unpickler.stack[-1]
    _make_object(unpickler)


_REPLACED: dict[int, Callable[[Any], None]] = {
    _CODES["SETITEM"]: _set_item,
    _CODES["SETITEMS"]: lambda unpickler: _set_items(unpickler, unpickler.pop_mark()),
    _CODES["BUILD"]: _set_state,
    _CODES["NEWOBJ"]: _make_object,
    _CODES["NEWOBJ_EX"]: _make_object_with_options,
    _CODES["EMPTY_SET"]: lambda unpickler: unpickler.append([]),
    _CODES["ADDITEMS"]: lambda unpickler: unpickler.load_appends(),
    _CODES["FROZENSET"]: lambda unpickler: unpickler.load_list(),
}


def _first(value: Any, *_: Any) -> Any:
    return value


def _items(items: Any = ()) -> list[Any]:
    """Gives a set's items, so that nothing is hashed."""
    return list(items) if isinstance(items, list | tuple) else []


def _call_inner(function: Callable[..., Any], _: Any, args: tuple, *__: Any) -> Any:
    """Makes a tensor of a subclass, or one with attributes of its own, as a plain one."""
    return function(*args)


def _encode(text: str, encoding: str) -> Any:
    """Gives bytes as protocol 2 writes them; only short ones, as each call makes a copy."""
    return text.encode("latin1") if encoding == "latin1" and len(text) <= 16 else Opaque("_codecs.encode")


def _numpy_scalar(dtype: Any, data: Any = None) -> Any:
    """Gives a number of numpy, if it is of a usual type."""
    kind = dtype.args[0] if isinstance(dtype, Opaque) and dtype.args else None
    order = dtype.state[1] if kind and isinstance(dtype.state, tuple) else None
    if kind not in _NUMPY_SCALARS or order not in ("<", "|") or not isinstance(data, bytes):
        return Opaque("numpy.scalar")
    return struct.unpack(_NUMPY_SCALARS[kind], data)[0]


def _read_plain(data: memoryview, limits: _Limits) -> tuple[Any, int]:
    file = _Memory(data)
    return _Unpickler(file, limits).load(), file.position


def _read_zip(path: Path, data: memoryview, limits: _Limits) -> Any:
    """Reads the pickle in a zip file; its storages are other entries."""
    with zipfile.ZipFile(path) as archive:
        entries = _stored_entries(archive.infolist(), data)
    if any(name.endswith("constants.pkl") for name in entries):
        raise ValueError("a program of torch.jit; save the network's state_dict() instead")
    pickles = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError(f"it has {len(pickles)} entries data.pkl instead of one")
    folder = pickles[0].removesuffix("data.pkl")
    if bytes(entries.get(f"{folder}byteorder", memoryview(b"little"))[:6]) != b"little":
        raise ValueError("it was written by a big-endian machine")

    def storage(key: str, dtype: torch.dtype, count: int) -> _Storage:
        entry = entries.get(f"{folder}data/{key}")
        if entry is None or len(entry) != count * dtype.itemsize:
            raise ValueError(f"storage {key[:40]!r} announces {count * dtype.itemsize:,} bytes, which it has not")
        return _Storage(_as_tensor(entry), dtype)

    return _Unpickler(_Memory(entries[pickles[0]]), limits, storage).load()


def _stored_entries(infos: list[zipfile.ZipInfo], data: memoryview) -> dict[str, memoryview]:
    """Finds the entries' bytes in the file. torch compresses none, so a compressed one is a bomb or no weights."""
    packed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1]
    if packed:
        raise ValueError(f"entries of the zip file are compressed or encrypted, {packed[:1]}; torch.save stores them")
    if sum(info.file_size for info in infos) > len(data):
        raise ValueError("entries of the zip file take more memory than its size explains")
    entries = {}
    for info in infos:
        file = _Memory(data, info.header_offset)
        signature, name, extra = struct.unpack("<4s22xHH", file.take(30))
        file.take(name + extra)
        if signature != b"PK\x03\x04":
            raise ValueError(f"entry {info.filename!r} of the zip file is not where it should be")
        entries[info.filename] = file.take(info.file_size)
    return entries


def _is_legacy(data: memoryview) -> bool:
    return bytes(data[2:14]) == b"\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little")


def _read_legacy(data: memoryview, limits: _Limits, nested: bool = False) -> tuple[Any, int]:
    """Reads what `torch.save` wrote before its zip files: five pickles, then the numbers of every storage."""
    file = _Memory(data)
    magic, protocol, system = (_Unpickler(file, limits).load() for _ in range(3))
    if (magic, protocol) != (LEGACY_MAGIC, LEGACY_PROTOCOL) or system.get("little_endian") is not True:
        raise ValueError("it does not start as a little-endian file of torch.save does")
    start = file.position
    found: dict[str, tuple[torch.dtype, int]] = {}

    def announce(key: str, dtype: torch.dtype, count: int) -> _Storage:
        if found.setdefault(key, (dtype, count)) != (dtype, count):
            raise ValueError(f"storage {key[:40]!r} is described in two ways")
        return _Storage(None, dtype)

    # The numbers come after the content, so that it is read twice: first for what it announces.
    _Unpickler(file, limits, announce, nested).load()
    memory = {}
    for key in _Unpickler(file, limits).load():
        dtype, count = found[key]
        if int.from_bytes(file.take(8), "little") != count:
            raise ValueError(f"storage {key[:40]!r} announces {count * dtype.itemsize:,} bytes, which it has not")
        memory[key] = _Storage(_as_tensor(file.take(count * dtype.itemsize)), dtype)
    content = _Unpickler(_Memory(data, start), limits, lambda key, dtype, count: memory[key], nested).load()
    return content, file.position


def _as_tensor(data: memoryview) -> Tensor:
    return torch.frombuffer(data, dtype=torch.uint8) if len(data) else torch.empty(0, dtype=torch.uint8)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
