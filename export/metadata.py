"""What an exported model says about itself, in the `metadata_props` of its file: text, readable in any language."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT = "amortized-pulse/onnx/1"
ENCODER, GENERATOR, FEEDBACK, UPSAMPLE = "encoder.onnx", "generator.onnx", "feedback.onnx", "upsample.onnx"
REPORT, TIMING, BOUNDARIES = "export.json", "timing.json", "boundaries"
_LATER_NUMBERS = ("noise_dim", "passes", "feedback_canvas")  # older exports have none of them
_WORDS = ("role", "name", "bundle_sha256", "licence", "training_data")


@dataclass(frozen=True)
class Metadata:
    """Where a model comes from, and what it takes and gives.

    Attributes:
        role: "encoder", "generator", "feedback", or "upsample" for encoder and generator in one.
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
        noise_dim: Width of the noise that a candidate is made from; D in older exports.
        passes: Passes of learned feedback that follow the encoder unless told otherwise; 0 in older exports.
        feedback_canvas: Size c in pixels that the feedback sees the low-resolution face at; 0 where there is none.
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
    noise_dim: int = 0
    passes: int = 0
    feedback_canvas: int = 0

    def __post_init__(self) -> None:
        """Older models make a candidate of as much noise as a style is wide."""
        object.__setattr__(self, "noise_dim", self.noise_dim or self.w_dim)


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
        about |= {name: json.loads(props[name]) for name in _LATER_NUMBERS if name in props}
        return Metadata(**about, lr_sizes=(smallest, largest), generator_sha256=props.get("generator_sha256", ""))
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: its metadata is damaged ({error!r}); make it anew with export.onnx.") from error
