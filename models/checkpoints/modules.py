"""Networks that were pickled as objects: their tensors by name, and what NVIDIA's layers compute besides.

What a layer of NVIDIA's StyleGAN2-ADA-PyTorch and StyleGAN3 repositories computes is told by its attributes, not by its
tensors alone. All that this project's generator has no setting for is compared with what it does, and a network that
does otherwise is refused, never read approximately.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from models.checkpoints.unpickler import Opaque

MAX_MODULES, MAX_TENSORS, MAX_NAME, MAX_DEPTH = 1000, 1000, 100, 10
MAPPING_MULTIPLIER = 0.01  # learning-rate multiplier of our mapping network
_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"


class Module(NamedTuple):
    """A module as a file describes it."""

    name: str  # in the network, such as "synthesis.b8.conv0"; empty for the network
    kind: str  # name of its class
    state: dict[Any, Any]  # its attributes

    @property
    def children(self) -> dict[Any, Any]:
        """The modules in it by their names."""
        return _dictionary(self.state.get("_modules"))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its own parameters and buffers by their full names."""
        parts = [_dictionary(self.state.get(part)) for part in ("_parameters", "_buffers")]
        own = {name: value for part in parts if len(part) <= MAX_TENSORS for name, value in part.items()}
        unsaved = self.state.get("_non_persistent_buffers_set")
        unsaved = unsaved if isinstance(unsaved, list) and len(unsaved) <= MAX_TENSORS else []
        return {self.inner(n): value for n, value in own.items() if isinstance(value, Tensor) and n not in unsaved}

    def inner(self, name: Any) -> str:
        """Gives the full name of what has a name in this module."""
        if type(name) is not str or len(name) > MAX_NAME:
            raise ValueError(f"expected the names of tensors and modules to be texts of up to {MAX_NAME} characters")
        return f"{self.name}.{name}" if self.name else name


def as_module(value: Any, name: str = "") -> Module | None:
    """Recognises a pickled module, of `torch_utils.persistence` or of torch itself; None if it is none."""
    if type(value) is not Opaque:
        return None
    kind, state = value.kind, value.state
    if kind == _PERSISTENT and len(value.args) == 1:
        meta = _dictionary(value.args[0])
        kind, state = str(meta.get("class_name"))[:60], meta.get("state")
    return Module(name, kind, state) if isinstance(state, dict) and "_modules" in state else None


def walk(network: Module) -> list[Module]:
    """Lists a module and all modules in it, each before those in it; ValueError if they multiply."""
    modules: list[Module] = []
    stack = [(network, 0)]
    while stack:
        module, depth = stack.pop()
        modules.append(module)
        if len(modules) + len(module.children) > MAX_MODULES or depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_MODULES} modules, or nested more than {MAX_DEPTH} deep")
        for name, child in reversed(module.children.items()):
            inner = as_module(child, module.inner(name))
            if inner is None and child is not None:
                raise ValueError(f"expected a module as {module.inner(name)}, got {type(child).__name__}")
            stack += [(inner, depth + 1)] if inner else []
    return modules


def generator_of(modules: list[Module]) -> tuple[dict[str, Tensor], float | None]:
    """Gives what a network of NVIDIA's computes as tensors of ours and `conv_clamp`, or refuses it.

    Modules of other people's code, without NVIDIA's attributes, are taken as they are. Number types of layers
    (`num_fp16_res`) are ignored on purpose: inference in float32 is at least as exact.

    Raises:
        ValueError: If a layer has settings that ours has not.
    """
    if any("act_gain" in module.state for module in modules):
        for module in modules:
            _check_settings(module)
    tensors: dict[str, Tensor] = {}
    for module in modules:
        scale = _scale(module)
        # The function stays the same if the stored numbers take over what differs in the multiplier.
        tensors |= {n: t if scale == 1.0 or t.is_complex() else t.float() * scale for n, t in module.tensors.items()}
        if module.state.get("use_noise") is False:
            tensors |= _no_noise(module)
    return tensors, _conv_clamp(modules)


def _check_settings(module: Module) -> None:
    """Compares a module's attributes with what ours does."""
    for name, value in _settings(module).items():
        found = module.state.get(name, "nothing")
        same = math.isclose(found, value, rel_tol=1e-5) if _is_number(found) and _is_number(value) else found == value
        if not same:
            where = module.name or "the generator"
            raise ValueError(f"{where} has {name} {_shown(found)}; this project's generator has {_shown(value)}")


def _settings(module: Module) -> dict[str, Any]:
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
    expected = {"architecture": "skip", "img_channels": 3, "c_dim": 0}
    return {name: value for name, value in expected.items() if name in module.state}


def _multiplier(module: Module) -> float:
    """Gives the learning-rate multiplier of a linear layer, which is its bias's gain."""
    gain = module.state.get("bias_gain")
    if not _is_number(gain) or not 0 < gain < math.inf:
        raise ValueError(f"{module.name} has bias_gain {_shown(gain)}; expected a number above 0")
    return float(gain)


def _inputs(module: Module) -> int:
    """Gives the number of a layer's inputs, from the shape of its weight (outputs, inputs, …)."""
    weight = module.tensors.get(f"{module.name}.weight")
    if weight is None or weight.ndim < 2 or weight.shape[1] == 0:
        raise ValueError(f"{module.name} has no weight with inputs")
    return weight.shape[1]


def _scale(module: Module) -> float:
    """Gives the factor for weight and bias of a linear layer by which our learning-rate multiplier suits them."""
    if "bias_gain" not in module.state:
        return 1.0
    gain, own = _multiplier(module), MAPPING_MULTIPLIER if module.name.startswith("mapping.") else 1.0
    return 1.0 if math.isclose(gain, own, rel_tol=1e-9) else gain / own


def _conv_clamp(modules: list[Module]) -> float | None:
    """Finds the features' limit, which must be the same in all layers."""
    values = [module.state["conv_clamp"] for module in modules if "conv_clamp" in module.state]
    if not all(value is None or (_is_number(value) and 0 < value < math.inf) for value in values):
        raise ValueError("expected conv_clamp to be a number above 0 or None in all layers")
    if len(set(values)) > 1:
        raise ValueError(f"conv_clamp differs from layer to layer ({sorted(map(str, set(values)))}); expected one")
    return None if not values or values[0] is None else float(values[0])


def _no_noise(module: Module) -> dict[str, Tensor]:
    """Gives the noise of a layer that has none."""
    match = re.fullmatch(r"synthesis\.b(\d{1,4})\.conv[01]", module.name)
    if match is None or int(match[1]) > 1024:
        raise ValueError(f"{module.name[:60]} is no layer of a StyleGAN2 generator")
    size = int(match[1])
    return {f"{module.name}.noise_const": torch.zeros(size, size), f"{module.name}.noise_strength": torch.zeros([])}


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float)


def _shown(value: Any) -> str:
    """Writes an attribute for an error; containers could be endless."""
    return repr(value)[:40] if type(value) in (int, float, bool, str, type(None)) else type(value).__name__


def _dictionary(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}
