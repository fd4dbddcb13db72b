"""Turns low-resolution faces into high-resolution ones: several samples for each, all of which downscale to it.

Faces as they are, from files and folders; each gets a folder of its own in out/:

    python infer.py face.png
    python infer.py samples -o demo

Faces by the thousand: from archives or lists with a line each, on two GPUs, into files of 1000 faces each. The same
command continues where it was cut, and failed.jsonl names what could not be made; torchrun works as well:

    python infer.py faces.zip faces.parquet faces.txt --devices 2 --archive tar

Six samples, other random numbers, and the results of an earlier call replaced:

    python infer.py face.png -k 6 --seed 1 --overwrite

A photo with small faces in it, which are found, and put back into the photo at twice its size; a square that is small
enough is taken for a face as it is:

    python infer.py holiday.jpg --paste-back --upscale 2

A sharp photo, whose faces are downscaled to 16 px first, to see what can be told from so little:

    python infer.py photo.jpg --downscale 16

A noisy input, whose grains the samples are not to follow; by default the noise is estimated, 0 says there is none:

    python infer.py noisy.png --noise-sigma 25

Samples that explain the input better before the last step makes them exact, by a short search; PULSE as published:

    python infer.py face.png --search 10
    python infer.py face.png --search 100 --method pulse --init random --save-trajectory

The same samples with a broader smile and no bangs, and a picture of smiles from weak to strong; the names are those of
the bundle's directions, the strengths standard deviations:

    python infer.py face.png --edit smile=+2 --edit bangs=-1
    python infer.py face.png --edit-sweep smile

Four of sixteen samples that are far apart:

    python infer.py face.png --select 4-of-16

For face.png it writes
    out/face/grid.png      look at this one: the input, the samples, and where they disagree
    out/face/1.png …       the samples; the first is the point estimate
    out/face/input.png     the low-resolution face as it was used
    out/face/report.json   how well each sample downscales to the input (LR-PSNR), why not to believe
                           it, and what made it
    out/face/latents.npz   the style codes `ws` of the samples
    out/face/sweep.png     with --edit-sweep: every sample at five strengths of an edit
    out/face/trajectory.webp  with --save-trajectory: the input and the samples, step after step of the search
    out/overview.png       the first 16 faces of the call in one picture

and for a photo in which faces were found
    out/holiday/face-1 …   the same for each face, by falling size; larger ones than the bundle makes are left out
    out/holiday/faces.json where they are, their angles, confidence and LR sizes, and why not to believe some of them
    out/holiday/photo.png  with --paste-back: the photo with its faces, its EXIF block and colour profile

The exit status is 0 if everything was written, 1 if something was not (each face is named with the reason), 2 if the
command itself was wrong, and 130 after Ctrl-C, which leaves the faces that were finished. --overwrite replaces what an
earlier call wrote, and nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cli.edit_options import add_edit_options, check_edit_options, read_edit_plan
from cli.inference import Run
from cli.launch import add_process_options, launch
from cli.overview import write_overview
from cli.photos import add_photo_options, check_photo_options
from cli.sampling_options import SAVED, add_sampling_options, read_sampling
from cli.search_options import add_search_options, read_plan
from data.console import blame, number_option, print_error, run_command
from data.files import check_writable
from data.listing import find_images
from data.parquet import load_pyarrow
from data.shards import KINDS
from editing.direction import FOLDER
from pipeline.processes import Processes
from pipeline.upsampler import RUNTIMES, Upsampler, bundle_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0 if everything was written, 1 if something was not, 130 after Ctrl-C.
    """
    return run_command("infer.py", lambda: _run(arguments), "the faces that were finished stay")


def _run(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    _check(args, parser)
    try:
        command = [__file__, *(sys.argv[1:] if arguments is None else arguments)]
        launched = launch(args.devices, args.num_nodes, command)
    except ValueError as error:
        parser.error(str(error))
    if launched is not None:
        return launched
    processes = Processes.join()
    try:
        status = _upsample(args, parser, processes)
        processes.wait()  # a launcher that saw this one fail would end the others
        return status
    finally:
        processes.leave()


def _upsample(args: argparse.Namespace, parser: argparse.ArgumentParser, processes: Processes) -> int:
    """Upsamples this process's share of the inputs, and gives the exit status."""
    found = find_images(args.inputs)
    if processes.rank == 0:
        for path, remark in found.skipped:
            print_error(f"note: {path}: {remark}")
        for path, reason in found.problems:
            print_error(f"{path}: {reason}")
    if not found.images:
        print_error("nothing to do: no picture was found")
        return 1
    with blame("--bundle, --device"):
        upsampler = Upsampler.from_pretrained(args.bundle, args.device, args.runtime, args.precision)
    smallest, largest = upsampler.about.lr_sizes
    if args.downscale is not None and not smallest <= args.downscale <= largest:
        parser.error(f"--downscale: expected {smallest} to {largest} px, which this bundle takes, got {args.downscale}")
    try:
        args.edits = read_edit_plan(args, bundle_folder(args.bundle) / FOLDER, upsampler.about.generator_sha256)
    except ValueError as error:
        parser.error(f"--edit, --edit-sweep: {error}")
    with blame("--out"):
        check_writable(args.out)
    run = Run(upsampler, args, processes)
    run.failed |= {str(path): reason for path, reason in found.problems}
    try:
        run.upsample(found.images)
    finally:
        noted = run.note_failures(len(found.images) + len(found.problems))
    finished = processes.rank > 0 or "grid" not in args.save or write_overview(run.shown, args.out, args.overwrite)
    return int(bool(run.failed) or not noted or not finished)


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="infer.py", description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="faces, photos with faces in them, or folders, lists (.txt), patterns, zips or Parquet files of them",
    )
    add("-o", "--out", metavar="DIR", default="out", help="where the results go (default: out)")
    add("--bundle", metavar="DIR", help="trained weights, a folder with bundle.json (default: the one that is shipped)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 …, mps; auto takes CUDA if it is there")
    add("--runtime", choices=RUNTIMES, default="torch", help="onnx: run with onnxruntime; needs no torch")
    add(
        "--precision",
        choices=["float32", "bf16"],
        default="float32",
        help="bf16: the encoder computes in bfloat16, faster where the processor can (default: float32)",
    )
    add("--batch-size", metavar="N", type=int, help="faces at once; by default as many as suit the device")
    add(
        "--downscale",
        metavar="PX",
        type=int,
        help="first downscale every picture to PX x PX, for photos larger than the faces that come out",
    )
    add_photo_options(parser.add_argument_group("photos"))
    add_sampling_options(parser.add_argument_group("samples"))
    add_search_options(parser.add_argument_group("search"))
    add_edit_options(parser.add_argument_group("edits"))
    add(
        "--save",
        default=",".join(SAVED),
        metavar="WHAT",
        help=f"what to write, of {', '.join(SAVED)}, with commas (default: all)",
    )
    _add_bulk_options(parser.add_argument_group("many faces"))
    add("--overwrite", action="store_true", help="replace what an earlier call wrote, and nothing else")
    return parser


def _add_bulk_options(group: argparse._ArgumentGroup) -> None:
    add_process_options(group)
    group.add_argument(
        "--archive",
        choices=KINDS,
        help="write faces-00000.tar or faces-00000.parquet … instead of a folder for each face",
    )
    group.add_argument(
        "--shard-size", type=number_option, default=1000, metavar="N", help="inputs in each of these (default: 1000)"
    )


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Ends the program with status 2 if an option cannot be followed."""
    try:
        args.sampling, args.plan = read_sampling(args), read_plan(args)
        check_edit_options(args)
        check_photo_options(args)
        if args.archive == "parquet":
            load_pyarrow()
        if args.plan and args.edit_sweep:
            raise ValueError("--edit-sweep: shows samples that were not searched for; leave it out, or --search")
        if args.plan and args.runtime == "onnx":
            raise ValueError("--search: needs torch, which has gradients; leave it out, or --runtime onnx")
    except ValueError as error:
        parser.error(str(error))
    args.save = args.save.split(",")
    unknown = [name for name in args.save if name not in SAVED]
    if unknown:
        parser.error(f"--save: expected some of {', '.join(SAVED)}, got {', '.join(unknown)}")
    if args.archive is not None:
        args.save = [name for name in args.save if name != "grid"]
    for name in ("batch_size", "downscale"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected 1 or more, got {getattr(args, name)}")
    for name in ("out", "bundle"):
        if getattr(args, name) == "":  # as from an unset variable; Path("") would be the current folder
            parser.error(f"--{name}: expected a folder, got an empty name")
    args.out = Path(args.out)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: expected a folder, {args.out} is a file; name another place")


if __name__ == "__main__":
    sys.exit(main())
