"""Makes the page that upsamples faces in the browser: one folder of files, for any static server.

    npm ci --ignore-scripts --prefix web          # onnxruntime-web, once; needs the network
    python -m export.page --out build/web
    python -m http.server --directory build/web 8000

`make web` is the first two. The folder holds the page (web/), onnxruntime-web's files, the model of a bundle (its large
weights as int8 unless told otherwise), the downscaling operator and the face detector for photos, the directions of the
edits, the samples, and an example made of one of them. What is large is packed by gzip: no server has to do it. A
folder made earlier is replaced; its model is kept where the bundle has not changed.

The exit status is 0 if all was written, 1 if not, and 2 if the command itself was wrong.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image
from torch import Tensor, nn

from data.console import path_option, print_line, run_command
from data.figures import disagreement, heat
from data.files import ROOT, check_folder, owned_folder
from data.image_io import read_image, to_picture
from data.noise import face_noise
from editing.direction import FOLDER, names_in, read_direction
from export.detector import detector_model
from export.graph import resize_matrix
from export.onnx import MODEL, trace, write_model
from export.onnxruntime_backend import FORMAT, OnnxBackend
from export.quantise import INT8, PRECISIONS
from models.bundle_info import DEFAULT_BUNDLE
from models.checkpoints import sha256_of

PAGE, SAMPLES = ROOT / "web", ROOT / "samples"
RUNTIME = PAGE / "node_modules" / "onnxruntime-web"
RUNTIME_MODULES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs")
RUNTIME_WASM = "ort-wasm-simd-threaded.wasm"
PAGE_SUFFIXES = {".html", ".css", ".js", ".svg"}
MODEL_CARD = ROOT / "docs" / "model_card.md"
DOWNSCALE, DETECTOR, INFO, OFFLINE = "downscale.onnx", "detector.onnx", "model.json", "offline.json"
PACKED = ".gzip"  # servers unpack .gz on their own account, some of them
EDITS, EDITS_FORMAT = "edits.json", "amortized-pulse/page-edits/1"
LIMITS = "familiarity.npz"  # see pipeline.familiarity, which is further up
EXAMPLE = "face-2-16px.png"
MAP_MAXIMUM = 0.16  # as in web/pixels.js
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
    model: Path, bundle: Path, out: Path, runtime: Path = RUNTIME, samples: Path = SAMPLES, code: str | None = None
) -> dict[str, int]:
    """Puts the page together in a folder that is empty or not there.

    Args:
        model: What `python -m export.onnx` wrote.
        bundle: The bundle that it is of, for its edit directions and limits, if there are any.
        out: The folder.
        runtime: The npm package onnxruntime-web.
        samples: Folder of PNG files to offer.
        code: Address of the code, for a link.

    Returns:
        Bytes by file.

    Raises:
        FileNotFoundError: If the runtime is missing; says how to get it.
    """
    dist = runtime / "dist"
    missing = [name for name in (*RUNTIME_MODULES, RUNTIME_WASM) if not (dist / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"Expected {', '.join(missing)} in {dist}, not found; npm ci --ignore-scripts --prefix web "
            "fetches onnxruntime-web (needs npm and the network)."
        )
    for name in ("models", "ort", "samples", "example"):
        (out / name).mkdir(parents=True)
    pages = [path for path in PAGE.iterdir() if path.suffix in PAGE_SUFFIXES]
    for path, folder in [(p, "") for p in pages] + [(dist / name, "ort") for name in RUNTIME_MODULES]:
        shutil.copy(path, out / folder / path.name)
    models = {
        RUNTIME_WASM: (dist / RUNTIME_WASM).read_bytes(),
        DOWNSCALE: downscale_model().SerializeToString(),
        DETECTOR: detector_model().SerializeToString(),
        MODEL: model.read_bytes(),
    }
    packed = {name: _pack(content, out / "models" / name) for name, content in models.items()}
    backend = OnnxBackend(model, threads=1)
    card = MODEL_CARD.read_text(encoding="utf-8")
    has_card = f"`{backend.about.name}`" in card
    if has_card:
        (out / "model-card.txt").write_text(card, encoding="utf-8")
    about = {"format": FORMAT, **asdict(backend.about), "files": packed}
    about |= {"code": code, "card": has_card, "limits": _limits_of(bundle / LIMITS)}
    _write_json(about, out / "models" / INFO)
    _write_json(edits_of(bundle / FOLDER), out / "models" / EDITS)
    pictures = sorted(samples.glob("*.png"))
    for path in pictures:
        shutil.copy(path, out / "samples" / path.name)
    _write_json([path.name for path in pictures], out / "samples" / "index.json")
    _write_example(backend, samples / EXAMPLE, out / "example")
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    kept = [str(path.relative_to(out)) for path in files if path.suffix != PACKED]
    _write_json(["./", *kept], out / OFFLINE)
    return {str(path.relative_to(out)): path.stat().st_size for path in files}


def _write_json(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="ascii")  # on one line: half as long


def _pack(content: bytes, path: Path) -> dict[str, Any]:
    """Writes a file packed, and says what the page has to expect of it."""
    packed = gzip.compress(content, 9, mtime=0)
    path.with_name(path.name + PACKED).write_bytes(packed)
    return {"bytes": len(packed), "sha256": hashlib.sha256(packed).hexdigest()}


def _limits_of(path: Path) -> dict[str, list[float]] | None:
    """What photos do not exceed in residual, by size; None where that was not measured."""
    if not path.is_file():
        return None
    with np.load(path) as content:
        return {name: content[name].tolist() for name in ("sizes", "residuals")}


def _write_example(backend: OnnxBackend, path: Path, out: Path) -> None:
    """Writes what the page shows at first: an input, its samples, and where they differ."""
    lr = read_image(path)[None]
    images = backend.sample(lr, face_noise(lr, 4, backend.about.noise_dim, seed=0)).images[0]
    size = (backend.about.resolution,) * 2
    to_picture(lr[0]).resize(size, Image.Resampling.NEAREST).save(out / "input.png")
    for i, image in enumerate(images, 1):
        to_picture(image).save(out / f"{i}.png")
    heat(disagreement(np.asarray(images)), MAP_MAXIMUM).save(out / "disagreement.png")


def edits_of(folder: Path) -> dict[str, Any]:
    """Turns the edit directions in a folder, which may be absent, into what the page reads."""
    directions = [read_direction(folder / f"{name}.npz") for name in names_in(folder)]
    return {
        "format": EDITS_FORMAT,
        "edits": [{"name": d.name, "steps": d.steps.round(_DIGITS).tolist()} for d in directions],
    }


def make_page(
    bundle: Path,
    out: Path,
    precision: str = INT8,
    model: Path | None = None,
    overwrite: bool = False,
    code: str | None = None,
) -> dict[str, int]:
    """Exports a bundle and puts the page together, complete or not at all.

    Args:
        bundle: The bundle's folder.
        out: Gets the page, see `data.files.owned_folder`.
        precision: Of the model, see `export.quantise`.
        model: An exported model to take instead of making one.
        overwrite: Whether a page that was made earlier may be replaced.
        code: Address of the code, for a link.

    Returns:
        Bytes by file.

    Raises:
        ValueError: If something else lies at `out`, or the bundle cannot be exported.
        FileNotFoundError: If the runtime is missing.
    """
    earlier = out / "models" / (MODEL + PACKED)
    with owned_folder(out, overwrite) as partial, tempfile.TemporaryDirectory() as holder:
        if model is None:
            model = Path(holder) / MODEL
            if not _unpack(earlier, model) or not _made_of(model, bundle, precision):
                write_model(bundle, model, precision)
        return assemble(model, bundle, partial, code=code)


def _unpack(packed: Path, path: Path) -> bool:
    """Unpacks the model of an earlier page, if there is one."""
    try:
        path.write_bytes(gzip.decompress(packed.read_bytes()))
    except (OSError, EOFError, zlib.error):
        return False
    return True


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
    add("--precision", choices=PRECISIONS, default=INT8, help="of the model that is made (default: int8)")
    add("--code", metavar="URL", help="address of the code, which the page links to (default: no link)")
    add("--out", metavar="DIR", type=path_option, required=True, help="where the page goes")
    add("--overwrite", action="store_true", help="replace a page that an earlier call made")
    args = parser.parse_args(arguments)
    try:
        check_folder(args.out, args.overwrite)
    except ValueError as error:
        parser.error(f"--out: {error}")
    return run_command("export.page", lambda: _make(args))


def _make(args: argparse.Namespace) -> int:
    files = make_page(args.bundle, args.out, args.precision, args.model, args.overwrite, args.code)
    for name, size in sorted(files.items(), key=lambda item: -item[1])[:4]:
        print_line(f"{name}: {size / 1e6:.1f} MB")
    print_line(f"page weight {sum(files.values()) / 1e6:.1f} MB; look at it: python -m http.server -d {args.out} 8000")
    return 0


if __name__ == "__main__":
    sys.exit(main())
