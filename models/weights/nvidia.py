"""Finds the generator in a network pickle of NVIDIA's StyleGAN2-ADA-PyTorch and StyleGAN3 repositories.

What a layer computes is told by its attributes, not by its tensors alone. All that this project's generator has no
setting for is compared with what it does, and a network that does otherwise is refused, never read approximately.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from models.layers import upsampling_filter
from models.weights.calls import PERSISTENT_OBJECT, TENSORFLOW_NETWORKS
from models.weights.checkpoint import FORMATS, Checkpoint
from models.weights.records import Record, TensorRecord

MAX_MODULES = 1000
MAX_TENSORS = 1000  # of one module; with more it is none of ours
MAX_NAME = 100  # characters
MAX_DEPTH = 10  # of modules in modules
MAPPING_MULTIPLIER = 0.01  # learning-rate multiplier of our mapping network


@dataclass(frozen=True)
class _Module:
    """A module as the file describes it.

    Attributes:
        name: Its name in the generator, such as "synthesis.b8.conv0"; empty for the generator.
        kind: Name of its class.
        state: Its attributes.
    """

    name: str
    kind: str
    state: dict[Any, Any]

    @property
    def children(self) -> dict[Any, Any]:
        """The modules in it by their names."""
        return _dictionary(self.state.get("_modules"))

    @property
    def tensors(self) -> dict[str, TensorRecord]:
        """Its own parameters and buffers by their full names."""
        parts = [_dictionary(self.state.get(part)) for part in ("_parameters", "_buffers")]
        own = {name: value for part in parts if len(part) <= MAX_TENSORS for name, value in part.items()}
        return {self.inner(name): value for name, value in own.items() if type(value) is TensorRecord}

    def inner(self, name: Any) -> str:
        """Gives the full name of what has a name in this module."""
        if type(name) is not str or len(name) > MAX_NAME:
            raise ValueError(f"expected the names of tensors and modules to be texts of up to {MAX_NAME} characters")
        return f"{self.name}.{name}" if self.name else name


def checkpoint_from_pickle(content: Any, path: Path) -> Checkpoint:
    """Takes the generator out of what `read_pickle` gives.

    Args:
        content: A dictionary with the network under `G_ema`, or under `G` alone; or the network itself.
        path: Named in errors.

    Returns:
        The checkpoint. The number types of the layers (`num_fp16_res`) are ignored on purpose: inference in float32 is
        at least as exact.

    Raises:
        ValueError: If there is no unconditional StyleGAN2 generator in it, or one with settings that ours has not.
    """
    try:
        modules = list(_walk(_module("", _network(content, path))))
        _check_kind(modules[0])
        for module in modules:
            _check_settings(module)
        tensors = _tensors(modules)
        return Checkpoint("NVIDIA StyleGAN2-ADA .pkl", tensors, _conv_clamp(modules))
    except (ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path}: {error}; nothing in it was executed. {FORMATS}") from error


def _network(content: Any, path: Path) -> Any:
    """Chooses the generator among the networks of a file."""
    _refuse_tensorflow(content)
    if type(content) is Record:
        return content
    if type(content) is not dict:
        raise ValueError(f"expected a dictionary with a network under 'G_ema', got {type(content).__name__}")
    if content.get("G_ema") is not None:
        return content["G_ema"]
    if content.get("G") is not None:
        warnings.warn(f"{path}: no 'G_ema'; 'G' is taken, whose pictures are worse than its mean's.", stacklevel=2)
        return content["G"]
    if "D" in content:
        raise ValueError("a discriminator only; expected a generator under 'G_ema'")
    raise ValueError(f"expected a network under 'G_ema', got {[str(k)[:30] for k in content][:5]}")


def _refuse_tensorflow(content: Any) -> None:
    for value in content if type(content) in (list, tuple) else [content]:
        if type(value) is Record and value.kind in TENSORFLOW_NETWORKS:
            state = _dictionary(value.state)
            parts = [state, *(_dictionary(r.state) for r in _dictionary(state.get("components")).values() if _is(r))]
            for variables in (part.get("variables") for part in parts):
                if type(variables) is list and any("ToRGB_lod" in name for name in map(_first, variables)):
                    raise ValueError("a StyleGAN1 network (ToRGB_lod), which this project's generator cannot hold")
            raise ValueError(
                "a TensorFlow pickle; convert it with legacy.py of NVIDIA's stylegan2-ada-pytorch repository "
                "(python legacy.py --source=… --dest=…)"
            )


def _is(value: Any) -> bool:
    return type(value) is Record


def _first(pair: Any) -> str:
    return pair[0] if type(pair) in (list, tuple) and pair and type(pair[0]) is str else ""


def _dictionary(value: Any) -> dict[Any, Any]:
    return value if type(value) is dict else {}


def _module(name: str, value: Any) -> _Module:
    """Reads what `torch_utils.persistence` writes of a module, or Python of a module of torch itself."""
    if type(value) is Record and value.kind == PERSISTENT_OBJECT and len(value.args) == 1:
        meta = _dictionary(value.args[0])
        kind, state = meta.get("class_name"), meta.get("state")
        if type(kind) is str and type(state) is dict:
            return _Module(name, kind[:60], state)
    if type(value) is Record and type(value.state) is dict:
        return _Module(name, value.kind, value.state)
    raise ValueError(f"expected a network as {name or 'the generator'}, got {type(value).__name__}")


def _walk(generator: _Module) -> Iterator[_Module]:
    """Gives a module and all modules in it."""
    stack = [(generator, 0)]
    count = 0
    while stack:
        module, depth = stack.pop()
        count += 1
        if count > MAX_MODULES or depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_MODULES} modules, or nested more than {MAX_DEPTH} deep")
        yield module
        if len(module.children) > MAX_MODULES:
            raise ValueError(f"more than {MAX_MODULES} modules")
        stack += [
            (_module(module.inner(name), child), depth + 1)
            for name, child in reversed(module.children.items())
            if child is not None
        ]


def _check_kind(generator: _Module) -> None:
    """Refuses other networks by what they are."""
    if {"mapping", "synthesis"} - generator.children.keys():
        kind = "a discriminator" if "Discriminator" in generator.kind else f"a network {generator.kind!r}"
        raise ValueError(f"{kind}; expected a StyleGAN2 generator with mapping and synthesis")
    synthesis = _module("synthesis", generator.children["synthesis"])
    if any(name == "input" or re.match(r"L\d+_", str(name)) for name in synthesis.children):
        raise ValueError("a StyleGAN3 generator; expected a StyleGAN2 generator")
    mapping = _module("mapping", generator.children["mapping"])
    for module in (generator, mapping):
        if module.state.get("c_dim", 0) != 0 or "embed" in mapping.children:
            raise ValueError(f"a conditional network (c_dim {_shown(module.state.get('c_dim'))}); expected c_dim 0")


def _shown(value: Any) -> str:
    """Writes an attribute for an error; containers could be endless."""
    return repr(value)[:40] if type(value) in (int, float, bool, str, type(None)) else type(value).__name__


def _check_settings(module: _Module) -> None:
    """Compares a module's attributes with what ours does."""
    for name, value in _settings(module).items():
        found = module.state.get(name, "nothing")
        same = math.isclose(found, value, rel_tol=1e-5) if _is_number(found) and _is_number(value) else found == value
        if not same:
            where = module.name or "the generator"
            raise ValueError(f"{where} has {name} {_shown(found)}; this project's generator has {_shown(value)}")


def _settings(module: _Module) -> dict[str, Any]:
    """Gives the attributes that ours would have in a module's place."""
    first, _, last = module.name.rpartition(".")
    if last in ("conv0", "conv1"):
        return {"up": 2 if last == "conv0" else 1, "padding": 1, "activation": "lrelu", "act_gain": math.sqrt(2)}
    if last == "torgb":
        return {"weight_gain": 1 / math.sqrt(_inputs(module))}
    if last == "affine" or first == "mapping":
        return {
            "activation": "linear" if last == "affine" else "lrelu",
            "weight_gain": _multiplier(module) / math.sqrt(_inputs(module)),
        }
    return {name: value for name, value in {"architecture": "skip", "img_channels": 3}.items() if name in module.state}


def _multiplier(module: _Module) -> float:
    """Gives the learning-rate multiplier of a linear layer, which is its bias's gain."""
    gain = module.state.get("bias_gain")
    if not _is_number(gain) or not 0 < gain < math.inf:
        raise ValueError(f"{module.name} has bias_gain {_shown(gain)}; expected a number above 0")
    return float(gain)


def _inputs(module: _Module) -> int:
    """Gives the number of a layer's inputs, from the shape of its weight (outputs, inputs, …)."""
    weight = module.tensors.get(f"{module.name}.weight")
    if weight is None or len(weight.shape) < 2 or weight.shape[1] == 0:
        raise ValueError(f"{module.name} has no weight with inputs")
    return weight.shape[1]


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float)


def _conv_clamp(modules: list[_Module]) -> float | None:
    """Finds the features' limit, which must be the same in all layers."""
    found = {str(m.name): m.state["conv_clamp"] for m in modules if "conv_clamp" in m.state}
    values = list(found.values())
    if not all(value is None or (_is_number(value) and 0 < value < math.inf) for value in values):
        raise ValueError("expected conv_clamp to be a number above 0 or None in all layers")
    if len(set(values)) > 1:
        raise ValueError(f"conv_clamp differs from layer to layer ({sorted(map(str, set(values)))}); expected one")
    return None if not values or values[0] is None else float(values[0])


def _tensors(modules: list[_Module]) -> dict[str, Tensor]:
    """Makes the tensors of all modules."""
    tensors: dict[str, Tensor] = {}
    for module in modules:
        scale = _scale(module)
        for name, record in module.tensors.items():
            tensor = record.tensor()
            if name.endswith("resample_filter"):
                _check_filter(name, tensor)
                continue
            if tensor.is_complex():
                raise ValueError(f"{name} has complex numbers")
            # The function stays the same if the stored numbers take over what differs in the multiplier.
            tensors[name] = tensor if scale == 1.0 else tensor.float() * scale
        if module.state.get("use_noise") is False:
            tensors |= _no_noise(module)
    return tensors


def _scale(module: _Module) -> float:
    """Gives the factor for weight and bias of a linear layer by which our learning-rate multiplier suits them."""
    if "bias_gain" not in module.state:
        return 1.0
    gain, own = _multiplier(module), MAPPING_MULTIPLIER if module.name.startswith("mapping.") else 1.0
    return 1.0 if math.isclose(gain, own, rel_tol=1e-9) else gain / own


def _check_filter(name: str, tensor: Tensor) -> None:
    wanted = upsampling_filter() / 4.0  # of sum 1, as it is stored
    if tensor.shape != wanted.shape or not torch.allclose(tensor.float(), wanted, atol=1e-6):
        raise ValueError(f"{name} is another filter than [1, 3, 3, 1], the one of this project's generator")


def _no_noise(module: _Module) -> dict[str, Tensor]:
    """Gives the noise of a layer that has none."""
    match = re.fullmatch(r"synthesis\.b(\d{1,4})\.conv[01]", module.name)
    if match is None or int(match[1]) > 1024:
        raise ValueError(f"{module.name[:60]} is no layer of a StyleGAN2 generator")
    size = int(match[1])
    return {
        f"{module.name}.noise_const": torch.zeros(size, size),
        f"{module.name}.noise_strength": torch.zeros([]),
    }
