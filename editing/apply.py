"""Edits faces that infer.py has upsampled, from the codes that it saved; nothing is searched or encoded again.

    python -m editing.apply out/face/latents.npz --edit smile=+2 --out edited
    python -m editing.apply out/face out/other --edit bangs=-1 --edit male=+1.5 --out edited
    python -m editing.apply out/face --edit-strip smile --out edited

A smile that does not show in the low-resolution picture, as far as that is possible:

    python -m editing.apply out/face --edit smile=+2 --edit-consistent --out edited

For out/face it writes edited/face/ with the files of infer.py; strip.png with --edit-strip. The low-resolution face
comes from the input.png beside the codes; without one (and for codes of your own: an array `ws` (k, L, D) in a .npz)
the first face's own downscaled picture stands for it, --lr pixels wide.

The exit status is 0 if everything was written, 1 if something was not, and 2 if the command itself was wrong.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.command import Face, complain, line_of, reason_of, say, until_interrupted, write_overview
from data.files import owned_folder
from data.image_io import from_uint8, read_image, to_uint8
from data.operator import Downscale, downscaling_error
from data.report import MAX_K, REPORT, folder_names, make_report, write_face, write_json
from editing.boundary import FOLDER
from editing.command import (
    STRIP_FILE,
    Editing,
    add_edit_options,
    check_edit_options,
    read_editing,
    tell_of_edits,
    write_strip,
)
from editing.drawing import drawer, edit_codes
from models.bundle import DEFAULT_BUNDLE
from models.bundle_info import GENERATOR
from models.checkpoints import load_generator, sha256_of
from models.determinism import use_deterministic_kernels
from models.device import choose_device
from models.generator import Generator

LATENTS = "latents.npz"


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
    try:
        check_edit_options(args)
        device = choose_device(args.device)
        if not args.edit and not args.edit_strip:
            raise ValueError("expected --edit NAME=STRENGTH or --edit-strip NAME, got neither")
    except ValueError as error:
        parser.error(str(error))
    use_deterministic_kernels()
    try:
        editing = read_editing(args, args.bundle / FOLDER, sha256_of(args.bundle / GENERATOR))
        generator = load_generator(args.bundle / GENERATOR, device)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        complain(f"the bundle {args.bundle} cannot be used: {reason_of(error)}")
        return 1
    paths = [path / LATENTS if path.is_dir() else path for path in args.inputs]
    # latents.npz lies in the folder that bears the face's name; a file of another name has its own.
    titles = [path.resolve().parent if path.name == LATENTS else path for path in paths]
    faces, failed = [], 0
    for path, name in zip(paths, folder_names(titles), strict=True):
        try:
            face = edit_one(path, args.out / name, generator, editing, args.lr, args.overwrite)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            failed += 1
            complain(f"{path}: {reason_of(error)}")
            continue
        say(line_of(path, face))
        faces.append(face)
    return int(not write_overview(faces[:16], args.out, args.overwrite) or failed > 0)


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m editing.apply",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="LATENTS", help="latents.npz, or the folder that it is in")
    add_edit_options(parser)  # type: ignore[arg-type]
    add("--out", type=Path, metavar="DIR", default=Path("edited"), help="where the results go (default: edited)")
    add("--bundle", type=Path, metavar="DIR", default=DEFAULT_BUNDLE, help="default: bundles/celeba64")
    add(
        "--lr", type=int, metavar="PX", default=16, help="low-resolution size where there is no input.png (default: 16)"
    )
    add("--device", default="auto", help="auto, cpu, cuda … (default: auto)")
    add("--overwrite", action="store_true", help="replace what an earlier call wrote, and nothing else")
    return parser


def edit_one(path: Path, folder: Path, generator: Generator, editing: Editing, lr_size: int, overwrite: bool) -> Face:
    """Edits the candidates of one face and writes their folder.

    Args:
        path: Codes that infer.py saved.
        folder: The folder to be.
        generator: Draws.
        editing: What is asked for.
        lr_size: Size in pixels of the low-resolution face, where there is no input.png.
        overwrite: Results of an earlier call may be replaced.

    Returns:
        What became of it.

    Raises:
        ValueError: If the codes are not this generator's, or the folder is not free.
    """
    ws, noise = read_latents(path, generator)
    drawn = drawer(generator.synthesis, noise)
    before = ws.cpu().numpy()
    lr = _input_of(path, lr_size, before, drawn, generator.resolution)
    edited = edit_codes(generator.synthesis, ws, noise, lr.shape[-1], editing)
    images = from_uint8(to_uint8(torch.from_numpy(drawn(edited.ws.cpu().numpy()))))
    errors = downscaling_error(images, lr[None], Downscale(lr.shape[-1])).tolist()
    report = make_report(errors, {"input": path.name, "lr_size": lr.shape[-1], "resolution": generator.resolution})
    tell_of_edits(report, editing, edited.visible, edited.kept)
    with owned_folder(folder, overwrite, REPORT) as partial:
        write_face(partial, lr, images, edited.ws, report)
        maps: dict[str, Any] = {f"noise_{i}": tensor.cpu().numpy() for i, tensor in enumerate(noise or [])}
        np.savez(partial / LATENTS, ws=edited.ws.cpu().numpy(), **maps)
        if editing.strip is not None:
            write_strip(editing.strip, before, drawn, partial / STRIP_FILE)
        write_json({}, partial / "timing.json")
    return Face(folder.name, lr, images, errors, folder)


def read_latents(path: Path, generator: Generator) -> tuple[Tensor, list[Tensor] | None]:
    """Reads the codes and noise maps that infer.py saved.

    Args:
        path: A .npz with `ws` (k, L, D), and `noise_0` … where a search had its own maps.
        generator: Which is to draw them.

    Returns:
        Codes (k, L, D), and maps (k, 1, H, W) per layer or None, on the generator's device.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is something else, or of a generator of another shape.
    """
    if not path.is_file():
        raise FileNotFoundError("expected the codes that infer.py saved, latents.npz, found no such file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            ws = arrays["ws"].astype(np.float32)
            count = sum(name.startswith("noise_") for name in arrays.files)
            maps = [arrays[f"noise_{i}"].astype(np.float32) for i in range(count)]
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"expected latents.npz with an array ws, found something else ({error})") from error
    if ws.ndim != 3 or ws.shape[1:] != (generator.num_ws, generator.w_dim) or not 1 <= len(ws) <= MAX_K:
        raise ValueError(
            f"expected codes (1 to {MAX_K}, {generator.num_ws}, {generator.w_dim}) for this generator, got {ws.shape}"
        )
    if not np.isfinite(ws).all():
        raise ValueError("expected finite codes, got NaN or infinite values")
    device = generator.w_avg.device
    noise = [torch.from_numpy(array).to(device) for array in maps]
    return torch.from_numpy(ws).to(device), noise or None


def _input_of(
    path: Path, lr_size: int, ws: np.ndarray, drawn: Callable[[np.ndarray], np.ndarray], resolution: int
) -> Tensor:
    """The low-resolution face that the codes were found for; else the first candidate's own downscaled picture."""
    given = path.parent / "input.png"
    if path.name == LATENTS and given.is_file():
        lr = torch.from_numpy(read_image(given))
        if lr.shape[-1] == lr.shape[-2] <= resolution:
            return lr
    if not 1 <= lr_size <= resolution:
        raise ValueError(f"expected --lr from 1 to {resolution} px, got {lr_size}")
    return from_uint8(to_uint8(Downscale(lr_size)(torch.from_numpy(drawn(ws)[:1]))[0]))


if __name__ == "__main__":
    sys.exit(main())
