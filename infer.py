"""Turns low-resolution faces into high-resolution ones: several candidates for each, which all downscale to it.

Faces as they are, from files and folders; each gets a folder of its own in out/:

    python infer.py face.png
    python infer.py samples --out demo

Six candidates, other random numbers, and the results of an earlier call replaced:

    python infer.py face.png --k 6 --seed 1 --overwrite

A sharp photo, downscaled to 16 px first, to see what can be told from so little:

    python infer.py photo.jpg --downscale 16

Candidates that explain the input better, by a short search, and the remainder added back in the end:

    python infer.py face.png --refine 10 --consistency exact

A noisy input, whose grains the learned feedback would follow; and candidates that differ less:

    python infer.py noisy.png --passes 0
    python infer.py face.png --temperature 0.5

PULSE as published, from random codes:

    python infer.py face.png --method pulse --start random --refine 100

The same candidates with a broader smile and no bangs, and a smile that keeps the downscaled picture as it is; the names
are those of the bundle's boundaries, the strengths standard deviations:

    python infer.py face.png --edit smile=+2 --edit bangs=-1
    python infer.py face.png --edit smile=+2 --edit-consistent --edit-strip smile

For face.png it writes
    out/face/grid.png      look at this one: the input, the candidates, and where they disagree
    out/face/1.png …       the candidates; the first is the best guess
    out/face/input.png     the low-resolution face as it was used
    out/face/report.json   how far each candidate, downscaled, is from the input, and what made it
    out/face/latents.npz   the codes `ws` that draw the candidates, and the noise maps of a search that has its own
    out/face/strip.png     with --edit-strip: every candidate at five strengths of an edit
    out/face/steps.webp    with --save-steps: the input and the candidates, step after step of the search
    out/face/timing.json   seconds; the only file that differs between two calls
    out/overview.png       the first 16 faces of the call in one picture

The exit status is 0 if everything was written, 1 if something was not (each face is named with the reason), 2 if the
command itself was wrong, and 130 after Ctrl-C, which leaves the faces that were finished. --overwrite replaces what an
earlier call wrote, and nothing else. A search that does not come within --epsilon writes its best, and says so.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data.command import (
    OVERVIEW_ROWS,
    Face,
    add_encoder_options,
    check_encoder_options,
    check_size,
    complain,
    line_of,
    reason_of,
    say,
    tell_of_encoder,
    until_interrupted,
    warn_of_crop,
    write_overview,
)
from data.image_io import centre_square, find_images, from_uint8, read_image, to_uint8
from data.operator import Downscale, downscaling_error
from data.report import (
    MAX_K,
    check_free,
    complete_or_nothing,
    folder_names,
    make_report,
    write_face,
    write_json,
)
from editing.boundary import FOLDER
from editing.command import (
    STRIP_FILE,
    add_edit_options,
    check_edit_options,
    read_editing,
    tell_of_edits,
    write_strip,
)
from editing.drawing import drawer, edit_codes
from export.runtime import check_runtime, run_exported
from models.bundle import DEFAULT_BUNDLE, PRECISIONS, Bundle, load_bundle
from models.bundle_info import GENERATOR
from models.determinism import use_deterministic_kernels
from models.device import choose_device
from search.candidates import find_candidates, start_codes
from search.command import FILM, add_search_options, read_plan, search_bar, tell_of_search, write_latents
from search.consistency import make_consistent
from search.film import Film
from search.loop import draw

BAR_FROM = 4  # faces; fewer are done before a progress bar helps


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
    device = _check(args, parser)
    if args.runtime == "onnx":
        return run_exported(args)
    use_deterministic_kernels()  # the same command is to write the same bytes
    found = find_images(args.inputs)
    for path, remark in found.skipped:
        complain(f"note: {path}: {remark}")
    for path, reason in found.problems:
        complain(f"{path}: {reason}")
    if not found.images:
        complain("nothing to do: no picture was found")
        return 1
    try:
        bundle = load_bundle(args.bundle, device, args.precision)
        args.editing = read_editing(args, args.bundle / FOLDER, bundle.info["parts"][GENERATOR])
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        complain(f"the bundle {args.bundle} cannot be used: {reason_of(error)}")
        return 1
    smallest, largest = bundle.lr_sizes
    if args.downscale is not None and not smallest <= args.downscale <= largest:
        parser.error(f"--downscale: expected {smallest} to {largest} px for this bundle, got {args.downscale}")
    faces, failed = _upsample_all(found.images, bundle, args)
    finished = write_overview(faces, args.out, args.overwrite)
    return int(bool(found.problems) or failed > 0 or not finished)


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="infer.py", description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="pictures of one upright face each, or folders of them")
    add("--out", metavar="DIR", default="out", help="where the results go (default: out)")
    add("--k", metavar="K", type=int, default=4, help=f"candidates per face, 1 to {MAX_K} (default: 4)")
    add("--seed", metavar="N", type=int, default=0, help="of all random choices, from 0 (default: 0)")
    add(
        "--bundle",
        metavar="DIR",
        default=str(DEFAULT_BUNDLE),
        help="trained weights, a folder with bundle.json (default: bundles/celeba64)",
    )
    add(
        "--device",
        default="auto",
        help="auto, cpu, cuda, cuda:1 …, mps; auto takes CUDA if it is there (default: auto)",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="bf16: encoder and search compute in bfloat16, faster where the processor can (default: float32)",
    )
    add(
        "--downscale",
        metavar="PX",
        type=int,
        help="first downscale every picture to PX x PX, for photos larger than the faces that come out",
    )
    add(
        "--runtime",
        choices=["torch", "onnx"],
        default="torch",
        help="onnx: draw with onnxruntime, as export.run does; the bundle is exported at the first call "
        "(default: torch)",
    )
    add_encoder_options(parser.add_argument_group("encoder"))
    add_search_options(parser.add_argument_group("search"))
    add_edit_options(parser.add_argument_group("editing"))
    add("--overwrite", action="store_true", help="replace what an earlier call wrote, and nothing else")
    return parser


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> torch.device:
    """Ends the program with status 2 if an option cannot be followed, and finds the device."""
    if not 1 <= args.k <= MAX_K:
        parser.error(f"--k: expected 1 to {MAX_K} candidates, got {args.k}")
    if args.seed < 0:
        parser.error(f"--seed: expected 0 or a larger number, got {args.seed}")
    try:
        check_encoder_options(args)
        args.plan = read_plan(args)
        check_edit_options(args)
        check_runtime(args)
    except ValueError as error:
        parser.error(str(error))
    for name in ("out", "bundle"):
        if not getattr(args, name):  # as from an unset variable; Path("") would be the current folder
            parser.error(f"--{name}: expected a folder, got an empty name")
        setattr(args, name, Path(getattr(args, name)))
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: expected a folder, {args.out} is a file; name another place")
    try:
        return choose_device(args.device)
    except ValueError as error:
        parser.error(f"--device: {error}")


def _upsample_all(paths: list[Path], bundle: Bundle, args: argparse.Namespace) -> tuple[list[Face], int]:
    """Goes through the inputs, whatever happens to single ones.

    Returns:
        The first faces that were written, as many as the overview shows, and the number of inputs that failed.
    """
    faces: list[Face] = []
    failed = 0
    for path, name in _progress(list(zip(paths, folder_names(paths), strict=True))):
        try:
            face = _upsample_one(path, args.out / name, bundle, args)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            failed += 1
            reason = reason_of(error)
            complain(reason if reason.startswith(f"{path}: ") else f"{path}: {reason}")
            continue
        say(line_of(path, face))
        if len(faces) < OVERVIEW_ROWS:
            faces.append(face)
    return faces, failed


def _upsample_one(path: Path, folder: Path, bundle: Bundle, args: argparse.Namespace) -> Face:
    """Reads one picture, draws its candidates and writes its folder."""
    check_free(folder, args.overwrite, args.k)  # before the work, and again after it
    start = time.perf_counter()
    lr, origin = _low_resolution(path, bundle.lr_sizes, args.downscale)
    read = time.perf_counter()
    # Every face has the same random numbers, so that it comes out the same alone and in company.
    if args.refine:
        film = Film(args.k) if args.save_steps else None
        with search_bar(path.name, args.k, film) as callback:
            found = find_candidates(bundle, lr[None], args.k, args.plan, callback)
        ws = found.ws  # (k, L, D)
    else:
        film, found, ws = None, None, start_codes(bundle, lr[None], args.k, args.plan)
    noise = None if found is None else found.noise
    before, edited = ws, edit_codes(bundle.generator.synthesis, ws, noise, lr.shape[-1], args.editing)
    ws, found = edited.ws, found and replace(found, ws=edited.ws)
    coded = time.perf_counter()
    images = bundle.generate(ws) if found is None else draw(bundle.generator.synthesis, found)
    if args.consistency:
        images = make_consistent(images, lr[None].to(images.device))
    images = from_uint8(to_uint8(images.cpu()))  # (k, 3, R, R), as they are written
    generated = time.perf_counter()
    errors = downscaling_error(images, lr[None], Downscale(lr.shape[-1])).tolist()
    notes = {
        "input": path.name,
        "input_size": origin,
        "lr_size": lr.shape[-1],
        "resolution": bundle.resolution,
        "seed": args.seed,
        "bundle": {"name": bundle.name, "hash": bundle.hash},
    }
    report = make_report(errors, notes)
    tell_of_encoder(report, args)
    tell_of_search(report, args, found)
    tell_of_edits(report, args.editing, edited.visible, edited.kept)
    with complete_or_nothing(folder, args.overwrite, args.k) as partial:
        write_face(partial, lr, images, ws, report)
        if found is not None and found.noise is not None:
            write_latents(found, partial / "latents.npz")
        if film is not None:
            film.save(lr, partial / FILM)
        if args.editing.strip is not None:
            draw_strip = drawer(bundle.generator.synthesis, noise)
            write_strip(args.editing.strip, before.cpu().numpy(), draw_strip, partial / STRIP_FILE)
        seconds = {"read": read - start, "search" if args.refine else "encode": coded - read}
        seconds |= {"generate": generated - coded, "write": time.perf_counter() - generated}
        write_json({name: round(value, 4) for name, value in seconds.items()}, partial / "timing.json")
    return Face(folder.name, lr, images, errors, folder, report.get("found"))


def _low_resolution(path: Path, lr_sizes: tuple[int, int], downscale: int | None) -> tuple[Tensor, list[int]]:
    """Reads a picture and makes it the low-resolution face that is upsampled, in steps of 8 bit as input.png holds it.

    Returns:
        The face (3, s, s), and the width and height of the picture.
    """
    image = torch.from_numpy(read_image(path))
    height, width = image.shape[-2:]
    rows, columns = centre_square(height, width)
    image = image[:, rows, columns].contiguous()
    check_size(width, height, lr_sizes, downscale)
    warn_of_crop(path, width, height)
    if downscale is not None:
        image = Downscale(downscale)(image[None])[0]
    return from_uint8(to_uint8(image)), [width, height]


def _progress(items: list[tuple[Path, str]]) -> Iterable[tuple[Path, str]]:
    if len(items) < BAR_FROM or not sys.stderr.isatty():
        return items
    from tqdm import tqdm

    return tqdm(items, unit="face")


if __name__ == "__main__":
    sys.exit(main())
