"""Makes the page that upsamples faces in the browser: one folder of files, for any static server.

    npm ci --ignore-scripts --prefix web          # onnxruntime-web, once; needs the network
    python -m export.page --out build/web
    python -m http.server --directory build/web 8000

`make web` is the first two. The folder holds the page (web/), onnxruntime-web's files, the models of a bundle (stored
as float16 unless told otherwise: half of what visitors have to fetch, the same pictures), the directions of its edits,
and the samples. A folder made earlier is replaced; its models are kept where the bundle has not changed.

The exit status is 0 if all was written, 1 if not, and 2 if the command itself was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.command import complain, reason_of, say
from editing.boundary import names_in, read_boundary
from export.metadata import BOUNDARIES, ENCODER, FEEDBACK, FORMAT, GENERATOR, REPORT
from export.precision import FP16, PRECISIONS

ROOT = Path(__file__).resolve().parents[1]
PAGE, SAMPLES = ROOT / "web", ROOT / "samples"
RUNTIME = PAGE / "node_modules" / "onnxruntime-web"
# What a browser fetches of onnxruntime-web for its WebAssembly provider.
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
PAGE_SUFFIXES = {".html", ".css", ".js", ".svg"}
EDITS, EDITS_FORMAT = "boundaries.json", "amortized-pulse/page-boundaries/2"
_DIGITS = 6  # of a direction's numbers: more than a picture of 8 bit shows


def assemble(models: Path, out: Path, runtime: Path = RUNTIME, samples: Path | None = SAMPLES) -> dict[str, int]:
    """Puts the page together.

    Args:
        models: An export, with boundaries/ where there are edits.
        out: The folder; must not exist.
        runtime: The npm package onnxruntime-web.
        samples: Folder of PNG files to offer, None for none.

    Returns:
        Bytes by file, what a browser fetches at a first visit with one face.

    Raises:
        FileNotFoundError: If the runtime is missing; says how to get it.
    """
    missing = [name for name in RUNTIME_FILES if not (runtime / "dist" / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"Expected {', '.join(missing)} in {runtime / 'dist'}, not found; npm ci --ignore-scripts --prefix web "
            "fetches onnxruntime-web (needs npm and the network)."
        )
    (out / "models").mkdir(parents=True)
    (out / "ort").mkdir()
    (out / "samples").mkdir()
    for path in sorted(PAGE.iterdir()):
        if path.suffix in PAGE_SUFFIXES:
            shutil.copy(path, out / path.name)
    for name in RUNTIME_FILES:
        shutil.copy(runtime / "dist" / name, out / "ort" / name)
    for name in _model_files(models):
        shutil.copy(models / name, out / "models" / name)
    edits = json.dumps(edits_of(models / BOUNDARIES), separators=(",", ":"))  # on one line: half as long
    (out / "models" / EDITS).write_text(edits, encoding="ascii")
    pictures = sorted(samples.glob("*.png")) if samples else []
    for path in pictures:
        shutil.copy(path, out / "samples" / path.name)
    (out / "samples" / "index.json").write_text(json.dumps([path.name for path in pictures]) + "\n")
    return {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}


def _model_files(folder: Path) -> list[str]:
    """Names what the page needs of an export."""
    files = json.loads((folder / REPORT).read_bytes())["files"]
    return [name for name in (ENCODER, GENERATOR, FEEDBACK) if name in files] + [REPORT]


def edits_of(folder: Path) -> dict[str, Any]:
    """Turns boundaries into what the page reads.

    Args:
        folder: With one NAME.npz each, or absent.

    Returns:
        "format", and "boundaries": name, layers (first, end) and steps of each: one standard deviation, a list of D
        numbers for every layer, or a single one for all.

    Raises:
        ValueError: If one is damaged.
    """
    boundaries = [read_boundary(folder / f"{name}.npz") for name in names_in(folder)]
    return {
        "format": EDITS_FORMAT,
        "boundaries": [
            {
                "name": b.name,
                "layers": list(b.layers),
                "steps": np.atleast_2d(b.direction).round(_DIGITS).tolist(),
            }
            for b in boundaries
        ],
    }


def make_page(bundle: Path, out: Path, precision: str = FP16, models: Path | None = None) -> dict[str, int]:
    """Exports a bundle and puts the page together, complete or not at all.

    Args:
        bundle: The bundle's folder.
        out: Gets the page; a page made earlier is replaced.
        precision: Of the models, see `export.precision`.
        models: An export to take instead of making one.

    Returns:
        Bytes by file.

    Raises:
        ValueError: If something else lies at `out`, or the bundle cannot be exported.
        FileNotFoundError: If the runtime is missing.
    """
    if os.path.lexists(out) and not (out.is_dir() and (_is_page(out) or not any(out.iterdir()))):
        raise ValueError(f"{out} exists and is no page of ours; move it away, or name another place with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=out.parent) as holder:
        if models is None:
            models = Path(holder) / "models"
            _export(bundle, models, precision, out / "models")
        files = assemble(models, Path(holder) / "page")
        if out.exists():
            out.replace(Path(holder) / "old")
        (Path(holder) / "page").replace(out)
    return files


def _is_page(folder: Path) -> bool:
    return (folder / "models" / REPORT).is_file() and (folder / "app.js").is_file()


def _export(bundle_path: Path, folder: Path, precision: str, earlier: Path) -> None:
    """Exports a bundle, or takes the models of an earlier page if they would be the same."""
    from models.bundle import load_bundle
    from models.checkpoints import sha256_of

    try:
        report = json.loads((earlier / REPORT).read_bytes())
        kept = (report["format"], report["bundle"]["hash"], report["precision"]["name"])
        same = kept == (FORMAT, sha256_of(bundle_path / "bundle.json"), precision)
        names = _model_files(earlier)
        same = same and "passes" in report  # those made before feedback was exported lack it
        same = same and all(sha256_of(earlier / n) == report["files"][n]["sha256"] for n in names[:-1])
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if same:
        folder.mkdir()
        for name in names:
            shutil.copy(earlier / name, folder / name)
        if (bundle_path / BOUNDARIES).is_dir():
            shutil.copytree(bundle_path / BOUNDARIES, folder / BOUNDARIES)
        return
    from export.onnx import export_bundle

    export_bundle(load_bundle(bundle_path), folder, precision=precision, boundaries=bundle_path / BOUNDARIES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: Command line without the program's name; that of the process if None.

    Returns:
        The exit status: 0 if all was written, 1 if not.
    """
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m export.page",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    bundle = ROOT / "bundles" / "celeba64"
    add("--bundle", metavar="DIR", type=Path, default=bundle, help="what to export (default: bundles/celeba64)")
    add("--models", metavar="DIR", type=Path, help="an export to take as it is, in place of a bundle")
    add("--precision", choices=PRECISIONS, default=FP16, help="of the models that are made (default: fp16)")
    add("--out", metavar="DIR", type=Path, required=True, help="where the page goes")
    args = parser.parse_args(arguments)
    try:
        files = make_page(args.bundle, args.out, args.precision, args.models)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        complain(f"the page was not made: {reason_of(error)}")
        return 1
    for name, size in sorted(files.items(), key=lambda item: -item[1])[:4]:
        say(f"{name}: {size / 1e6:.1f} MB")
    say(f"page weight {sum(files.values()) / 1e6:.1f} MB; look at it with python -m http.server -d {args.out} 8000")
    return 0


if __name__ == "__main__":
    sys.exit(main())
