"""The classes and functions that a file of weights may name, and what stands for their results.

Nothing that is named is imported or called. Every function here is ours, and gives an inert value.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

import torch

from models.weights.records import MAX_DIMENSIONS, Allowance, Global, Record, Storage, TensorRecord

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": None,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGES.values() if dtype is not None}
_NUMBERS = {"f8": "<d", "f4": "<f", "f2": "<e", "i8": "<q", "i4": "<i", "b1": "<?"}
PERSISTENT_OBJECT = "torch_utils.persistence._reconstruct_persistent_obj"
TENSORFLOW_NETWORKS = ("dnnlib.tflib.network.Network", "tfutil.Network")


def storage_type(what: Any) -> torch.dtype | None:
    """Gives the number type of a class of storages.

    Args:
        what: The class, a `Global`.

    Returns:
        The type, None for a storage without one.

    Raises:
        ValueError: If it is no such class.
    """
    if type(what) is not Global or not _is_storage(what):
        raise ValueError("a storage has no known number type")
    return _STORAGES[what.name]


def _is_storage(what: Global) -> bool:
    return what.module in ("torch", "torch.cuda", "torch.storage") and what.name in _STORAGES


class Calls:
    """Tells allowed names from others, and gives what stands for a call's result.

    Args:
        allowance: What reading the file may still cost.
        load_storage: Reads the bytes of a storage that was saved on its own, None if there must not be any.
    """

    def __init__(self, allowance: Allowance, load_storage: Callable[[memoryview], Storage] | None = None) -> None:
        self.allowance = allowance
        self.load_storage = load_storage

    def check(self, what: Global) -> None:
        """Checks that a file of weights may name a class or function.

        Raises:
            ValueError: If it may not.
        """
        allowed = (
            str(what) in _RESULTS
            or str(what) in _RECORDS
            or _is_storage(what)
            or (what.module == "torch" and what.name in _DTYPES)
            # Layers in discriminators of others; a state of attributes, as inert as any record.
            or (re.fullmatch(r"torch\.nn\.modules\.[a-z_0-9]+", what.module) and what.name.isidentifier())
        )
        if not allowed:
            raise ValueError(f"it names {str(what)!r}, which weights do not need")

    def call(self, what: Global, args: tuple[Any, ...]) -> Any:
        """Gives what stands for the result of a call.

        Args:
            what: The class or function, already checked.
            args: Its arguments.

        Returns:
            An inert value.

        Raises:
            ValueError: If the arguments are not those of the function.
        """
        result = _RESULTS.get(str(what))
        if result is None:
            return Record(str(what), args)
        try:
            return result(self, *args)
        except TypeError as error:  # the number of arguments
            raise ValueError(f"{what} has other arguments than expected") from error


def _dictionary(calls: Calls, pairs: Any = ()) -> dict:
    if pairs:  # Python writes the items by instructions of their own
        raise ValueError("a dictionary is called with items")
    return {}


def _load_storage(calls: Calls, data: Any) -> Storage:
    if calls.load_storage is None or type(data) is not memoryview:
        raise ValueError("a storage is not where it should be")
    return calls.load_storage(data)


def _tensor(calls: Calls, storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> TensorRecord:
    if type(storage) is not Storage or storage.dtype is None:
        raise ValueError("a tensor has no storage of a known number type")
    return _view(storage, storage.dtype, offset, shape, stride)


def _typed_tensor(
    calls: Calls, storage: Any, offset: Any, shape: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> TensorRecord:
    if type(storage) is not Storage or type(dtype) is not Global or dtype.name not in _DTYPES:
        raise ValueError("a tensor has no storage, or no known number type")
    return _view(storage, _DTYPES[dtype.name], offset, shape, stride)


def _view(storage: Storage, dtype: torch.dtype, offset: Any, shape: Any, stride: Any) -> TensorRecord:
    if type(shape) is not tuple or type(stride) is not tuple:
        raise ValueError("a tensor's shape or stride is no tuple")
    return TensorRecord(storage, dtype, offset, shape, stride)


def _parameter(calls: Calls, data: Any, *rest: Any) -> TensorRecord:
    if type(data) is not TensorRecord:
        raise ValueError("a parameter is no tensor")
    return data


def _size(calls: Calls, sizes: Any) -> tuple:
    if type(sizes) not in (tuple, list) or len(sizes) > MAX_DIMENSIONS:
        raise ValueError("a size is no short list")
    return tuple(sizes)


def _encoded(calls: Calls, text: Any, encoding: Any = None) -> memoryview:
    # How protocol 2 writes bytes. Every call makes a copy, so that they must be few, as those of a number are.
    if type(text) is not str or encoding != "latin1" or len(text) > 16:
        raise ValueError("bytes are written as a long text, or encoded in an unknown way")
    return memoryview(text.encode("latin1"))


def _numpy_number(calls: Calls, dtype: Any, data: Any) -> Any:
    known = type(dtype) is Record and dtype.kind == "numpy.dtype" and dtype.args and type(dtype.args[0]) is str
    kind = _NUMBERS.get(dtype.args[0]) if known else None
    state = dtype.state if known else None  # (version, byte order, …)
    little = type(state) is tuple and len(state) > 1 and state[1] in ("<", "|")
    if kind is None or not little or type(data) is not memoryview or len(data) != struct.calcsize(kind):
        raise ValueError("a number of numpy is of an unknown kind")
    return struct.unpack(kind, data)[0]


_RESULTS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dictionary,
    "dnnlib.util.EasyDict": _dictionary,
    "dnnlib.EasyDict": _dictionary,
    "_codecs.encode": _encoded,
    "torch.Size": _size,
    "torch.storage._load_from_bytes": _load_storage,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "numpy.core.multiarray.scalar": _numpy_number,
    "numpy._core.multiarray.scalar": _numpy_number,
}
_RECORDS = {
    *TENSORFLOW_NETWORKS,
    PERSISTENT_OBJECT,
    "argparse.Namespace",
    "builtins.set",
    "__builtin__.set",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "torch.device",
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_qtensor",
    "torch.serialization._get_layout",
}
