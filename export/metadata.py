"""What an exported model says about itself, in the `metadata_props` of its file: text, readable in any language."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT = "amortized-pulse/onnx/1"
ENCODER, GENERATOR, UPSAMPLE = "encoder.onnx", "generator.onnx", "upsample.onnx"
REPORT, TIMING, BOUNDARIES = "export.json", "timing.json", "boundaries"
_WORDS = ("role", "name", "bundle_sha256", "licence", "training_data")


@dataclass(frozen=True)
class Metadata:
    """Where a model comes from, and what it takes and gives.

    Attributes:
        role: "encoder", "generator", or "upsample" for both in one.
        name: Name of the bundle.
        bundle_sha256: The bundle's hash, as in report.json.
        resolution: Size R of the faces in pixels.
        lr_sizes: Smallest and largest low-resolution size in pixels.
        canvas: Size C in pixels that low-resolution faces are brought to before the encoder.
        num_ws: Number of styles L.
        w_dim: Width D of a style.
        licence: What the weights may be used for.
        training_data: What they were trained on.
        values: For every input and output its shape, range and unit, in words.
        generator_sha256: Of the bundle's generator, by which its boundaries know it; "" in older exports.
    """

    role: str
    name: str
    bundle_sha256: str
    resolution: int
    lr_sizes: tuple[int, int]
    canvas: int
    num_ws: int
    w_dim: int
    licence: str
    training_data: str
    values: dict[str, str]
    generator_sha256: str = ""


def to_props(metadata: Metadata) -> dict[str, str]:
    """Turns metadata into what an ONNX file holds; everything but text is JSON."""
    props = {name: value if isinstance(value, str) else json.dumps(value) for name, value in vars(metadata).items()}
    return {"format": FORMAT, **props}


def from_props(props: Mapping[str, str], where: str) -> Metadata:
    """Reads the metadata of an ONNX file.

    Args:
        props: Its `metadata_props`.
        where: The file, named in errors.

    Returns:
        The metadata.

    Raises:
        ValueError: If the file is not one of ours, or of another version.
    """
    if props.get("format") != FORMAT:
        raise ValueError(
            f"{where}: expected a model of the format {FORMAT!r}, found {props.get('format')!r}; "
            "make it anew with python -m export.onnx."
        )
    try:
        about: dict[str, Any] = {name: props[name] for name in _WORDS}
        about |= {name: json.loads(props[name]) for name in ("resolution", "canvas", "num_ws", "w_dim", "values")}
        smallest, largest = json.loads(props["lr_sizes"])
        return Metadata(**about, lr_sizes=(smallest, largest), generator_sha256=props.get("generator_sha256", ""))
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: its metadata is damaged ({error!r}); make it anew with export.onnx.") from error
