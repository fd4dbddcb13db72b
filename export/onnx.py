"""Exports a bundle as ONNX models, and checks that they compute what torch computes.

    python -m export.onnx --out exported
    python -m export.onnx --bundle runs/mine --out exported --overwrite

Half the size, the same pictures; a quarter and several times as fast, calibrated on your own faces; one file for both:

    python -m export.onnx --out exported --precision fp16
    python -m export.onnx --out exported --precision int8 --faces celeba128_train.zip
    python -m export.onnx --out exported --fused

It writes encoder.onnx, generator.onnx, feedback.onnx for a bundle with learned feedback, and export.json: where they
come from, and their largest difference from torch at batch 1, 2 and 5. Models that differ by more than 1e-4 (images of
1024 px: 1e-3) are not written. Smaller ones are made from models that passed, and compared with them: size, speed,
LPIPS and identity are printed, and written to export.json (seconds to timing.json); a loss of more than 0.01 in LPIPS
is refused. --fused adds upsample.onnx, from a face straight to its candidates, without the passes of feedback.
`python -m export.run` runs the models without torch; docs/deploy.md shows how other programs do.

The exit status is 0 if all was written, 1 if not, and 2 if the command itself was wrong.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from data.command import complain, reason_of, say
from data.report import write_json
from export.fused import fuse
from export.graphs import OPSET, write_encoder, write_feedback, write_generator
from export.metadata import BOUNDARIES, ENCODER, FEEDBACK, FORMAT, GENERATOR, REPORT, TIMING, UPSAMPLE
from export.parity import check, largest_differences, tolerances
from export.precision import FP16, FP32, INT8, PRECISIONS, quantize, store_half
from export.quality import (
    calibration,
    check_quality,
    compare,
    feedback_calibration,
    feedback_holds,
    seconds_per_face,
    sharp_faces,
)
from export.session import load_models
from models.bundle import DEFAULT_BUNDLE, Bundle, load_bundle
from models.checkpoints import sha256_of

MODELS = (ENCODER, GENERATOR)
TIMED = {ENCODER: "encode", GENERATOR: "generate", FEEDBACK: "correct"}
FILES = (*MODELS, FEEDBACK, UPSAMPLE, REPORT, TIMING)  # all that an export may write


def export_bundle(
    bundle: Bundle,
    out: Path,
    overwrite: bool = False,
    *,
    precision: str = FP32,
    faces: str | Path | None = None,
    fused: bool = False,
    boundaries: Path | None = None,
) -> dict[str, Any]:
    """Writes a bundle as ONNX models, if they agree with torch; otherwise nothing.

    Args:
        bundle: On the CPU.
        out: Folder that gets encoder.onnx, generator.onnx, feedback.onnx where there is feedback, and export.json.
        overwrite: Replace those of an earlier export.
        precision: One of `export.precision.PRECISIONS`.
        faces: A zip or a folder of faces to calibrate and measure smaller models with; those that the bundle's
            generator draws if None.
        fused: Write upsample.onnx as well.
        boundaries: Folder with the boundaries of the bundle's generator, which go along; may be absent.

    Returns:
        The content of export.json, and for smaller models "seconds", the content of timing.json.

    Raises:
        ValueError: If the files exist and are not to be replaced.
        FileNotFoundError: If there are no such faces.
        ParityError: If the models differ from torch by more than is allowed.
        QualityError: If smaller models lose more than is allowed.
    """
    present = [name for name in FILES if os.path.lexists(out / name)]
    if present and not overwrite:
        raise ValueError(f"{out}: {', '.join(present)} exists; --overwrite replaces it, --out names another place")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as holder:
        partial = Path(holder)
        write_encoder(bundle, partial)
        write_generator(bundle, partial)
        write_feedback(bundle, partial)
        found = largest_differences(bundle, load_models(partial))
        check(found, bundle.resolution)
        smaller = {} if precision == FP32 else _shrink(bundle, partial, precision, faces)
        if fused:
            onnx.save(fuse(*(onnx.load(partial / name) for name in MODELS)), partial / UPSAMPLE)
        seconds = smaller.pop("seconds", None)
        report = _report(bundle, partial, found) | {"precision": {"name": precision, **smaller}}
        write_json(report, partial / REPORT)
        if seconds is not None:
            write_json(seconds, partial / TIMING)
        for name in FILES:
            if (partial / name).exists():
                (partial / name).replace(out / name)
            else:  # of an earlier export, which had more
                (out / name).unlink(missing_ok=True)
        copy_boundaries(boundaries, out / BOUNDARIES)
    return report if seconds is None else report | {"seconds": seconds}


def copy_boundaries(source: Path | None, target: Path) -> None:
    """Takes the boundaries of a bundle along, in place of those of an earlier export.

    Args:
        source: Their folder, which may be absent.
        target: The folder that gets them; goes where there are none.
    """
    for path in target.glob("*.npz"):
        path.unlink()
    if source is not None and source.is_dir():
        target.mkdir(exist_ok=True)
        for path in sorted(source.glob("*.npz")):
            shutil.copy(path, target)
    elif target.is_dir() and not any(target.iterdir()):
        target.rmdir()


def _shrink(bundle: Bundle, folder: Path, precision: str, source: str | Path | None) -> dict[str, Any]:
    """Replaces float32 models by smaller ones.

    Returns:
        What they lose, see `export.quality.compare`; "bytes" before; "seconds" per face.
    """
    before = load_models(folder)
    calibrate_on, measure_on = sharp_faces(bundle, source)
    names = [name for name in TIMED if (folder / name).exists()]
    made = {name: onnx.load(folder / name) for name in names}
    if precision == INT8:
        made[ENCODER] = quantize(made[ENCODER], calibration(before, calibrate_on))
    small = folder / "small"
    small.mkdir()
    for name, model in made.items():
        onnx.save(store_half(model), small / name)
    after = load_models(small)
    found = compare(before, after, measure_on)
    if FEEDBACK in made:
        found["feedback"] = FP16
        if precision == INT8:
            half = (small / FEEDBACK).read_bytes()
            model = quantize(onnx.load(folder / FEEDBACK), feedback_calibration(before, calibrate_on))
            onnx.save(store_half(model), small / FEEDBACK)
            smallest = compare(before, load_models(small), measure_on)
            if feedback_holds(found, smallest):
                found = smallest | {"feedback": INT8}
            else:
                (small / FEEDBACK).write_bytes(half)
        after = load_models(small)
    check_quality(found, precision)
    found["bytes_fp32"] = {name: (folder / name).stat().st_size for name in names}
    found["seconds"] = seconds_per_face(before, after)
    found["faces_from"] = "the bundle's generator" if source is None else Path(source).name
    for name in names:
        (small / name).replace(folder / name)
    return found


def _report(bundle: Bundle, folder: Path, found: dict[str, dict[str, float]]) -> dict[str, Any]:
    packages = ("torch", "onnx", "onnxruntime")
    return {
        "format": FORMAT,
        "bundle": {"name": bundle.name, "hash": bundle.hash},
        "resolution": bundle.resolution,
        "lr_sizes": list(bundle.lr_sizes),
        "canvas": bundle.encoder.canvas,
        "num_ws": bundle.encoder.num_ws,
        "w_dim": bundle.encoder.w_dim,
        "noise_dim": bundle.encoder.noise_dim,
        "passes": bundle.encoder.passes(None),
        "feedback_canvas": 0 if bundle.encoder.feedback is None else bundle.encoder.feedback.canvas,
        "licence": bundle.info["licence"],
        "training_data": bundle.info["training_data"],
        "opset": OPSET,
        "largest_difference": found,
        "tolerance": {name: value for name, value in tolerances(bundle.resolution).items() if name in found},
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in (folder / name for name in (*MODELS, FEEDBACK, UPSAMPLE))
            if path.exists()
        },
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: Command line without the program's name; that of the process if None.

    Returns:
        The exit status: 0 if all was written, 1 if not.
    """
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m export.onnx",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--bundle", metavar="DIR", default=str(DEFAULT_BUNDLE), help="what to export (default: bundles/celeba64)")
    add("--out", metavar="DIR", required=True, help="where the models go")
    add("--precision", choices=PRECISIONS, default=FP32, help="fp16 stores, int8 computes with less (default: fp32)")
    add("--faces", metavar="PATH", help="zip or folder of faces for fp16 and int8 (default: the generator's own)")
    add("--fused", action="store_true", help="write upsample.onnx as well: both in one, without feedback")
    add("--overwrite", action="store_true", help="replace the models of an earlier call")
    args = parser.parse_args(arguments)
    for name in ("bundle", "out"):
        if not getattr(args, name):
            parser.error(f"--{name}: expected a folder, got an empty name")
    if args.faces is not None and args.precision == FP32:
        parser.error("--faces: float32 models need none; give --precision int8 or fp16 with it")
    try:
        report = export_bundle(
            load_bundle(args.bundle),
            Path(args.out),
            args.overwrite,
            precision=args.precision,
            faces=args.faces,
            fused=args.fused,
            boundaries=Path(args.bundle) / BOUNDARIES,
        )
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        complain(f"{args.bundle} was not exported: {reason_of(error)}")
        return 1
    for name, details in report["files"].items():
        say(f"{name}: {details['bytes'] / 1e6:.1f} MB")
    for name, by_batch in report["largest_difference"].items():
        differences = ", ".join(f"{value:.1e} at batch {batch}" for batch, value in by_batch.items())
        say(f"{name}: largest difference from torch {differences}; allowed {report['tolerance'][name]:g}")
    if args.fused and report["passes"]:
        say(f"{UPSAMPLE}: without the {report['passes']} passes of learned feedback that follow {ENCODER} by default")
    if args.precision != FP32:
        _tell_of_precision(report["precision"], report["seconds"], report["files"])
    say(f"Wrote {args.out}; run it with python -m export.run INPUT --model {args.out}")
    return 0


def _tell_of_precision(found: dict[str, Any], seconds: dict[str, Any], files: dict[str, Any]) -> None:
    """Prints what smaller models save and lose."""
    for name in found["bytes_fp32"]:
        part = TIMED[name]
        share = files[name]["bytes"] / found["bytes_fp32"][name]
        fp32, this = (1000 * seconds[part][which] for which in ("fp32", "this"))
        say(f"{name}: {share:.2f} of the size, {this:.1f} ms a face for {fp32:.1f} ms ({fp32 / this:.1f}x)")
    for name in ("lpips", "identity"):
        if found[name]:
            values = f"{found[name]['fp32']:.4f} before, {found[name]['this']:.4f} now"
            say(f"{name} on {found['faces']} faces at {found['lr_sizes']} px ({found['faces_from']}): {values}")
    for reason in found.get("missing", []):
        complain(f"note: not measured: {reason}")
    say(f"pixels differ by {255 * found['pixels_rms']:.2f} of 255 (root mean square)")


if __name__ == "__main__":
    sys.exit(main())
