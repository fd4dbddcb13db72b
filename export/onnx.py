"""Exports a bundle as ONNX models, and checks that they compute what torch computes.

    python -m export.onnx --out exported
    python -m export.onnx --bundle runs/mine --out exported --overwrite

It writes encoder.onnx, generator.onnx and export.json: where they come from, and their largest difference from torch at
batch 1, 2 and 5. Models that differ by more than 1e-4 (images of 1024 px: 1e-3) are not written. `python -m export.run`
runs them without torch; docs/deploy.md shows how other programs do.

The exit status is 0 if all was written, 1 if not, and 2 if the command itself was wrong.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.command import complain, reason_of, say
from data.report import write_json
from export.graphs import OPSET, write_encoder, write_generator
from export.metadata import ENCODER, FORMAT, GENERATOR, REPORT
from export.parity import check, largest_differences, tolerances
from export.session import load_models
from models.bundle import DEFAULT_BUNDLE, Bundle, load_bundle
from models.weights import sha256_of

FILES = (ENCODER, GENERATOR, REPORT)


def export_bundle(bundle: Bundle, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Writes a bundle as ONNX models, if they agree with torch; otherwise nothing.

    Args:
        bundle: On the CPU.
        out: Folder that gets encoder.onnx, generator.onnx and export.json.
        overwrite: Replace those of an earlier export.

    Returns:
        The content of export.json.

    Raises:
        ValueError: If the files exist and are not to be replaced.
        ParityError: If the models differ from torch by more than is allowed.
    """
    present = [name for name in FILES if os.path.lexists(out / name)]
    if present and not overwrite:
        raise ValueError(f"{out}: {', '.join(present)} exists; --overwrite replaces it, --out names another place")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out) as holder:
        partial = Path(holder)
        write_encoder(bundle, partial)
        write_generator(bundle, partial)
        found = largest_differences(bundle, load_models(partial))
        check(found, bundle.resolution)
        report = _report(bundle, partial, found)
        write_json(report, partial / REPORT)
        for name in FILES:
            (partial / name).replace(out / name)
    return report


def _report(bundle: Bundle, folder: Path, found: dict[str, dict[str, float]]) -> dict[str, Any]:
    packages = ("torch", "onnx", "onnxruntime")
    return {
        "format": FORMAT,
        "bundle": {"name": bundle.name, "hash": bundle.hash},
        "resolution": bundle.resolution,
        "lr_sizes": list(bundle.lr_sizes),
        "canvas": bundle.encoder.canvas,
        "licence": bundle.info["licence"],
        "training_data": bundle.info["training_data"],
        "opset": OPSET,
        "largest_difference": found,
        "tolerance": tolerances(bundle.resolution),
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
            for name in (ENCODER, GENERATOR)
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
    add("--overwrite", action="store_true", help="replace the models of an earlier call")
    args = parser.parse_args(arguments)
    for name in ("bundle", "out"):
        if not getattr(args, name):
            parser.error(f"--{name}: expected a folder, got an empty name")
    try:
        report = export_bundle(load_bundle(args.bundle), Path(args.out), args.overwrite)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        complain(f"{args.bundle} was not exported: {reason_of(error)}")
        return 1
    for name, details in report["files"].items():
        say(f"{name}: {details['bytes'] / 1e6:.1f} MB")
    for name, by_batch in report["largest_difference"].items():
        differences = ", ".join(f"{value:.1e} at batch {batch}" for batch, value in by_batch.items())
        say(f"{name}: largest difference from torch {differences}; allowed {report['tolerance'][name]:g}")
    say(f"Wrote {args.out}; run it with python -m export.run INPUT --model {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
