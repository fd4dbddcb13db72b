"""Finds a StyleGAN2 generator in a file's content by its tensors' names, and names them as StyleGAN2-ADA does.

The known names are looked for at the top or up to two keys deep, under whatever common prefix: wrappings such as
`module.` and `_orig_mod.`, a training state of Lightning, a pickled network, a larger network around the generator.
An average over training (`g_ema`, `params_ema`, …) is taken before the weights of the last step.

Layouts differ in numbers where StyleGAN2-ADA names resolutions, and in some dimensions of size 1. Their values are the
same, and so is the learning-rate multiplier 0.01 of their mapping networks: nothing is scaled.
"""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.checkpoints.modules import Module, as_module, generator_of, walk
from models.checkpoints.unpickler import Opaque
from models.layers import upsampling_filter

MAX_KEYS = 2  # dictionaries around a network's own
_MAX_LAYERS = 17  # of 1024 px; a file that numbers its layers higher keeps those names, and is refused for them
_MAX_MAPPING = 64
_AVERAGED = re.compile(r"ema|avg|average|swa|shadow", re.IGNORECASE)
_RAW = re.compile(r"(^|\.)(net_?)?(g|gen|generator|params|current_model_state)$", re.IGNORECASE)
_log = logging.getLogger(__name__)

FORMATS = (
    "Supported are unconditional StyleGAN2 generators under the names of StyleGAN2-ADA, rosinality or BasicSR, in "
    ".safetensors, .pt, .pth and .ckpt, or in NVIDIA's .pkl. To save one again, in the program that made it: "
    "torch.save({'g_ema': generator.state_dict()}, 'generator.pt')."
)


@dataclass
class Checkpoint:
    """A generator as a file holds it.

    Attributes:
        layout: Whose layout the file has, in words, such as "rosinality".
        tensors: Tensors by their StyleGAN2-ADA names (`mapping.fc0.weight`, `synthesis.b4.conv1.weight`, …), without
            filters, in the file's number types. `mapping.w_avg` is missing if the file has no mean latent.
        conv_clamp: Limit of the features' magnitude, None for none; not to be seen in the tensors.
        notes: What else the file says about itself, such as name and licence.
    """

    layout: str
    tensors: dict[str, Tensor]
    conv_clamp: float | None = None
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Dialect:
    """The words of a layout."""

    layout: str
    anchors: tuple[str, ...]  # by which it is recognised; a whole generator has them all
    mapping: str = ""  # its layer i has the number i + 1, since the normalisation is number 0
    const: str = ""  # the learned constant
    first: str = ""  # the layer at 4 px
    further: str = ""  # all other layers, numbered from 0
    conv: str = ""  # a modulated convolution within a layer or colour output
    strength: str = ""  # of the noise within a layer
    noise: str = ""  # maps, up to their number

    @property
    def parts(self) -> set[str]:
        """First words of a generator's names; what else lies under the same prefix is another network's."""
        own = {self.mapping, self.const, self.first, self.further, self.noise, "to_rgb1", "to_rgbs"}
        return {name.split(".")[0] for name in own} if self.mapping else {"mapping", "synthesis"}

    def names(self) -> dict[str, tuple[str, int]]:
        """Gives the StyleGAN2-ADA name of every tensor, and its number of dimensions there."""
        if not self.mapping:
            return {}
        table = {self.const: ("synthesis.b4.const", 3)}
        for i in range(_MAX_MAPPING):
            table[f"{self.mapping}.{i + 1}.weight"] = (f"mapping.fc{i}.weight", 2)
            table[f"{self.mapping}.{i + 1}.bias"] = (f"mapping.fc{i}.bias", 1)
        for i in range(_MAX_LAYERS):
            theirs = f"{self.further}.{i - 1}" if i else self.first
            ours = f"synthesis.b{2 ** ((i + 5) // 2)}.conv{(i + 1) % 2}"  # 4: conv1; 8: conv0, conv1; 16: …
            table |= self._convolution(theirs, ours)
            table[f"{theirs}.activate.bias"] = (f"{ours}.bias", 1)
            table[f"{theirs}.{self.strength}"] = (f"{ours}.noise_strength", 0)
            table[f"{self.noise}{i}"] = (f"{ours}.noise_const", 2)
        for i in range(_MAX_LAYERS // 2 + 1):
            theirs, ours = (f"to_rgbs.{i - 1}" if i else "to_rgb1"), f"synthesis.b{2 ** (i + 2)}.torgb"
            table |= self._convolution(theirs, ours)
            table[f"{theirs}.bias"] = (f"{ours}.bias", 1)
        return table

    def _convolution(self, theirs: str, ours: str) -> dict[str, tuple[str, int]]:
        return {
            f"{theirs}.{self.conv}.weight": (f"{ours}.weight", 4),
            f"{theirs}.{self.conv}.modulation.weight": (f"{ours}.affine.weight", 2),
            f"{theirs}.{self.conv}.modulation.bias": (f"{ours}.affine.bias", 1),
        }


_DIALECTS = (
    _Dialect("StyleGAN2-ADA", ("mapping.fc0.weight", "synthesis.b4.const", "synthesis.b4.conv1.weight")),
    _Dialect(
        "rosinality",
        ("style.1.weight", "input.input", "conv1.conv.weight"),
        *("style", "input.input", "conv1", "convs", "conv", "noise.weight", "noises.noise_"),
    ),
    # BasicSR saves no filters, so its generator with bilinear resampling, of which no weights have been published, has
    # the same tensors and cannot be told apart.
    _Dialect(
        "BasicSR",
        ("style_mlp.1.weight", "constant_input.weight", "style_conv1.modulated_conv.weight"),
        *(
            "style_mlp",
            "constant_input.weight",
            "style_conv1",
            "style_convs",
            "modulated_conv",
            "weight",
            "noises.noise",
        ),
    ),
)
_UNSUPPORTED = {
    r"synthesis\.(input\.|L\d+_\d+_\d+\.)": "a StyleGAN3 generator; its layers are other ones",
    r"mapping\.embed\.": "a conditional StyleGAN2, which needs class labels",
    r"(generator\.)?progression\.\d+\.|.*ToRGB_lod|g_synthesis\.|g_mapping\.": (
        "a StyleGAN1 generator, which normalises its features instead of its weights"
    ),
    r".*\.iwt\.": "a SWAGAN generator, which makes wavelets",
    r"style_conv(1|s\.\d+)\.bias$": (
        "the 'clean' variant of BasicSR's StyleGAN2 (StyleGAN2GeneratorClean, GFPGANv1Clean, GFPGAN from version 1.2 "
        "on), which resamples bilinearly instead of with the filter [1, 3, 3, 1] and so makes other pictures; "
        "expected the original one, as in GFPGANv1.pth"
    ),
    r"final_linear\.|final_conv\.|conv_body\.|b\d+\.fromrgb\.": "a discriminator; expected a generator",
}


class _Found(NamedTuple):
    """A generator within the content of a file: its keys and prefix, its layout, and the names there."""

    keys: tuple[str, ...]
    prefix: str
    dialect: _Dialect
    values: dict[str, Any]
    modules: list[Module] | None

    @property
    def is_whole(self) -> bool:
        return all(self.prefix + anchor in self.values for anchor in self.dialect.anchors)

    @property
    def place(self) -> str:
        return ".".join([*self.keys, self.prefix.rstrip(".")]).strip(".")

    @property
    def where(self) -> str:
        return f"under {self.place!r}" if self.place else "at the top"

    @property
    def is_averaged(self) -> bool:
        return bool(_AVERAGED.search(self.place))


def find_generator(content: Any, path: Path) -> Checkpoint:
    """Finds the generator in a file's content: what `safe_load` gives, or tensors by name; copies no numbers.

    Raises:
        ValueError: If there is no generator, or one that this project's cannot hold.
    """
    try:
        _refuse_tensorflow(content)
        collections = list(_collections(content))
        found = [f for keys, values, modules in collections for f in _generators(keys, values, modules)]
        if not found:
            raise ValueError(_what_else(collections))
        best = min(found, key=lambda f: (not f.is_whole, not f.is_averaged))  # the first of equals
        checkpoint = _checkpoint(best, content)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}. {FORMATS}") from error
    if best.is_averaged:
        _log.info("%s: took the averaged weights %s.", path, best.where)
    elif _RAW.search(best.place):
        _log.warning("%s: has no averaged weights; took those of the last training step %s.", path, best.where)
    else:
        _log.info("%s: took the weights %s.", path, best.where)
    return checkpoint


def _collections(content: Any) -> Iterator[tuple[tuple[str, ...], dict[Any, Any], list[Module] | None]]:
    """Gives every collection of named values: pickled networks, and dictionaries up to `MAX_KEYS` keys deep."""
    queue: deque[tuple[tuple[str, ...], Any]] = deque([((), content)])
    seen: set[int] = set()
    while queue:
        keys, value = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if module := as_module(value):
            modules = walk(module)
            yield keys, {name: t for m in modules for name, t in m.tensors.items()}, modules
            continue
        if isinstance(value, list | tuple) and len(value) <= 10:
            value = {str(i): item for i, item in enumerate(value)}
        if isinstance(value, dict):
            yield keys, value, None
            if len(keys) < MAX_KEYS:
                queue.extend(((*keys, str(key)[:40]), inner) for key, inner in value.items() if not _is_leaf(inner))


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, dict | list | tuple)


def _generators(keys: tuple[str, ...], values: dict[Any, Any], modules: list[Module] | None) -> Iterator[_Found]:
    for dialect in _DIALECTS:
        names = [name for name in values if isinstance(name, str) and name.endswith(dialect.anchors)]
        prefixes = [name.removesuffix(anchor) for name in names for anchor in dialect.anchors if name.endswith(anchor)]
        for prefix in dict.fromkeys(p for p in prefixes if not p or p.endswith(".")):
            # A network within a pickled one has no attributes to check under names of its own.
            yield _Found(keys, prefix, dialect, values, None if prefix else modules)


def _checkpoint(found: _Found, content: Any) -> Checkpoint:
    """Names the tensors of a generator anew, and checks what the tensors do not show."""
    named = {n: v for n, v in found.values.items() if isinstance(n, str) and n.startswith(found.prefix)}
    inner = {n.removeprefix(found.prefix): v for n, v in named.items()}
    if unsupported := _unsupported(inner):
        raise ValueError(f"{found.where} is {unsupported}; only unconditional StyleGAN2 generators are read")
    conv_clamp = None
    if found.modules:
        inner, conv_clamp = generator_of(found.modules)
    own = {n: v for n, v in inner.items() if n.split(".")[0] in found.dialect.parts}
    strange = [f"{n!r} ({type(v).__name__})" for n, v in own.items() if not is_named_tensor(n, v)]
    if strange:
        raise ValueError(f"expected tensors of real numbers {found.where}, got {', '.join(strange[:5])}")
    table, tensors = found.dialect.names(), {}
    for name, tensor in own.items():
        if re.search(r"(^|\.)(resample_filter|(blur|upsample)\.kernel)$", name):
            _check_filter(name, tensor)
        else:
            ours, ndim = table.get(name, (name, tensor.ndim))
            tensors[ours] = _without_units(tensor, ndim)
    _sample_missing_noise(tensors, found.place)
    mean = _mean_latent(found, content)
    if mean is not None:
        tensors.setdefault("mapping.w_avg", mean)
    notes = {"found": f"under {found.place}"} if found.place else {}
    rest = {str(n).split(".")[0] for n in found.values} - {found.prefix.split(".")[0]} if found.prefix else set()
    if rest:
        notes["part"] = f"{found.prefix.rstrip('.')} alone; the file also has {', '.join(sorted(rest)[:5])}"
    return Checkpoint(found.dialect.layout, tensors, conv_clamp, notes)


def _unsupported(names: Iterable[Any]) -> str | None:
    names = list(map(str, names))
    return next((what for pattern, what in _UNSUPPORTED.items() if any(re.match(pattern, n) for n in names)), None)


def _what_else(collections: list[tuple[tuple[str, ...], dict[Any, Any], list[Module] | None]]) -> str:
    """Says what is in a file without a generator."""
    for keys, values, _ in collections:
        names = [name for name in values if isinstance(name, str) and not isinstance(values[name], dict)]
        shorter = [n.partition(".")[2] for n in names]
        if what := _unsupported(names) or _unsupported(shorter):
            return f"{'.'.join(keys) or 'its top'} is {what}; only unconditional StyleGAN2 generators are read"
    if not collections:
        return "holds no named tensors"
    keys, values, _ = max(collections, key=lambda c: sum(isinstance(value, Tensor) for value in c[1].values()))
    shown = ", ".join(sorted(map(str, values))[:5])[:200] or "nothing"
    return f"no tensors with the names of a StyleGAN2 generator; {'.'.join(keys) or 'its top'} holds {shown}"


def _refuse_tensorflow(content: Any) -> None:
    for value in content if isinstance(content, list | tuple) else [content]:
        if isinstance(value, Opaque) and value.kind in ("dnnlib.tflib.network.Network", "tfutil.Network"):
            raise ValueError(
                "a TensorFlow pickle of NVIDIA's first StyleGAN2 (or StyleGAN1, which is not read); convert it with "
                "legacy.py of NVIDIA's stylegan2-ada-pytorch repository (python legacy.py --source=… --dest=…)"
            )


def _without_units(tensor: Tensor, ndim: int) -> Tensor:
    """Drops leading, then trailing dimensions of size 1 until `ndim` remain, or none of size 1 is left to drop."""
    while tensor.ndim > ndim and tensor.shape[0] == 1:
        tensor = tensor[0]
    while tensor.ndim > ndim and tensor.shape[-1] == 1:
        tensor = tensor[..., 0]
    return tensor


def _check_filter(name: str, kernel: Tensor) -> None:
    """Refuses filters other than [1, 3, 3, 1]; StyleGAN2-ADA stores them with the sum 1, rosinality with 4."""
    wanted = upsampling_filter() / (4.0 if name.endswith("resample_filter") else 1.0)
    if kernel.shape != wanted.shape or not torch.allclose(kernel.float(), wanted, atol=1e-3):
        raise ValueError(
            f"{name} is another filter than [1, 3, 3, 1], the one that this project's generator has built in"
        )


def _sample_missing_noise(tensors: dict[str, Tensor], place: str) -> None:
    """Samples the noise maps that files of rosinality's first versions lack, the same ones every time."""
    layers = [name.removesuffix(".noise_strength") for name in tensors if name.endswith(".noise_strength")]
    missing = [layer for layer in layers if f"{layer}.noise_const" not in tensors]
    if not missing:
        return
    _log.warning(
        "%s: no noise maps for %d of %d layers; they come from a fixed seed, so fine detail differs from "
        "other programs' pictures.",
        *(place or "the file", len(missing), len(layers)),
    )
    rng = torch.Generator().manual_seed(0)
    for layer in missing:
        if match := re.fullmatch(r"synthesis\.b(\d{1,4})\.conv[01]", layer):
            size = min(int(match[1]), 1024)
            tensors[f"{layer}.noise_const"] = torch.randn(size, size, generator=rng)


def _mean_latent(found: _Found, content: Any) -> Tensor | None:
    """Takes the mean of w (D,) from `latent_avg`: (D,), (1, D), or (L, D) with the mean in every row.

    pSp and e4e repeat the mean for every style and never train it. Rows that differ were made by something else; they
    are an encoder's offsets and not the mean of w, so None lets the reader measure that from the mapping network.
    """
    average = found.values.get(f"{found.prefix}latent_avg", found.values.get("latent_avg"))
    for key in ("", *found.keys):  # next to the tensors, or outside of one or both keys
        content = content.get(key) if key and isinstance(content, dict) else content
        if average is None and isinstance(content, dict):
            average = content.get("latent_avg")
    if average is None:
        return None
    if not is_named_tensor("latent_avg", average) or average.numel() == 0 or average.ndim == 0:
        kind = tuple(average.shape) if isinstance(average, Tensor) else type(average).__name__
        raise ValueError(f"expected the mean latent (D,) or (L, D) under 'latent_avg', got {kind}")
    rows = average.flatten(0, -2) if average.ndim > 1 else average[None]  # (L, D)
    if not torch.equal(rows, rows[:1].expand_as(rows)):
        _log.warning("'latent_avg' differs between styles and so is no mean latent; the mean is computed instead.")
        return None
    return rows[0]


def is_named_tensor(name: object, value: object) -> bool:
    """Says whether a dictionary's entry is a plain tensor of real numbers with a text for a name."""
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_complex() or value.is_quantized or value.is_meta)
    )
