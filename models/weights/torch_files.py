"""Reads `.pt` and `.pth` files: tensors and plain containers, and never code.

`torch.load(weights_only=True)` runs no code either, but a few bytes keep it busy for ever (keys of nested tuples) or
take all memory (sizes that a file only claims). So such files, too, are read by our own machine.
"""

from __future__ import annotations

import argparse
import struct
import zipfile
from pathlib import Path
from typing import Any

from models.weights.calls import Calls
from models.weights.machine import PickleMachine
from models.weights.pickles import Storages, map_file, read_legacy, refusal
from models.weights.records import Allowance, Global, Record, TensorRecord

MAX_DEPTH = 50  # of containers in containers
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, …, lengths of the name and of the extra field


def read_torch_file(path: Path) -> Any:
    """Reads a file of `torch.save`, of today's zip format or of the one before.

    Args:
        path: The file.

    Returns:
        Its content: tensors in plain containers and `argparse.Namespace`; of anything else that a file may hold, such
        as paths, a `Record`. The tensors lie in the file, which must not be overwritten in place while they are used.

    Raises:
        ValueError: If it holds anything else, is damaged, or would take more memory than its size explains.
    """
    try:
        data = map_file(path)
        allowance = Allowance(len(data), tensors=2 * len(data))  # tensors may share a storage
        content = _read_zip(path, data, allowance) if data[:2] == b"PK" else read_legacy(data, Calls(allowance))
        return _Unpacking(allowance).unpack(content, 0)
    except (
        ValueError,
        OSError,
        OverflowError,
        NotImplementedError,  # of zipfile, for unknown versions of its format
        RuntimeError,  # of zipfile, for encrypted files
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        raise refusal(path, "file of torch.save", error) from error


def _read_zip(path: Path, data: memoryview, allowance: Allowance) -> Any:
    """Reads the pickle in a zip file, its storages being entries beside it."""
    with zipfile.ZipFile(path) as archive:
        entries = _stored_entries(archive.infolist(), data)
    pickles = [name for name in entries if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError(f"it has {len(pickles)} entries data.pkl instead of one")
    folder = pickles[0].removesuffix("data.pkl")
    order = entries.get(f"{folder}byteorder")
    if order is not None and bytes(order[:6]) != b"little":
        raise ValueError("it was written by a big-endian machine")
    prefix = f"{folder}data/"
    storages = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
    machine = PickleMachine(entries[pickles[0]], Calls(allowance), persistent=Storages(allowance, storages).get)
    return machine.run()[0]


def _stored_entries(infos: list[zipfile.ZipInfo], data: memoryview) -> dict[str, memoryview]:
    """Finds the entries' bytes in the file. torch compresses none, so a compressed one is a bomb or no weights."""
    packed = [info.filename for info in infos if info.compress_type != zipfile.ZIP_STORED]
    if packed or any(info.flag_bits & 1 for info in infos):
        raise ValueError(f"entries of the zip file are compressed or encrypted, {packed[:1]}; torch.save stores them")
    if sum(info.file_size for info in infos) > len(data):
        raise ValueError("entries of the zip file take more memory than its size explains")
    entries = {}
    for info in infos:
        signature, name, extra = _LOCAL_HEADER.unpack_from(data, info.header_offset)
        start = info.header_offset + _LOCAL_HEADER.size + name + extra
        if signature != b"PK\x03\x04" or start + info.file_size > len(data):
            raise ValueError(f"entry {info.filename!r} of the zip file is not where it should be")
        entries[info.filename] = data[start : start + info.file_size]
    return entries


class _Unpacking:
    """Turns records into tensors and namespaces, all containers once, however often they are referred to."""

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance
        self.done: dict[int, Any] = {}

    def unpack(self, value: Any, depth: int) -> Any:
        """Gives what a value stands for."""
        if depth > MAX_DEPTH:
            raise ValueError(f"containers lie in containers more than {MAX_DEPTH} deep")
        if type(value) is TensorRecord:
            return value.tensor()
        if type(value) is Global:
            return str(value)
        if type(value) is Record and value.kind == "argparse.Namespace" and type(value.state) is dict:
            state = self.unpack(value.state, depth)
            return argparse.Namespace(**{str(name): v for name, v in (state or {}).items()})
        if type(value) not in (dict, list, tuple):
            return value
        if id(value) not in self.done:
            self.done[id(value)] = None  # for a container that holds itself
            if type(value) is dict:
                result: Any = {key: self.unpack(v, depth + 1) for key, v in value.items()}
            else:
                result = type(value)(self.unpack(v, depth + 1) for v in value)
            self.done[id(value)] = result
        return self.done[id(value)]
