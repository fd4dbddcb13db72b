"""Turns low-resolution faces into high-resolution ones without torch: onnxruntime, numpy and Pillow are enough.

The models come from `python -m export.onnx`; faces and files are those of infer.py:

    python -m export.run face.png --model exported
    python -m export.run samples --model exported --out demo --k 6 --seed 1 --overwrite

A sharp photo, downscaled to 16 px first; two threads; a GPU, where onnxruntime-gpu is installed:

    python -m export.run photo.jpg --model exported --downscale 16
    python -m export.run samples --model exported --threads 2
    python -m export.run samples --model exported --provider cuda

Edited, as with infer.py; the boundaries lie in exported/boundaries, where export.onnx puts those of the bundle:

    python -m export.run face.png --model exported --edit smile=+2 --edit bangs=-1 --edit-strip smile

For face.png it writes out/face/ with 1.png …, grid.png, input.png, report.json, latents.npz and timing.json, and
out/overview.png, as infer.py does. The same seed gives the same faces, but for single steps of 8 bit.

The exit status is 0 if everything was written, 1 if something was not (each face is named with the reason), 2 if the
command itself was wrong, and 130 after Ctrl-C, which leaves the faces that were finished.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from editing.boundary import FOLDER, apply_edits
from editing.command import (
    STRIP_FILE,
    Editing,
    add_edit_options,
    check_edit_options,
    read_editing,
    tell_of_edits,
    write_strip,
)

from data.command import (
    OVERVIEW_ROWS,
    Face,
    add_encoder_options,
    check_encoder_options,
    complain,
    line_of,
    low_resolution,
    reason_of,
    say,
    tell_of_encoder,
    until_interrupted,
    warn_of_crop,
    write_overview,
)
from data.files import check_folder, owned_folder
from data.image_io import find_images, from_uint8, to_uint8
from data.report import MAX_K, REPORT, folder_names, make_report, write_face, write_json
from data.taps import downscaling_errors, resize
from export.session import Models, find_provider, load_models


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: Command line without the program's name; that of the process if None.

    Returns:
        The exit status: 0 if everything was written, 1 if something was not, 130 after Ctrl-C.
    """
    return until_interrupted(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    _check(args, parser)
    found = find_images(args.inputs)
    for path, remark in found.skipped:
        complain(f"note: {path}: {remark}")
    for path, reason in found.problems:
        complain(f"{path}: {reason}")
    if not found.images:
        complain("nothing to do: no picture was found")
        return 1
    try:
        models = load_models(args.model, args.threads, args.provider)
        args.editing = read_editing(args, args.model / FOLDER, models.about.generator_sha256)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        complain(f"the models in {args.model} cannot be used: {reason_of(error)}")
        return 1
    smallest, largest = models.about.lr_sizes
    if args.downscale is not None and not smallest <= args.downscale <= largest:
        parser.error(f"--downscale: expected {smallest} to {largest} px for these models, got {args.downscale}")
    faces, failed = _upsample_all(found.images, models, args)
    finished = write_overview(faces, args.out, args.overwrite)
    return int(bool(found.problems) or failed > 0 or not finished)


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m export.run",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="pictures of one upright face each, or folders of them")
    add("--model", metavar="DIR", required=True, help="folder with encoder.onnx and generator.onnx")
    add("--out", metavar="DIR", default="out", help="where the results go (default: out)")
    add("--k", metavar="K", type=int, default=4, help=f"candidates per face, 1 to {MAX_K} (default: 4)")
    add("--seed", metavar="N", type=int, default=0, help="of all random choices, from 0 (default: 0)")
    add("--threads", metavar="N", type=int, default=0, help="of one operation; 0 means one per core (default: 0)")
    add("--provider", metavar="NAME", default="cpu", help="execution provider of onnxruntime, as cuda (default: cpu)")
    add("--downscale", metavar="PX", type=int, help="first downscale every picture to PX x PX, for larger photos")
    add_encoder_options(parser.add_argument_group("encoder"))
    add_edit_options(parser.add_argument_group("editing"), consistent=False)
    add("--overwrite", action="store_true", help="replace what an earlier call wrote, and nothing else")
    return parser


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Ends the program with status 2 if an option cannot be followed."""
    if not 1 <= args.k <= MAX_K:
        parser.error(f"--k: expected 1 to {MAX_K} candidates, got {args.k}")
    for name in ("seed", "threads"):
        if getattr(args, name) < 0:
            parser.error(f"--{name}: expected 0 or a larger number, got {getattr(args, name)}")
    for name in ("out", "model"):
        if not getattr(args, name):  # as from an unset variable; Path("") would be the current folder
            parser.error(f"--{name}: expected a folder, got an empty name")
        setattr(args, name, Path(getattr(args, name)))
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: expected a folder, {args.out} is a file; name another place")
    try:
        find_provider(args.provider)
    except ValueError as error:
        parser.error(f"--provider: {error}")
    try:
        check_encoder_options(args)
        check_edit_options(args)
    except ValueError as error:
        parser.error(str(error))


def _upsample_all(paths: list[Path], models: Models, args: argparse.Namespace) -> tuple[list[Face], int]:
    """Goes through the inputs, whatever happens to single ones.

    Returns:
        The first faces that were written, as many as the overview shows, and the number of inputs that failed.
    """
    faces: list[Face] = []
    failed = 0
    for path, name in zip(paths, folder_names(paths), strict=True):
        try:
            face = _upsample_one(path, args.out / name, models, args)
        except Exception as error:  # onnxruntime's exceptions have no common base
            failed += 1
            reason = reason_of(error)
            complain(reason if reason.startswith(f"{path}: ") else f"{path}: {reason}")
            continue
        say(line_of(path, face))
        if len(faces) < OVERVIEW_ROWS:
            faces.append(face)
    return faces, failed


def _upsample_one(path: Path, folder: Path, models: Models, args: argparse.Namespace) -> Face:
    """Reads one picture, draws its candidates and writes its folder."""
    check_folder(folder, args.overwrite, REPORT)  # before the work, and again after it
    start = time.perf_counter()
    given = low_resolution(path, models.about.lr_sizes, args.downscale)
    lr, (width, height) = given.image, given.origin
    warn_of_crop(path, width, height)
    read = time.perf_counter()
    # Every face has the same random numbers, so that it comes out the same alone and in company.
    rng = np.random.default_rng(args.seed)
    ws = models.encode(lr[None], args.k, rng, args.passes, args.temperature)[0]  # (k, L, D)
    before, editing = ws, args.editing
    ws = apply_edits(before, editing.edits)
    encoded = time.perf_counter()
    images = from_uint8(to_uint8(models.generate(ws)))  # (k, 3, R, R), as they are written
    generated = time.perf_counter()
    errors = downscaling_errors(images, lr).tolist()
    notes = {
        "input": path.name,
        "input_size": [width, height],
        "lr_size": lr.shape[-1],
        "resolution": models.about.resolution,
        "seed": args.seed,
        "bundle": {"name": models.about.name, "hash": models.about.bundle_sha256},
    }
    report = make_report(errors, notes)
    tell_of_encoder(report, args)
    tell_of_edits(report, editing, _visible(models, before, ws, lr.shape[-1], editing))
    with owned_folder(folder, args.overwrite, REPORT) as partial:
        write_face(partial, lr, images, ws, report)
        if editing.strip is not None:
            write_strip(editing.strip, before, models.generate, partial / STRIP_FILE)
        seconds = {"read": read - start, "encode": encoded - read, "generate": generated - encoded}
        seconds["write"] = time.perf_counter() - generated
        write_json({name: round(value, 4) for name, value in seconds.items()}, partial / "timing.json")
    return Face(folder.name, lr, images, errors, folder)


def _visible(models: Models, before: np.ndarray, after: np.ndarray, lr_size: int, editing: Editing) -> list[float]:
    """How much of the edits shows in the downscaled picture: root mean square in units of [0, 1] pictures, (k,)."""
    if not editing.edits:
        return []
    lr = [resize(models.generate(ws).clip(-1, 1), lr_size) for ws in (before, after)]
    return np.sqrt(np.square((lr[1] - lr[0]) / 2).mean(axis=(1, 2, 3))).tolist()


if __name__ == "__main__":
    sys.exit(main())
