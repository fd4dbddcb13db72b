"""Makes the page that upsamples faces in the browser: one folder of files, for any static server.

    npm ci --ignore-scripts --prefix web          # onnxruntime-web, once; needs the network
    python -m export.page --out build/web
    python -m http.server --directory build/web 8000

`make web` is the first two. The folder holds the page (web/), onnxruntime-web's files, the model of a bundle (stored as
float16 unless told otherwise: half of what visitors have to fetch, the same pictures), the downscaling operator for
their photos, the directions of the edits, and the samples. A folder made earlier is replaced; its model is kept where
the bundle has not changed.

The exit status is 0 if all was written, 1 if not, and 2 if the command itself was wrong.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from data.console import path_option, print_line, run_command
from data.files import ROOT, check_folder, owned_folder
from editing.direction import FOLDER, names_in, read_direction
from export.graph import resize_matrix
from export.onnx import MODEL, trace, write_model
from export.onnxruntime_backend import FORMAT, read_info
from export.quantise import FP16, PRECISIONS
from models.bundle_info import DEFAULT_BUNDLE
from models.checkpoints import sha256_of

PAGE, SAMPLES = ROOT / "web", ROOT / "samples"
RUNTIME = PAGE / "node_modules" / "onnxruntime-web"
# What a browser fetches of onnxruntime-web for its WebAssembly provider.
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
PAGE_SUFFIXES = {".html", ".css", ".js", ".svg"}
DOWNSCALE, INFO = "downscale.onnx", "model.json"
EDITS, EDITS_FORMAT = "edits.json", "amortized-pulse/page-edits/1"
_DIGITS = 6  # of a direction's numbers: more than a picture of 8 bit shows


class DownscaleGraph(nn.Module):
    """The downscaling operator for pictures of any size, as the page applies it to photos."""

    def forward(self, planes: Tensor, pixels: Tensor) -> Tensor:
        """Downscales planes (c, n, n) in [-1, 1] to (c, s, s), rounded to 8 bit; pixels (s,) only says how many."""
        down = resize_matrix(planes.shape[2], pixels.shape[0])  # (s, n)
        return ((down @ planes @ down.T).clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1


def downscale_model() -> onnx.ModelProto:
    """Traces `DownscaleGraph` as an ONNX model of a few kilobytes."""
    size, lr_size = torch.export.Dim("size", min=4, max=2**14), torch.export.Dim("lr_size", min=4, max=2**10)
    example = {"planes": torch.zeros(3, 40, 40), "pixels": torch.zeros(13)}
    shapes = {"planes": {0: torch.export.Dim("planes", min=1, max=4), 1: size, 2: size}, "pixels": {0: lr_size}}
    model = trace(DownscaleGraph(), "downscale", example, shapes, ["lr"])
    model.doc_string = "Downscales square pictures: bicubic with a = -0.5, antialiased, reflected borders, 8 bit."
    return model


def assemble(
    model: Path, edits: Path, out: Path, runtime: Path = RUNTIME, samples: Path | None = SAMPLES
) -> dict[str, int]:
    """Puts the page together in a folder that is empty or not there.

    Args:
        model: What `python -m export.onnx` wrote.
        edits: Folder with the edit directions of its bundle; may be absent.
        out: The folder.
        runtime: The npm package onnxruntime-web.
        samples: Folder of PNG files to offer, None for none.

    Returns:
        Bytes by file.

    Raises:
        FileNotFoundError: If the runtime is missing; says how to get it.
    """
    missing = [name for name in RUNTIME_FILES if not (runtime / "dist" / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"Expected {', '.join(missing)} in {runtime / 'dist'}, not found; npm ci --ignore-scripts --prefix web "
            "fetches onnxruntime-web (needs npm and the network)."
        )
    for name in ("models", "ort", "samples"):
        (out / name).mkdir(parents=True)
    for path in sorted(PAGE.iterdir()):
        if path.suffix in PAGE_SUFFIXES:
            shutil.copy(path, out / path.name)
    for name in RUNTIME_FILES:
        shutil.copy(runtime / "dist" / name, out / "ort" / name)
    shutil.copy(model, out / "models" / MODEL)
    onnx.save(downscale_model(), out / "models" / DOWNSCALE)
    _write_json(_describe(out / "models"), out / "models" / INFO)
    _write_json(edits_of(edits), out / "models" / EDITS)
    pictures = sorted(samples.glob("*.png")) if samples else []
    for path in pictures:
        shutil.copy(path, out / "samples" / path.name)
    _write_json([path.name for path in pictures], out / "samples" / "index.json")
    return {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}


def _write_json(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="ascii")  # on one line: half as long


def _describe(models: Path) -> dict[str, Any]:
    """What the page reads before it fetches a model: its metadata, and size and sha256 of each file."""
    props = {prop.key: prop.value for prop in onnx.load(models / MODEL).metadata_props}
    about = {"format": FORMAT, **asdict(read_info(props, models / MODEL))}
    paths = (models / MODEL, models / DOWNSCALE)
    return about | {"files": {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in paths}}


def edits_of(folder: Path) -> dict[str, Any]:
    """Turns the edit directions in a folder, which may be absent, into what the page reads."""
    directions = [read_direction(folder / f"{name}.npz") for name in names_in(folder)]
    return {
        "format": EDITS_FORMAT,
        "edits": [{"name": d.name, "steps": d.steps.round(_DIGITS).tolist()} for d in directions],
    }


def make_page(
    bundle: Path, out: Path, precision: str = FP16, model: Path | None = None, overwrite: bool = False
) -> dict[str, int]:
    """Exports a bundle and puts the page together, complete or not at all.

    Args:
        bundle: The bundle's folder.
        out: Gets the page, see `data.files.owned_folder`.
        precision: Of the model, see `export.quantise`.
        model: An exported model to take instead of making one.
        overwrite: Whether a page that was made earlier may be replaced.

    Returns:
        Bytes by file.

    Raises:
        ValueError: If something else lies at `out`, or the bundle cannot be exported.
        FileNotFoundError: If the runtime is missing.
    """
    earlier = out / "models" / MODEL
    with owned_folder(out, overwrite) as partial, tempfile.TemporaryDirectory() as holder:
        if model is None:
            model = Path(holder) / MODEL
            if _made_of(earlier, bundle, precision):
                shutil.copy(earlier, model)
            else:
                write_model(bundle, model, precision)
        return assemble(model, bundle / FOLDER, partial)


def _made_of(model: Path, bundle: Path, precision: str) -> bool:
    """Whether a model of an earlier page is what an export of the bundle would give."""
    try:
        found = {prop.key: prop.value for prop in onnx.load(model).metadata_props}
    except Exception:  # a damaged file is made anew, whatever is wrong with it
        return False
    wanted = {"format": FORMAT, "bundle_sha256": sha256_of(bundle / "bundle.json"), "precision": precision}
    return wanted.items() <= found.items()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; the exit status is 0 if all was written, 1 if not."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m export.page", None, description, rest, formatter_class=raw)
    add = parser.add_argument
    add("--bundle", metavar="DIR", type=Path, default=DEFAULT_BUNDLE, help="what to export (default: bundles/celeba64)")
    add("--model", metavar="FILE", type=Path, help="an exported model to take as it is")
    add("--precision", choices=PRECISIONS, default=FP16, help="of the model that is made (default: fp16)")
    add("--out", metavar="DIR", type=path_option, required=True, help="where the page goes")
    add("--overwrite", action="store_true", help="replace a page that an earlier call made")
    args = parser.parse_args(arguments)
    try:
        check_folder(args.out, args.overwrite)
    except ValueError as error:
        parser.error(f"--out: {error}")
    return run_command("export.page", lambda: _make(args))


def _make(args: argparse.Namespace) -> int:
    files = make_page(args.bundle, args.out, args.precision, args.model, args.overwrite)
    for name, size in sorted(files.items(), key=lambda item: -item[1])[:4]:
        print_line(f"{name}: {size / 1e6:.1f} MB")
    print_line(f"page weight {sum(files.values()) / 1e6:.1f} MB; look at it: python -m http.server -d {args.out} 8000")
    return 0


if __name__ == "__main__":
    sys.exit(main())
