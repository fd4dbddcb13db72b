"""Writes network pickles as NVIDIA's repositories do, without their code: the same globals, attributes and storages."""

from __future__ import annotations

import collections
import contextlib
import math
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from models.generator import Generator
from models.layers import upsampling_filter


class EasyDict(dict):
    """Stands for `dnnlib.util.EasyDict` while a file is written."""


def _reconstruct_persistent_obj(meta):
    """Does the dangerous part of NVIDIA's function, so that tests can show that the file would have done it."""
    exec(meta["module_src"], {})
    return meta


EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


@contextlib.contextmanager
def fake_modules() -> Iterator[None]:
    """Makes NVIDIA's modules importable, as pickle demands of what it writes and loads."""
    names = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    fakes = {name: types.ModuleType(name) for name in names}
    fakes["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    fakes["dnnlib.util"].EasyDict = EasyDict
    with mock.patch.dict(sys.modules, fakes):
        yield


def write(content: object, path: Path, protocol: int = 4) -> Path:
    """Writes a pickle with NVIDIA's globals."""
    with fake_modules():
        path.write_bytes(pickle.dumps(content, protocol))
    return path


class Network:
    """A module of `torch_utils.persistence`: its class by name, its attributes, and its class's source code."""

    def __init__(self, kind, tensors=None, buffers=None, modules=None, source="import torch", **attributes) -> None:
        self.kind, self.source = kind, source
        self.state = {
            "training": False,
            "_parameters": {
                name: None if t is None else torch.nn.Parameter(t, requires_grad=False)
                for name, t in (tensors or {}).items()
            },
            "_buffers": buffers or {},
            "_non_persistent_buffers_set": set(),
            "_forward_hooks": collections.OrderedDict(),
            "_modules": modules or {},
            **attributes,
            "_init_args": (),
            "_init_kwargs": EasyDict(),
        }

    def __reduce__(self):
        meta = EasyDict(type="class", version=6, module_src=self.source, class_name=self.kind, state=self.state)
        return _reconstruct_persistent_obj, (meta,)

    def at(self, path: str) -> Network:
        """Gives the module of a dotted name."""
        module = self
        for name in path.split("."):
            module = module.state["_modules"][name]
        return module


def network(generator: Generator, clamp=None, multiplier=0.01, repository="ada", noise=True) -> Network:
    """Writes down a generator as NVIDIA's class has it."""
    tensors = generator.state_dict()
    blocks = {}
    for size in generator.synthesis.resolutions:
        name = f"synthesis.b{size}"
        names = ("conv0", "conv1") if size > 4 else ("conv1",)
        layers = {k: _layer(tensors, f"{name}.{k}", size, clamp, noise) for k in names}
        rgb = _own(tensors, f"{name}.torgb")
        layers["torgb"] = Network(
            "ToRGBLayer",
            rgb,
            modules={"affine": _linear(tensors, f"{name}.torgb.affine", 1.0, "linear")},
            conv_clamp=clamp,
            weight_gain=1 / np.sqrt(rgb["weight"].shape[1]),
        )
        blocks[f"b{size}"] = Network(
            "SynthesisBlock",
            {"const": tensors[f"{name}.const"]} if size == 4 else {},
            {"resample_filter": upsampling_filter() / 4},
            layers,
            architecture="skip",
            resolution=size,
            img_channels=3,
            use_fp16=clamp is not None and size == generator.resolution,
        )
    own = {"img_resolution": generator.resolution, "img_channels": 3, "num_ws": generator.num_ws}
    if repository == "sg3":
        own["num_fp16_res"] = 4
    synthesis = Network("SynthesisNetwork", modules=blocks, block_resolutions=generator.synthesis.resolutions, **own)
    depth = generator.mapping.num_layers
    mapping = Network(
        "MappingNetwork",
        buffers={"w_avg": tensors["mapping.w_avg"]},
        modules={f"fc{i}": _linear(tensors, f"mapping.fc{i}", multiplier, "lrelu", 0.01) for i in range(depth)},
        c_dim=0,
        num_layers=depth,
        w_avg_beta=0.998 if repository == "sg3" else 0.995,
    )
    return Network("Generator", modules={"synthesis": synthesis, "mapping": mapping}, c_dim=0, **own)


def _own(tensors, prefix) -> dict:
    return {n: tensors[f"{prefix}.{n}"] for n in ("weight", "bias")}


def _linear(tensors, name, multiplier, activation, own_multiplier=1.0) -> Network:
    scaled = {n: t * (own_multiplier / multiplier) for n, t in _own(tensors, name).items()}
    gain = multiplier / np.sqrt(scaled["weight"].shape[1])  # a number of numpy, as in NVIDIA's files
    whole = int(multiplier) if multiplier == int(multiplier) else multiplier
    return Network("FullyConnectedLayer", scaled, activation=activation, weight_gain=gain, bias_gain=whole)


def _layer(tensors, name, size, clamp, noise) -> Network:
    own, buffers = _own(tensors, name), {"resample_filter": upsampling_filter() / 4}
    own["weight"] = own["weight"].to(memory_format=torch.channels_last)  # as layers of float16 have it
    if noise:
        own["noise_strength"] = tensors[f"{name}.noise_strength"]
        buffers["noise_const"] = tensors[f"{name}.noise_const"]
    return Network(
        "SynthesisLayer",
        own,
        buffers,
        {"affine": _linear(tensors, f"{name}.affine", 1.0, "linear")},
        resolution=size,
        up=2 if name.endswith("conv0") else 1,
        use_noise=noise,
        activation="lrelu",
        conv_clamp=clamp,
        padding=1,
        act_gain=math.sqrt(2) if noise else np.sqrt(2),
    )
