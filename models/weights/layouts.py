"""Brings the tensors of every `.pt` layout to one set of names, those of StyleGAN2-ADA.

Foreign layouts number their layers where StyleGAN2-ADA names their resolutions, and keep some more dimensions of size
1. Their values are the same, and so is the learning-rate multiplier 0.01 of their mapping networks: nothing is scaled.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.layers import upsampling_filter
from models.weights.checkpoint import FORMATS, Checkpoint
from models.weights.strangers import name_of_stranger

_MAX_LAYERS = 17  # of 1024 px; a file that numbers its layers higher keeps those names, and is refused for them
_MAX_DEPTH = 64
_ADA = "StyleGAN2-ADA names"
# Where files keep a generator, the best first. "g_running" is of StyleGAN1, here to be refused by name.
_KEYS = ("G_ema", "g_ema", "params_ema", "state_dict", "g_running", "params", "g")
_NOT_AVERAGED = ("params", "g")
_PREFIXES = {"decoder.": "pSp or e4e, its decoder", "stylegan_decoder.": "GFPGAN, its decoder"}


@dataclass(frozen=True)
class _Dialect:
    """The words of a layout.

    Attributes:
        layout: Its name.
        mapping: The mapping network; its layer i has the number i + 1, since the normalisation is number 0.
        const: The learned constant.
        first: The layer at 4 px.
        further: All other layers, numbered from 0.
        conv: A modulated convolution within a layer or colour output.
        strength: The strength of the noise within a layer.
        noise: The noise maps, up to their number.
    """

    layout: str
    mapping: str
    const: str
    first: str
    further: str
    conv: str
    strength: str
    noise: str

    def names(self) -> dict[str, tuple[str, int]]:
        """Gives the StyleGAN2-ADA name of every tensor, and its number of dimensions there."""
        table = {self.const: ("synthesis.b4.const", 3)}
        for i in range(_MAX_DEPTH):
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
    _Dialect("rosinality", "style", "input.input", "conv1", "convs", "conv", "noise.weight", "noises.noise_"),
    # BasicSR saves no filters, so its generator with bilinear resampling, of which no weights have been published, has
    # the same tensors and cannot be told apart.
    _Dialect(
        "BasicSR",
        "style_mlp",
        "constant_input.weight",
        "style_conv1",
        "style_convs",
        "modulated_conv",
        "weight",
        "noises.noise",
    ),
)


def checkpoint_from_dictionary(content: Any, path: Path) -> Checkpoint:
    """Recognises the layout of a `.pt` file's content, and names its tensors anew.

    Nothing is copied: the tensors are those of the file, or views of them.

    Args:
        content: What the file holds: a generator's tensors by name, or a dictionary that has them under `G_ema`
            (StyleGAN2-ADA), `g_ema` or `g` (rosinality), `params_ema` or `params` (BasicSR, GFPGAN), or `state_dict`
            (pSp, e4e), with the mean latent beside them under `latent_avg`.
        path: Named in errors.

    Returns:
        The checkpoint.

    Raises:
        ValueError: If the layout is unknown, or the network is not an unconditional StyleGAN2.
    """
    key, state = _find_state(content, path)
    prefix = next((p for p in _PREFIXES if any(isinstance(n, str) and n.startswith(p) for n in state)), "")
    named = {n[len(prefix) :] if prefix else n: t for n, t in state.items() if not prefix or str(n).startswith(prefix)}
    average = named.pop("latent_avg", None) if key is None else content.get("latent_avg")
    place = f"under {key!r}" if key else "at its top"
    dialect = _dialect_of([n for n in named if isinstance(n, str)], f"{path}: {place}")
    strange = [f"{n!r} ({type(t).__name__})" for n, t in named.items() if not is_named_tensor(n, t)]
    if strange:
        raise ValueError(f"{path}: expected named tensors of real numbers {place}, got {', '.join(strange[:5])}.")
    if key in _NOT_AVERAGED:
        warnings.warn(
            f"{path}: has no averaged weights ('{key}_ema'); took those of the last training step under {key!r}, "
            "which draw worse faces.",
            stacklevel=2,
        )
    if dialect is None:
        # Filters are the same in every network, and ours are built where they are used.
        tensors = {n: t for n, t in named.items() if not n.endswith("resample_filter")}
        return Checkpoint(_ADA, tensors)
    tensors = _renamed(named, dialect, path)
    if average is not None and (mean := _mean_latent(average, path)) is not None:
        tensors["mapping.w_avg"] = mean
    return Checkpoint(_PREFIXES.get(prefix, dialect.layout), tensors, notes=_notes(prefix, path))


def _find_state(content: Any, path: Path) -> tuple[str | None, dict]:
    """Finds the dictionary with the generator's tensors; its key is None if it is the content itself."""
    if isinstance(content, dict):
        for key in _KEYS:
            if isinstance(content.get(key), dict) and content[key]:
                return key, content[key]
        if any(isinstance(value, Tensor) for value in content.values()):
            return None, content
        if any(isinstance(content.get(key), dict) and content[key] for key in ("d", "D")):
            raise ValueError(f"{path}: has a discriminator, and no generator, which was expected. {FORMATS}")
    found = _first(content) if isinstance(content, dict) else type(content).__name__
    keys = ", ".join(repr(key) for key in _KEYS if key != "g_running")
    raise ValueError(f"{path}: expected a dictionary with tensors at its top or under {keys}, got {found}. {FORMATS}")


def _dialect_of(names: list[str], place: str) -> _Dialect | None:
    """Recognises a layout by a generator's names; None for those of StyleGAN2-ADA."""
    if stranger := name_of_stranger(names):
        raise ValueError(f"{place} is {stranger}. {FORMATS}")
    for dialect in _DIALECTS:
        if dialect.const in names or f"{dialect.first}.{dialect.conv}.weight" in names:
            return dialect
    if any(name.startswith(("mapping.", "synthesis.")) for name in names):
        return None
    raise ValueError(f"{place} is no generator of a known layout, but tensors named {_first(names)}. {FORMATS}")


def _renamed(named: dict[str, Tensor], dialect: _Dialect, path: Path) -> dict[str, Tensor]:
    """Gives StyleGAN2-ADA's names and dimensions; unknown names stay, and whoever builds the generator reports them."""
    table = dialect.names()
    tensors = {}
    for name, tensor in named.items():
        if name.endswith((".blur.kernel", ".upsample.kernel")):
            _check_filter(name, tensor, path)
        else:
            ours, ndim = table.get(name, (name, tensor.ndim))
            tensors[ours] = _without_units(tensor, ndim)
    _draw_missing_noise(tensors, path)
    return tensors


def _without_units(tensor: Tensor, ndim: int) -> Tensor:
    """Drops leading, then trailing dimensions of size 1 until `ndim` remain, or none of size 1 is left to drop."""
    while tensor.ndim > ndim and tensor.shape[0] == 1:
        tensor = tensor[0]
    while tensor.ndim > ndim and tensor.shape[-1] == 1:
        tensor = tensor[..., 0]
    return tensor


def _check_filter(name: str, kernel: Tensor, path: Path) -> None:
    wanted = upsampling_filter()
    if kernel.shape != wanted.shape or not torch.allclose(kernel.float(), wanted, atol=1e-3):
        raise ValueError(
            f"{path}: another filter in {name}; expected the one of [1, 3, 3, 1], which the generator has built in."
        )


def _draw_missing_noise(tensors: dict[str, Tensor], path: Path) -> None:
    """Draws the noise maps that files of rosinality's first versions lack, the same ones every time."""
    layers = [name.removesuffix(".noise_strength") for name in tensors if name.endswith(".noise_strength")]
    missing = [layer for layer in layers if f"{layer}.noise_const" not in tensors]
    if not missing:
        return
    warnings.warn(
        f"{path}: has no noise maps for {len(missing)} of {len(layers)} layers; they were drawn from a fixed seed, so "
        "hair and skin differ in fine detail from other programs' pictures.",
        stacklevel=4,
    )
    rng = torch.Generator().manual_seed(0)
    for layer in missing:
        size = int(layer.split(".")[1][1:])  # of synthesis.b<size>.conv<0 or 1>
        tensors[f"{layer}.noise_const"] = torch.randn(size, size, generator=rng)


def _mean_latent(average: Any, path: Path) -> Tensor | None:
    """Takes the mean of w (D,) from `latent_avg`, which is (D,), (1, D), or (L, D) with the mean in every row.

    pSp and e4e repeat the mean for every style and never train it. Rows that differ were made by something else; they
    are an encoder's offsets and not the mean of w, so None lets the reader measure that from the mapping network.
    """
    if not is_named_tensor("latent_avg", average) or average.numel() == 0 or average.ndim == 0:
        kind = tuple(average.shape) if isinstance(average, Tensor) else type(average).__name__
        raise ValueError(f"{path}: expected the mean latent (D,) or (L, D) under 'latent_avg', got {kind}.")
    rows = average.flatten(0, -2) if average.ndim > 1 else average[None]  # (L, D)
    if not torch.equal(rows, rows[:1].expand_as(rows)):
        warnings.warn(
            f"{path}: 'latent_avg' differs between styles and so is no mean latent; it is computed instead.",
            stacklevel=3,
        )
        return None
    return rows[0]


def _notes(prefix: str, path: Path) -> dict[str, str]:
    """Says what of a larger network was read; warns where the rest changes what the generator draws."""
    if prefix == "decoder.":
        return {"part": "the decoder; `models.psp_encoder.load_psp_encoder` reads the encoder"}
    if prefix == "stylegan_decoder.":
        part = "the StyleGAN2 decoder alone, without the rest of GFPGAN, which restores faces with it"
        warnings.warn(f"{path}: read {part}.", stacklevel=3)
        return {"part": part}
    return {}


def _first(names: Iterable[Any] | Mapping[Any, Any]) -> str:
    listed = sorted(map(str, names))
    return f"{', '.join(listed[:5])}{', …' if len(listed) > 5 else ''}" if listed else "nothing"


def is_named_tensor(name: object, value: object) -> bool:
    """Says whether a dictionary's entry is a plain tensor of real numbers with a text for a name."""
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_complex() or value.is_quantized or value.is_meta)
    )
