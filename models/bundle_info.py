"""bundle.json: what a bundle says about itself, and whether this software can follow it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.files import ROOT

DEFAULT_BUNDLE = ROOT / "bundles" / "celeba64"
FORMAT = "amortized-pulse/bundle/2"
INFO, GENERATOR, ENCODER, LATENTS = "bundle.json", "generator.safetensors", "encoder.safetensors", "latents.safetensors"
PARTS = (GENERATOR, ENCODER, LATENTS)

_INFO_TYPES = {
    "name": str,
    "resolution": int,
    "lr_sizes": list,
    "licence": str,
    "training_data": str,
    "parts": dict,
    "encoder": dict,
}
_ENCODER_TYPES = {"resolution": int, "num_ws": int, "w_dim": int}
_OPTIONAL_ENCODER_TYPES = {
    "variant": str, "backbone": str, "width": int, "canvas": int, "channels": list, "widths": list, "rank": int,
    "head_rank": int, "hidden": int,
}  # fmt: skip


def is_bundle(path: Path) -> bool:
    """Says whether a folder holds a bundle.json that this version understands."""
    try:
        return bool(read_info(path))
    except (OSError, ValueError):
        return False


def read_info(path: Path) -> dict[str, Any]:
    """Reads bundle.json; ValueError if it is not what this version of the software understands."""
    if not (path / INFO).is_file():
        raise FileNotFoundError(
            f"Expected a bundle at {path}, found no {INFO} there; name a folder that holds one, "
            "such as bundles/celeba64 of a complete checkout."
        )
    try:
        info = json.loads((path / INFO).read_bytes())
    except ValueError as error:  # both malformed JSON and malformed UTF-8
        raise ValueError(f"{path / INFO}: expected JSON, found something else ({error}); copy it again.") from error
    check_info(info, path / INFO)
    return info


def check_info(info: Any, path: Path) -> None:
    """Raises ValueError for notes that are missing, of a wrong type, or out of range."""
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        found = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise ValueError(
            f"{path}: expected the format {FORMAT!r}, found {found!r}; the bundle is for another version of this "
            "software: update, or export it again."
        )
    wrong = [name for name, kind in _INFO_TYPES.items() if not isinstance(info.get(name), kind)]
    if wrong:
        wanted = ", ".join(f"{name} ({_INFO_TYPES[name].__name__})" for name in wrong)
        raise ValueError(f"{path}: expected {wanted}, found {[info.get(name) for name in wrong]}; write it anew.")
    sizes = info["lr_sizes"]
    whole = len(sizes) == 2 and all(type(size) is int for size in sizes)  # True is an int to isinstance
    if not whole or not 1 <= sizes[0] <= sizes[1] <= info["resolution"]:
        raise ValueError(
            f"{path}: expected lr_sizes [smallest, largest] within 1 … {info['resolution']} px, found {sizes}."
        )


def check_encoder(config: dict[str, Any], path: Path) -> None:
    """Raises ValueError for settings of the wrong type, and for backbones that timm would look for on the network."""
    import timm  # late: it takes longer to import than to encode a face

    types = _ENCODER_TYPES | _OPTIONAL_ENCODER_TYPES
    numbers = [name for name in types if name in config and types[name] is int]
    wrong = {name: config[name] for name in numbers if type(config[name]) is not int or not 0 <= config[name] <= 2**16}
    for name in ("channels", "widths"):
        widths = config.get(name, [1])
        if type(widths) is not list or any(type(width) is not int or not 1 <= width <= 2**16 for width in widths):
            wrong[name] = widths
    name = config.get("backbone", "resnet18")
    if not isinstance(name, str):
        wrong["backbone"] = name
    if wrong:
        wanted = ", ".join(f"{name} ({types[name].__name__})" for name in wrong)
        raise ValueError(f"{path}: expected an encoder with {wanted}, numbers from 0 to 65536, found {wrong}.")
    if ":" in name or "/" in name or not timm.is_model(name):
        raise ValueError(
            f"{path}: expected a backbone that the installed timm {timm.__version__} has by name, found {name!r}; "
            "update timm, or copy the bundle again from where it came."
        )
