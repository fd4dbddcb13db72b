"""The graphs that are exported: an encoder and a generator whose every input is an array, and their ONNX files.

encoder.onnx: canvas (B, 3, C, C), lr_size (B,), noise (B, n, E) -> best (B, L, D), ws (B, n + 1, L, D).
    Faces arrive on the canvas, so that one batch may mix sizes; the random part arrives as noise, so that the graph
    itself is deterministic. E is D, and more where the candidates come from a Gaussian posterior.
feedback.onnx: lr, residual (B, 3, c, c), images (B, 3, 2c, 2c), lr_size (B,), ws (B, L, D) -> moved (B, L, D).
    One pass of `models.feedback`, for bundles that have it; `export.passes` says what is around it.
generator.onnx: ws (B, L, D), and noise maps where wanted -> images (B, 3, R, R).
    The noise maps are inputs whose defaults are the stored maps: a caller who leaves them out gets constant noise.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from export.drawing import draw
from export.metadata import ENCODER, FEEDBACK, GENERATOR, Metadata, to_props
from models.bundle import Bundle
from models.encoder_base import EncoderBase
from models.generator import Generator

OPSET = 18  # the oldest that torch's exporter writes by itself; newer ones shut out older runtimes for nothing
_BATCH, _SAMPLES, _NOISE_BATCH = "batch", "samples", "noise_batch"


class EncoderGraph(nn.Module):
    """The encoder with its random numbers as an input.

    Args:
        encoder: The encoder.
    """

    places: Tensor

    def __init__(self, encoder: EncoderBase) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("places", encoder.spread_sizes.log2())
        self.ends = float(self.places[0]), float(self.places[-1])

    def forward(self, canvas: Tensor, lr_size: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes faces.

        Args:
            canvas: LR faces (B, 3, C, C) in [-1, 1], as `Encoder.on_canvas` gives them.
            lr_size: Their LR sizes in pixels (B,).
            noise: Standard normal (B, n, E), E the encoder's `noise_dim`.

        Returns:
            The best guesses (B, L, D), and the codes (B, n + 1, L, D), the best guess first.
        """
        # `Encoder.spread_at` for tensors: the rows are an octave apart, and a hat function weighs the two nearest.
        octave = lr_size.log2().clamp(*self.ends)  # (B,)
        hats = (1 - (octave[:, None] - self.places).abs()).clamp(min=0)  # (B, rows)
        spread = hats @ self.encoder.spread  # (B, L)
        ws = self.encoder.candidates(canvas, lr_size, noise, spread)
        return ws[:, 0], ws


class FeedbackGraph(nn.Module):
    """One pass of the learned feedback.

    Args:
        encoder: An encoder that has it.
    """

    def __init__(self, encoder: EncoderBase) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, lr: Tensor, residual: Tensor, images: Tensor, lr_size: Tensor, ws: Tensor) -> Tensor:
        """Corrects codes, see `EncoderBase.correct_on_canvas`.

        Args:
            lr: LR faces on the feedback's canvas (B, 3, c, c), in [-1, 1].
            residual: What the downscaled faces lack of them, on the canvas as well (B, 3, c, c).
            images: The faces, brought to twice the canvas (B, 3, 2c, 2c).
            lr_size: LR sizes in pixels (B,).
            ws: Codes (B, L, D).

        Returns:
            Moved codes (B, L, D).
        """
        return self.encoder.correct_on_canvas(lr, residual, images, lr_size, ws)


class GeneratorGraph(nn.Module):
    """The synthesis network with its noise maps as inputs.

    Args:
        generator: The generator.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.synthesis = generator.synthesis

    def forward(self, ws: Tensor, noise: list[Tensor]) -> Tensor:
        """Draws images (B, 3, R, R) from codes (B, L, D), with one noise map (1, 1, H, W) per layer."""
        return draw(self.synthesis, ws, noise)


def write_encoder(bundle: Bundle, folder: Path) -> None:
    """Exports the encoder of a bundle as encoder.onnx.

    Args:
        bundle: On the CPU.
        folder: Gets the file.
    """
    encoder = bundle.encoder
    if encoder.config.get("variant", "base") != "base":
        raise ValueError(f"Expected our own encoder to export, got the variant {encoder.config['variant']!r}.")
    # Sizes of an example; no two are equal, and none is 1, which the exporter would take for a constant.
    example = {
        "canvas": torch.zeros(2, 3, encoder.canvas, encoder.canvas),
        "lr_size": torch.full((2,), float(bundle.lr_sizes[1])),
        "noise": torch.zeros(2, 3, encoder.noise_dim),
    }
    batch, samples = torch.export.Dim(_BATCH, min=1, max=2**16), torch.export.Dim(_SAMPLES, min=1, max=2**16)
    shapes = {"canvas": {0: batch}, "lr_size": {0: batch}, "noise": {0: batch, 1: samples}}
    model = _export(EncoderGraph(encoder), example, shapes, list(example), ["best", "ws"])
    _save(model, describe(bundle, "encoder"), folder / ENCODER)


def write_feedback(bundle: Bundle, folder: Path) -> None:
    """Exports one pass of a bundle's learned feedback as feedback.onnx; nothing for a bundle that has none.

    Args:
        bundle: On the CPU.
        folder: Gets the file.
    """
    encoder = bundle.encoder
    if encoder.feedback is None:
        return
    canvas = encoder.feedback.canvas
    example = {
        "lr": torch.zeros(2, 3, canvas, canvas),
        "residual": torch.zeros(2, 3, canvas, canvas),
        "images": torch.zeros(2, 3, 2 * canvas, 2 * canvas),
        "lr_size": torch.full((2,), float(bundle.lr_sizes[1])),
        "ws": torch.zeros(2, encoder.num_ws, encoder.w_dim),
    }
    batch = torch.export.Dim(_BATCH, min=1, max=2**16)
    shapes = {name: {0: batch} for name in example}
    model = _export(FeedbackGraph(encoder), example, shapes, list(example), ["moved"])
    _save(model, describe(bundle, "feedback"), folder / FEEDBACK)


def write_generator(bundle: Bundle, folder: Path) -> None:
    """Exports the generator of a bundle as generator.onnx.

    Args:
        bundle: On the CPU.
        folder: Gets the file.
    """
    generator = bundle.generator
    stored = [layer.noise_const[None, None].clone() for layer in generator.synthesis.layers]
    names = [f"noise_{i}" for i in range(len(stored))]
    example = {"ws": torch.zeros(2, generator.num_ws, generator.w_dim), "noise": stored}
    shapes = {"ws": {0: torch.export.Dim(_BATCH, min=1, max=2**16)}, "noise": [{} for _ in stored]}
    model = _export(GeneratorGraph(generator), example, shapes, ["ws", *names], ["images"])
    _give_defaults(model, dict(zip(names, stored, strict=True)))
    _save(model, describe(bundle, "generator"), folder / GENERATOR)


def describe(bundle: Bundle, role: str) -> Metadata:
    """Says what a model of a bundle is.

    Args:
        bundle: The bundle.
        role: "encoder", "generator" or "feedback".

    Returns:
        Its metadata.
    """
    encoder, size = bundle.encoder, bundle.resolution
    layers, width, canvas = encoder.num_ws, encoder.w_dim, encoder.canvas
    seen = 0 if encoder.feedback is None else encoder.feedback.canvas
    smallest, largest = bundle.lr_sizes
    codes = f"float32 ({{}}, {layers}, {width}), style codes"
    values = {
        "encoder": {
            "canvas": f"float32 (batch, 3, {canvas}, {canvas}), RGB in [-1, 1], the low-resolution face resized "
            "bicubically (a = -0.5, reflected borders)",
            "lr_size": f"float32 (batch,), its size before that in pixels, {smallest} to {largest}",
            "noise": f"float32 (batch, samples, {encoder.noise_dim}), standard normal, one row for each further "
            "candidate",
            "best": codes.format("batch") + " of the best guess",
            "ws": codes.format("batch, 1 + samples") + ", the best guess first",
        },
        "feedback": {
            "lr": f"float32 (batch, 3, {seen}, {seen}), RGB in [-1, 1], the low-resolution face resized as for the "
            "encoder",
            "residual": f"float32 (batch, 3, {seen}, {seen}), the low-resolution face minus the downscaled image, "
            "resized likewise",
            "images": f"float32 (batch, 3, {2 * seen}, {2 * seen}), RGB, about [-1, 1], what the generator draws of "
            "ws, resized likewise",
            "lr_size": f"float32 (batch,), the size of the low-resolution face in pixels, {smallest} to {largest}",
            "ws": codes.format("batch"),
            "moved": codes.format("batch") + ", to be taken where their image downscales closer to the face",
        },
        "generator": {
            "ws": codes.format("batch"),
            "noise_0, noise_1, …": "float32 (batch or 1, 1, height, width), standard normal, one per layer from coarse "
            "to fine; left out, the stored maps count",
            "images": f"float32 (batch, 3, {size}, {size}), RGB, about [-1, 1] but not clamped",
        },
    }
    return Metadata(
        role=role,
        name=bundle.name,
        bundle_sha256=bundle.hash,
        resolution=size,
        lr_sizes=bundle.lr_sizes,
        canvas=canvas,
        num_ws=layers,
        w_dim=width,
        licence=bundle.info["licence"],
        training_data=bundle.info["training_data"],
        values=values[role],
        generator_sha256=bundle.info["parts"]["generator.safetensors"],
        noise_dim=encoder.noise_dim,
        passes=encoder.passes(None),
        feedback_canvas=seen,
    )


def _export(
    graph: nn.Module, example: dict[str, Any], shapes: dict[str, Any], inputs: list[str], outputs: list[str]
) -> onnx.ModelProto:
    """Traces a graph and turns it into an ONNX model."""
    with warnings.catch_warnings(), _unvalidated():
        # Inputs that share the batch are to share its name, which the exporter finds worth telling.
        warnings.filterwarnings("ignore", message=".*axis name.*will not be used")
        program = torch.onnx.export(
            graph.eval(),
            kwargs=example,
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program; it is made for torch 2.11 and later.")
    # Where a size is a constant to the trace, the exporter tries again with fixed sizes, and says nothing.
    dims = {value.name: value.type.tensor_type.shape.dim for value in program.model_proto.graph.input}
    fixed = [name for name in shapes if name in dims and not all(dims[name][axis].dim_param for axis in shapes[name])]
    if fixed:
        raise ValueError(
            f"Expected {', '.join(fixed)} of any size, torch.onnx.export made it that of the example: the network "
            "takes a size for a constant somewhere, as len(tensor) does; write tensor.shape[0] there."
        )
    return program.model_proto


@contextlib.contextmanager
def _unvalidated() -> Iterator[None]:
    """Lets torch.distributions, which a flow is made of, take arguments unseen: a trace has no values to look at."""
    checks = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checks)


def _give_defaults(model: onnx.ModelProto, defaults: dict[str, Tensor]) -> None:
    """Makes inputs optional, and lets their batch differ from that of the codes: one map for all, or one for each."""
    for value in model.graph.input:
        if value.name in defaults:
            value.type.tensor_type.shape.dim[0].dim_param = _NOISE_BATCH
            model.graph.initializer.append(onnx.numpy_helper.from_array(defaults[value.name].numpy(), value.name))


def _save(model: onnx.ModelProto, about: Metadata, path: Path) -> None:
    """Writes a model with its metadata, without what the exporter notes about our source files."""
    graph = model.graph
    del graph.value_info[:]  # inferred for a noise batch of 1; onnxruntime infers shapes anew
    for node in graph.node:
        node.ClearField("metadata_props")  # stack traces, with the paths of this machine
        node.ClearField("doc_string")
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.ClearField("doc_string")
        value.ClearField("metadata_props")
    graph.ClearField("metadata_props")
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, to_props(about))
    model.producer_name, model.producer_version = "amortized-pulse", f"torch {torch.__version__}"
    onnx.checker.check_model(model)
    onnx.save(model, path)
