"""Files that want to run code, or take all memory or time: each is refused by name, at once and with little memory."""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import pickle
import random
import resource
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia_files import Network, fake_modules, network, write

from models.checkpoints import load_generator, read_checkpoint
from models.checkpoints.generators import infer_config
from models.generator import Generator

MEMORY = 300 * 2**20
SECONDS = 5  # of this process, whatever else runs


def make() -> Generator:
    torch.manual_seed(0)
    return Generator(32, [4, 4, 4, 4], 4, 4, 2).eval().requires_grad_(False)


@contextlib.contextmanager
def little_memory():
    """Lets the process take no more than `MEMORY` of new address space, where the system can tell."""
    status = Path("/proc/self/statm")
    if not status.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(status.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refused(path: Path, reason: str = "") -> None:
    start = time.process_time()
    with little_memory(), pytest.raises(ValueError, match=rf"(?s){path.name}.*{reason}.*Supported are") as caught:
        load_generator(path)
    assert len(str(caught.value)) < 2000
    assert time.process_time() - start < SECONDS


def read_or_refused(path: Path) -> None:
    """Looks at a file that may hold a generator beside what it must not do."""
    with contextlib.suppress(ValueError):
        load_generator(path)


# --- files that would run code ---


class Call:
    """Is pickled as a call."""

    def __init__(self, function, *args, state=None) -> None:
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.parts


def shell(marker: Path) -> Call:
    return Call(os.system, f"touch '{marker}'")


def touch(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


def in_state(marker: Path) -> Network:
    net = network(make())
    net.at("synthesis.b8").state["extra"] = shell(marker)
    return net


def in_source(marker: Path) -> Network:
    net = network(make())
    net.at("synthesis.b8").source = net.source = touch(marker)
    return net


def in_state_of_torch(marker: Path) -> torch.nn.Module:
    module = torch.nn.Linear(2, 2)
    module.extra = shell(marker)
    return module


def nested(marker: Path) -> list:
    return [{"a": (shell(marker),)}]


CODE = {
    "os.system": shell,
    "nested": nested,
    "in a network": in_state,
    "in a layer of torch": in_state_of_torch,
    "eval": lambda marker: Call(eval, touch(marker)),
    "exec": lambda marker: Call(exec, touch(marker)),
    "numpy objects": lambda marker: np.array([shell(marker)], dtype=object),
    "hooks of a tensor": lambda marker: Call(torch._utils._rebuild_parameter, torch.zeros(2), False, shell(marker)),
    "state of an object": lambda marker: Call(argparse.Namespace, state={"x": shell(marker)}),
    "source code of a network": in_source,
}


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("kind", CODE)
def test_code_in_a_pickle_does_not_run(tmp_path, kind, protocol) -> None:
    marker = tmp_path / "executed"
    path = write({"G_ema": network(make()), "D": CODE[kind](marker)}, tmp_path / "network.pkl", protocol)
    loaded = load_generator(path)  # what stands beside the generator is not even looked at
    assert torch.equal(loaded.synthesis.b4.const, make().synthesis.b4.const)
    read_or_refused(write({"G_ema": CODE[kind](marker)}, path, protocol))
    assert not marker.exists()
    with fake_modules():
        pickle.loads(path.read_bytes())
    assert marker.exists()  # the file would have done it


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", CODE)
def test_code_in_a_torch_file_does_not_run(tmp_path, kind, legacy) -> None:
    path, marker = tmp_path / "network.pt", tmp_path / "executed"
    with fake_modules():
        for content in ({"G_ema": make().state_dict(), "D": CODE[kind](marker)}, {"G_ema": CODE[kind](marker)}):
            torch.save(content, path, _use_new_zipfile_serialization=not legacy)
            read_or_refused(path)
            assert not marker.exists()
        torch.load(path, weights_only=False)
    assert marker.exists()


# --- pickles by hand ---


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


SYSTEM = b"cposix\nsystem\n"
LINEAR = b"ctorch.nn.modules.linear\nLinear\n"
HASH = b"K\x01" + b"q\x00h\x00\x86" * 60  # a pair of pairs of pairs …: 2^60 numbers to hash
COLLIDING = (
    b"}(" + b"".join(b"\x8a\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") + b"N" for i in range(1, 2000)) + b"u"
)

NOTHING = "no tensors with the names|no named tensors"  # it is read, and nothing comes of it
HAND = {
    "STACK_GLOBAL": (text("posix") + text("system") + b"\x93" + text("true") + b"\x85R", NOTHING),
    "GLOBAL": (SYSTEM + text("true") + b"\x85R", NOTHING),
    "uncalled name": (SYSTEM, NOTHING),
    "torch.load": (b"ctorch\nload\n" + text("/etc/passwd") + b"\x85R", NOTHING),
    "getattr": (b"cbuiltins\ngetattr\n" + SYSTEM + text("__call__") + b"\x86R", NOTHING),
    "name of another type": (b"K\x01K\x02\x93", "requires str"),
    "long name": (b"c" + b"a" * 10_000 + b"\n\n", "longer than 256"),
    "long name on the stack": (text("a" * 10_000) + text("b") + b"\x93", "longer than 256"),
    "INST": (b"(" + text("true") + b"iposix\nsystem\n", "INST is not allowed"),
    "OBJ": (b"(" + LINEAR + b"o", "OBJ is not allowed"),
    "EXT1": (b"\x82\x01", "EXT1 is not allowed"),
    "EXT2": (b"\x83\x01\x00", "EXT2 is not allowed"),
    "EXT4": (b"\x84\x01\x00\x00\x00", "EXT4 is not allowed"),
    "PERSID": (b"Pos\n", "PERSID is not allowed"),
    "BINPERSID": (text("os") + b"Q", "not that of a storage"),
    "BUILD on a class": (LINEAR + b"}" + text("__code__") + b"Nsb", NOTHING),
    "BUILD on our function": (b"c_codecs\nencode\n}" + text("__code__") + b"Nsb", NOTHING),
    "call of a text": (text("os.system") + b")R", "not callable"),
    "call of an object": (LINEAR + b")\x81)R", "not callable"),
    "call of itself": (b"]" + b"q\x00(ctorch._tensor\n_rebuild_from_type_v2\nNh\x00e" + b"h\x00" + b"R", ""),
    "unknown instruction": (b"\xfe", "0xfe is not allowed"),
    "protocol 9": (b"\x80\x09", "protocol"),
    "no stack": (b"", ""),
    "no mark": (b"t", ""),
    "missing value": (b"h\x07", "index 7"),
    "rest": (b"N." + b"x" * 10, "11 bytes follow"),
    "LONG4": (b"\x8b" + struct.pack("<i", 2**31 - 1), "LONG4 is not allowed"),
    "text LONG": (b"L" + b"9" * 100_000 + b"L\n", "LONG is not allowed"),
    "BYTEARRAY8": (b"\x96" + struct.pack("<Q", 2**40), "BYTEARRAY8 is not allowed"),
    "BINBYTES8": (b"\x8e" + struct.pack("<Q", 2**62), "too early"),
    "BINUNICODE8": (b"\x8d" + struct.pack("<Q", 2**62), "too early"),
    "FRAME": (b"\x95" + struct.pack("<Q", 2**62) + b"N", "too early"),
    "memo": (b"Nr\xff\xff\xff\xff", NOTHING),
    "deep lists": (b"]" * 100_000 + b"a" * 99_999, NOTHING),
    "deep tuples": (b"N" + b"\x85" * 200_000, NOTHING),
    "deep keys": (b"}N" + b"\x85" * 100_000 + b"Ns", NOTHING),
    "hash": (b"}" + HASH + b"Ns", NOTHING),
    "colliding keys": (COLLIDING, NOTHING),
    "set of hashes": (b"\x8f(" + HASH + b"\x90", NOTHING),
    "frozen set": (b"(" + HASH + b"\x91", NOTHING),
    "set by call": (b"cbuiltins\nset\n](" + HASH + b"e\x85R", NOTHING),
    "instructions": (b"N" * 1_000_000, "more than 500,000 instructions"),
    "sets": (b"\x8f" * 1_000_000, "more than 500,000 instructions"),
    "encode": (text("a" * 10**6) + b"q\x000" + b"c_codecs\nencode\nh\x00" + text("latin1") + b"\x86R" * 1, NOTHING),
    "bytes of a number": (b"ctorch.storage\n_load_from_bytes\nJ\xff\xff\xff\x7f\x85R", "not where it should be"),
    "no storage": (b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNtR", ""),
    "arguments": (b"ctorch._utils\n_rebuild_tensor_v2\n)R", ""),
}


@pytest.mark.parametrize("kind", HAND)
def test_pickle_by_hand_is_refused(tmp_path, kind) -> None:
    body, reason = HAND[kind]
    path = tmp_path / "network.pkl"
    path.write_bytes(b"\x80\x04" + body + b".")
    refused(path, reason)


@pytest.mark.parametrize("kind", ["hash", "GLOBAL", "EXT1", "LONG4", "instructions", "deep lists", "colliding keys"])
@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_by_hand_in_a_torch_file_is_refused(tmp_path, kind, legacy) -> None:
    body, reason = HAND[kind]
    body, path = b"\x80\x02" + body + b".", tmp_path / "network.pt"
    if legacy:
        path.write_bytes(legacy_start() + body + b"\x80\x02].")
    else:
        write_zip(path, {"a/data.pkl": body})
    refused(path, reason)


def test_storages_in_storages_are_refused(tmp_path) -> None:
    """Each would be read twice, and so take exponential time."""
    inner = b"\x80\x02ctorch.storage\n_load_from_bytes\n" + b"B" + struct.pack("<I", 3) + b"abc" + b"\x85R."
    data = legacy_start() + inner + b"\x80\x02]."
    outer = b"\x80\x04ctorch.storage\n_load_from_bytes\n" + b"B" + struct.pack("<I", len(data)) + data + b"\x85R."
    (tmp_path / "network.pkl").write_bytes(outer)
    refused(tmp_path / "network.pkl", "not where it should be")


def write_zip(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def legacy_start() -> bytes:
    """The three pickles before the content, as torch writes them."""
    buffer = io.BytesIO()
    torch.save(None, buffer, _use_new_zipfile_serialization=False)
    content = buffer.getvalue()
    return content[: content.index(b"little_endian")].rpartition(b"\x80\x02}")[0] + pickle.dumps(
        {"little_endian": True}, 2
    )


# --- networks that grow ---


def test_modules_in_modules_without_end_are_refused(tmp_path) -> None:
    net = network(make())
    net.at("synthesis").state["_modules"]["self"] = deep = Network("Deep")
    for _ in range(20):
        deeper = Network("Deep")
        deep.state["_modules"]["more"] = deeper
        deep = deeper
    refused(write({"G_ema": net}, tmp_path / "network.pkl"), "nested more than 10 deep")


def test_long_names_that_multiply_are_refused(tmp_path) -> None:
    net, name = network(make()), "n" * 2**22
    many = Network("Many", {name: torch.zeros(1)}, modules={str(i): Network("Many", {name: None}) for i in range(500)})
    net.state["_modules"][name] = many
    refused(write({"G_ema": net}, tmp_path / "network.pkl"), "texts of up to 100 characters")


def test_modules_that_multiply_are_refused(tmp_path) -> None:
    net = network(make())
    many = Network("Many")
    for _ in range(8):
        many = Network("Many", modules={str(i): many for i in range(100)})  # 100^8 paths, 8 modules in the file
    net.state["_modules"]["many"] = many
    refused(write({"G_ema": net}, tmp_path / "network.pkl"), "more than 1000 modules")


def test_lists_that_multiply_take_no_time(tmp_path) -> None:
    content = [0]
    for _ in range(40):
        content = [content, content]
    torch.save({"G_ema": content}, tmp_path / "network.pt")
    start = time.process_time()
    with pytest.raises(ValueError, match="network.pt"):
        load_generator(tmp_path / "network.pt")
    assert time.process_time() - start < SECONDS


def test_list_that_holds_itself_takes_no_time(tmp_path) -> None:
    content: list = []
    content.append(content)
    torch.save({"G_ema": content}, tmp_path / "network.pt")
    with pytest.raises(ValueError, match="network.pt"):
        load_generator(tmp_path / "network.pt")


# --- tensors that grow ---


def view(storage, offset: int, shape: tuple, stride: tuple) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, shape, stride, False, collections.OrderedDict())


def floats(count: int):
    numbers = torch.zeros(count).untyped_storage()
    return torch.storage.TypedStorage(wrap_storage=numbers, dtype=torch.float32, _internal=True)


VIEWS = {
    "no stride": (0, (2**20, 2**20), (0, 0), "explain"),
    "more rows than there are": (0, (11,), (1,), "out of bounds"),
    "offset": (8, (3,), (1,), "out of bounds"),
    "negative offset": (-1, (3,), (1,), "no list of sizes"),
    "negative stride": (5, (3,), (-1,), "no list of sizes"),
    "huge": (0, (2**62, 2**62), (1, 1), "no list of sizes"),
    "text": (0, ("3",), (1,), "no list of sizes"),
    "fewer strides": (0, (2, 2), (1,), "mismatch in length"),
    "many dimensions": (0, (1,) * 100, (1,) * 100, "no list of sizes"),
}


class Holder(Network):
    """A network that has calls in place of parameters."""

    def __init__(self, parameters: dict) -> None:
        super().__init__("Linear")
        self.state["_parameters"] = parameters


@pytest.mark.parametrize("kind", VIEWS)
def test_tensor_outside_its_storage_is_refused(tmp_path, kind) -> None:
    offset, shape, stride, reason = VIEWS[kind]
    net = network(make())
    net.state["_modules"]["extra"] = Holder({"a": view(floats(10), offset, shape, stride)})
    refused(write({"G_ema": net}, tmp_path / "network.pkl"), reason)
    torch.save({"G_ema": view(floats(10), offset, shape, stride)}, tmp_path / "network.pt")
    with little_memory(), pytest.raises(ValueError, match=r"network\.pt"):
        load_generator(tmp_path / "network.pt")


def test_many_views_of_one_storage_are_refused(tmp_path) -> None:
    storage = floats(100_000)
    views = {f"t{i}": view(storage, 0, (100_000,), (1,)) for i in range(900)}  # 360 MB in a file of 400 kB
    net = network(make())
    net.state["_modules"]["extra"] = Holder(views)
    refused(write({"G_ema": net}, tmp_path / "network.pkl"), "take more memory than its .* bytes explain")
    torch.save({"G_ema": views}, tmp_path / "network.pt")
    refused(tmp_path / "network.pt", "take more memory than its .* bytes explain")


def test_many_empty_tensors_are_refused(tmp_path) -> None:
    one = b"h\x00(h\x01K\x00K\x00\x85K\x01\x85\x89)tR"  # some 20 bytes each
    start = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00" + b"(" + text("storage") + b"ctorch\nFloatStorage\n"
    start += text("0") + text("cpu") + b"K\x00tQq\x01("
    write_zip(tmp_path / "network.pt", {"a/data.pkl": start + one * 50_000 + b"t.", "a/data/0": b""})
    refused(tmp_path / "network.pt", "take more memory than its .* bytes explain")


@pytest.mark.parametrize("change", [1, -1, 2**40])
def test_storage_of_another_size_is_refused(tmp_path, change) -> None:
    content = write({"G_ema": floats(1000)}, tmp_path / "network.pkl").read_bytes()
    at = content.rindex((1000).to_bytes(8, "little"))
    (tmp_path / "network.pkl").write_bytes(content[:at] + (1000 + change).to_bytes(8, "little") + content[at + 8 :])
    refused(tmp_path / "network.pkl", "which it has not")


@pytest.mark.parametrize("legacy", [False, True])
def test_huge_storage_of_a_torch_file_is_refused(tmp_path, legacy) -> None:
    path = tmp_path / "network.pt"
    torch.save({"G_ema": torch.zeros(1000)}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    few, many = b"M\xe8\x03", b"\x8a\x06" + (2**40).to_bytes(6, "little")  # the count in the persistent id
    if legacy:
        path.write_bytes(content.replace(few, many, 1))
        assert path.read_bytes() != content
    else:
        with zipfile.ZipFile(path) as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        entries = {n: e.replace(few, many, 1) if n.endswith("data.pkl") else e for n, e in entries.items()}
        write_zip(path, entries)
    refused(path, "announces 4,398,046,511,104 bytes|too early")


def test_zip_bomb_is_refused(tmp_path) -> None:
    entries = {"a/data.pkl": b"\x80\x02N.", "a/data/0": bytes(50_000_000)}
    path = write_zip(tmp_path / "network.pt", entries, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    refused(path, "compressed or encrypted")


def test_entries_that_overlap_are_refused(tmp_path) -> None:
    path = write_zip(tmp_path / "network.pt", {"a/data.pkl": b"\x80\x02N.", "a/data/0": bytes(5000)})
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    second = content[content.index(b"PK\x01\x02", directory + 4) : end]
    entries = content[directory:end] + second * 50
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 52, 52, len(entries), directory, 0)
    path.write_bytes(content[:directory] + entries + tail)
    refused(path, "take more memory than its size explains")


@pytest.mark.parametrize("entries", [{"a/x": b""}, {"a/data.pkl": b"N.", "b/data.pkl": b"N."}])
def test_zip_without_one_pickle_is_refused(tmp_path, entries) -> None:
    refused(write_zip(tmp_path / "network.pt", entries), "entries data.pkl instead of one")


# --- damage ---


def small_files(folder: Path) -> list[Path]:
    generator = make()
    tensors = {"G_ema": dict(generator.state_dict()), "args": argparse.Namespace(size=32)}
    files = [write({"G_ema": network(generator)}, folder / "a.pkl"), folder / "b.pt", folder / "c.pt"]
    torch.save(tensors, files[1])
    torch.save(tensors, files[2], _use_new_zipfile_serialization=False)
    return files


def damaged(path: Path, content: bytes) -> bool:
    """Tells whether a file is refused; any other error fails the test."""
    path.write_bytes(content)
    try:
        checkpoint = read_checkpoint(path)
    except ValueError as error:
        assert path.name in str(error)
        return True
    try:
        infer_config(checkpoint.tensors, path)
        assert sum(t.numel() for t in checkpoint.tensors.values()) < 10 * len(content)
        sum(float(t.sum()) for t in checkpoint.tensors.values())  # all numbers can be read
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("index", range(3))
def test_truncated_files_are_refused(tmp_path, index) -> None:
    path = small_files(tmp_path)[index]
    content = path.read_bytes()
    for length in [*range(0, 300, 7), *range(300, len(content), len(content) // 40), len(content) - 1]:
        assert damaged(path, content[:length]), length


@pytest.mark.parametrize("index", range(3))
def test_flipped_bytes_are_refused_or_harmless(tmp_path, index) -> None:
    path = small_files(tmp_path)[index]
    content = path.read_bytes()
    rng = random.Random(index)
    refusals = 0
    for _ in range(80):
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 3])):
            changed[rng.randrange(len(content))] = rng.randrange(256)
        refusals += damaged(path, bytes(changed))
    assert 0 < refusals < 80
