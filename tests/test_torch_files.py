"""Files of `torch.save`: what torch reads, we read, without torch's unpickler."""

from __future__ import annotations

import argparse
import collections
from pathlib import Path

import pytest
import torch
from nvidia_files import write

from models.weights.pickles import read_pickle
from models.weights.torch_files import read_torch_file

WEIGHTS = torch.randn(4, 3, 3, 3)
TENSORS = {
    "float32": WEIGHTS,
    "float16": WEIGHTS.half(),
    "bfloat16": WEIGHTS.bfloat16(),
    "float64": WEIGHTS.double(),
    "int64": torch.arange(7),
    "uint8": torch.arange(7, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "complex64": torch.randn(3, dtype=torch.complex64),
    "number": torch.tensor(0.3),
    "empty": torch.zeros(3, 0),
    "channels last": WEIGHTS.to(memory_format=torch.channels_last),
    "transposed": WEIGHTS[0, 0].T,
    "part": torch.arange(100.0)[10:20:3],
    "parameter": torch.nn.Parameter(torch.randn(3)),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_are_those_that_torch_reads(tmp_path, legacy, protocol) -> None:
    path = tmp_path / "file.pt"
    shared = {"a": WEIGHTS, "b": WEIGHTS[1:]}
    content = {**TENSORS, "shared": shared, "list": [1, 2.5, None, True, "text", (3, -4, 2**40)], 7: {}}
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    found = read_torch_file(path)
    assert found.keys() == content.keys() and found["list"] == content["list"] and found[7] == {}
    for name, tensor in {**TENSORS, **shared}.items():
        own = found[name] if name in found else found["shared"][name]
        assert own.dtype == tensor.dtype and own.stride() == tensor.stride(), name
        assert torch.equal(own, tensor), name


@pytest.mark.parametrize("legacy", [False, True])
def test_state_dicts_and_options_are_plain_containers(tmp_path, legacy) -> None:
    path, layer = tmp_path / "file.pt", torch.nn.Linear(3, 2)
    state, options = layer.state_dict(), argparse.Namespace(size=256, path=Path("x"), device=torch.device("cpu"))
    momentum = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}
    adam = {"state": {0: momentum}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99), "params": [0]}]}
    content = {"g_ema": state, "args": options, "g_optim": adam}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    found = read_torch_file(path)
    assert type(found["g_ema"]) is dict and torch.equal(found["g_ema"]["weight"], layer.weight)
    assert type(found["args"]) is argparse.Namespace and found["args"].size == 256
    assert torch.equal(found["g_optim"]["state"][0]["exp_avg"], torch.ones(2, 3))
    assert found["g_optim"]["param_groups"] == adam["param_groups"]


def on_gpu(path: Path) -> None:
    """Says in the file that its tensors were on the GPU."""
    content = path.read_bytes()
    cpu, gpu = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    assert cpu in content
    path.write_bytes(content.replace(cpu, gpu).replace(b"ctorch\nFloatStorage", b"ctorch.cuda\nFloatStorage"))


def test_tensors_of_a_gpu_come_to_the_cpu(tmp_path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": WEIGHTS}, path, _use_new_zipfile_serialization=False)
    on_gpu(path)
    found = read_torch_file(path)["a"]
    assert found.device.type == "cpu" and torch.equal(found, WEIGHTS)


def test_writing_to_a_tensor_leaves_the_file(tmp_path) -> None:
    path = tmp_path / "file.pt"
    torch.save({"a": WEIGHTS}, path)
    before = path.read_bytes()
    read_torch_file(path)["a"].zero_()
    assert path.read_bytes() == before and torch.equal(read_torch_file(path)["a"], WEIGHTS)


class TypedTensor:
    """Is pickled with a storage that does not know its number type, as newer torch may write it."""

    def __init__(self, tensor) -> None:
        self.tensor = tensor

    def __reduce__(self):
        t, hooks = self.tensor, collections.OrderedDict()
        args = (t.untyped_storage(), t.storage_offset(), tuple(t.shape), t.stride(), False, hooks, t.dtype)
        return torch._utils._rebuild_tensor_v3, args


def test_tensors_in_pickles(tmp_path) -> None:
    content = {**TENSORS, "typed": TypedTensor(WEIGHTS)}
    found = read_pickle(write(content, tmp_path / "file.pkl"))
    for name, tensor in {**TENSORS, "typed": WEIGHTS}.items():
        own = found[name].tensor()
        assert own.dtype == tensor.dtype and torch.equal(own, tensor), name
