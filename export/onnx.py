"""Exports a bundle as one ONNX file, and checks that it computes what torch computes.

    python -m export.onnx                                       # bundles/celeba64 -> upsampler.onnx
    python -m export.onnx --bundle runs/mine --out mine.onnx --precision int8 --overwrite

The file holds all that turns low-resolution faces into samples, `export.graph` says how, and its own metadata say where
it comes from. It is written only if it agrees with torch; docs/deploy.md shows how programs call it.

The exit status is 0 if it was written, 1 if not, and 2 if the command itself was wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from data.console import blame, path_option, print_line, run_command
from data.files import check_replaceable, owned_file
from editing.direction import FOLDER, names_in
from export.graph import UpsamplerGraph
from export.onnxruntime_backend import FORMAT, OnnxBackend
from export.parity import check, differences
from export.quantise import FP32, PRECISIONS, store
from models.bundle import Bundle, load_bundle
from models.bundle_info import DEFAULT_BUNDLE

OPSET = 18  # the oldest that torch's exporter writes by itself; newer ones shut out older runtimes for nothing
MODEL = "upsampler.onnx"
_FOLDED = 4096  # values; larger constants would be stored in addition to the weights that they are computed from

DESCRIPTION = (
    "Photo upsampling: k faces for each low-resolution face, all of which downscale to it by a bicubic operator with "
    "a = -0.5, antialiased, with reflected borders. The details are invented: no result is evidence of who somebody is."
)
DESCRIPTIONS = {
    "lr": "RGB faces in [-1, 1] (byte / 127.5 - 1), square, one per row of the batch; their size within lr_sizes",
    "noise": "standard normal numbers, a row for each sample; zeros give the point estimate",
    "fidelity": "how exactly samples downscale to the input: 1 exactly, 0 as the generator left them",
    "sigma": "standard deviation of the inputs' noise in grey levels of 255; 0 for clean ones, negative to estimate",
    "edit": "added to the styles of all samples of a face; zeros for no edit",
    "preserve_lr": "true lets edited samples downscale to the input, too; false lets them change as the edit wants",
    "images": "RGB samples in [-1, 1]; round(127.5 x + 127.5) gives bytes",
    "ws": "style codes of the samples, edited",
    "lr_psnr": "PSNR in dB between the input and each sample, rounded to 8 bit and downscaled; 100 at most",
    "residual": "mean square of what the generator could not explain of the input, on [0, 1], before the projection",
    "sigma_used": "sigma, or what was estimated",
}
OUTPUTS = ("images", "ws", "lr_psnr", "residual", "sigma_used")


def export_bundle(bundle: Bundle, edits: Sequence[str] = (), precision: str = FP32) -> onnx.ModelProto:
    """Turns a bundle into an ONNX model for any batch, number of samples, and LR size.

    Args:
        bundle: On the CPU.
        edits: Names of the edit directions that there are for its generator.
        precision: One of `export.quantise.PRECISIONS`.

    Raises:
        ValueError: If the bundle has another encoder than our own.
    """
    encoder = bundle.encoder
    if encoder.config.get("variant", "amortized") != "amortized":
        raise ValueError(f"Expected our own encoder to export, got the variant {encoder.config['variant']!r}.")
    model = store(_trace_bundle(bundle), precision)
    # Where a size is a constant to the trace, the exporter tries again with fixed ones, and says nothing.
    if not model.graph.input[0].type.tensor_type.shape.dim[3].dim_param:
        raise ValueError(
            "Expected inputs of any size, torch.onnx.export made it that of the example: look for float()."
        )
    _describe(model, bundle, {"edits": list(edits), "precision": precision})
    onnx.checker.check_model(model, full_check=True)
    return model


def _trace_bundle(bundle: Bundle) -> onnx.ModelProto:
    batch, samples = torch.export.Dim("batch", min=1, max=2**16), torch.export.Dim("samples", min=1, max=2**12)
    size = torch.export.Dim("lr_size", min=4, max=bundle.resolution)
    encoder = bundle.encoder
    # Sizes of an example; no two are equal, and none is 1, which the exporter would take for a constant.
    example = {
        "lr": torch.zeros(2, 3, 13, 13),
        "noise": torch.zeros(2, 5, encoder.noise_dim),
        "fidelity": torch.ones(2),
        "sigma": torch.zeros(2),
        "edit": torch.zeros(2, encoder.num_ws, encoder.w_dim),
        "preserve_lr": torch.zeros(2, dtype=torch.bool),
    }
    more = {"lr": {2: size, 3: size}, "noise": {1: samples}}
    shapes = {name: {0: batch} | more.get(name, {}) for name in example}
    return trace(UpsamplerGraph(bundle), "upsampler", example, shapes, OUTPUTS)


def trace(
    graph: nn.Module, name: str, example: dict[str, Tensor], shapes: dict[str, Any], outputs: Sequence[str]
) -> onnx.ModelProto:
    """Turns a module into an ONNX model whose nodes are named by the parts of it that they stand for.

    What is constant and small is folded, and no path of this machine is in it.

    Args:
        graph: The module.
        name: Of the graph.
        example: Its inputs by name.
        shapes: For each input, the dimensions that may change: axis -> torch.export.Dim.
        outputs: Names of its outputs.
    """
    from onnx_ir.passes.common import DeduplicateInitializersPass, RemoveUnusedNodesPass
    from onnxscript.optimizer import optimize_ir

    with warnings.catch_warnings():
        # Inputs that share a dimension are to share its name, which the exporter reports.
        warnings.filterwarnings("ignore", message=".*axis name.*will not be used")
        program = torch.onnx.export(
            graph.eval(),
            kwargs=example,
            dynamo=True,
            input_names=list(example),
            output_names=list(outputs),
            dynamic_shapes=shapes,
            opset_version=OPSET,
            verbose=False,
            optimize=False,
        )
    assert program is not None
    optimize_ir(program.model, output_size_limit=_FOLDED)
    DeduplicateInitializersPass(size_limit=2**31)(program.model)  # both branches of an If hold the generator's
    RemoveUnusedNodesPass()(program.model)
    model = program.model_proto
    model.graph.name = name
    _strip(model.graph)
    return model


def _describe(model: onnx.ModelProto, bundle: Bundle, more: dict[str, Any]) -> None:
    """Says what a model is, in place of what the exporter notes of our source files."""
    for value in (*model.graph.input, *model.graph.output):
        value.doc_string = DESCRIPTIONS[value.name]
    model.doc_string = DESCRIPTION
    model.producer_name, model.producer_version = "amortized-pulse", f"torch {torch.__version__}"
    encoder = bundle.encoder
    about: dict[str, Any] = {
        "format": FORMAT,
        "name": bundle.name,
        "bundle_sha256": bundle.hash,
        "generator_sha256": bundle.info["parts"]["generator.safetensors"],
        "licence": bundle.info["licence"],
        "training_data": bundle.info["training_data"],
        "resolution": bundle.resolution,
        "lr_sizes": list(bundle.lr_sizes),
        "noise_dim": encoder.noise_dim,
        "num_ws": encoder.num_ws,
        "w_dim": encoder.w_dim,
    } | more
    del model.metadata_props[:]
    onnx.helper.set_model_props(
        model, {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    )


def _strip(graph: onnx.GraphProto) -> None:
    """Names nodes by the module that they stand for, and takes out stack traces with the paths of this machine."""
    del graph.value_info[:]
    graph.ClearField("metadata_props")
    for i, node in enumerate(graph.node):
        notes = {prop.key: prop.value for prop in node.metadata_props}
        scopes = [scope for scope in _scopes(notes) if "." in scope]
        node.name = f"{scopes[-1] if scopes else graph.name}/{node.op_type}_{i}"
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
        for attribute in node.attribute:
            if attribute.HasField("g"):
                attribute.g.name = f"{node.name}/{attribute.name}"
                _strip(attribute.g)
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.ClearField("doc_string")
        value.ClearField("metadata_props")


def _scopes(notes: dict[str, str]) -> list[str]:
    """Names of the modules around a node, without that of its operator."""
    try:
        return json.loads(notes.get("pkg.torch.onnx.name_scopes", "[]").replace("'", '"'))[:-1]
    except ValueError:
        return []


def is_model_file(path: Path) -> bool:
    """Says whether a file is a model of ours, by its metadata."""
    try:
        return {prop.key: prop.value for prop in onnx.load(path).metadata_props}.get("format") == FORMAT
    except Exception:  # of protobuf, for files of any kind
        return False


def write_model(bundle_path: Path, out: Path, precision: str = FP32, overwrite: bool = False) -> dict[str, float]:
    """Exports a bundle to a file, if it agrees with torch; otherwise nothing is written.

    Args:
        bundle_path: The bundle's folder.
        out: The file, see `data.files.owned_file`.
        precision: One of `export.quantise.PRECISIONS`.
        overwrite: Whether a model that we wrote may be replaced.

    Returns:
        What `export.parity.differences` found.

    Raises:
        FileNotFoundError: If there is no bundle.
        ValueError: If it is damaged, or its export differs from torch by more than is allowed.
    """
    with blame("--bundle"):
        bundle = load_bundle(bundle_path)
    model = export_bundle(bundle, names_in(bundle_path / FOLDER), precision)
    with owned_file(out, overwrite, ours=is_model_file) as partial:
        onnx.save(model, partial)
        found = differences(bundle, OnnxBackend(partial, threads=1))
        check(found, precision)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m export.onnx", None, description, rest, formatter_class=raw)
    add = parser.add_argument
    add("--bundle", metavar="DIR", type=Path, default=DEFAULT_BUNDLE, help="what to export (default: bundles/celeba64)")
    add("--out", metavar="FILE", type=path_option, default=Path(MODEL), help=f"where the model goes (default: {MODEL})")
    add("--precision", choices=PRECISIONS, default=FP32, help="how weights are stored (default: fp32)")
    add("--overwrite", action="store_true", help="replace a model that an earlier call wrote")
    args = parser.parse_args(arguments)
    try:
        check_replaceable(args.out, args.overwrite, ours=is_model_file(args.out))
    except ValueError as error:
        parser.error(f"--out: {error}")
    return run_command("export.onnx", lambda: _export(args))


def _export(args: argparse.Namespace) -> int:
    found = write_model(args.bundle, args.out, args.precision, args.overwrite)
    print_line(
        f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB; " + ", ".join(f"{n} {v:.2g}" for n, v in found.items())
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
