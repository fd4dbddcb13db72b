"""Turns low-resolution faces into high-resolution ones: several samples for each, all of which downscale to it.

Faces as they are, from files and folders; each gets a folder of its own in out/:

    python infer.py face.png
    python infer.py samples -o demo

Six samples, other random numbers, and the results of an earlier call replaced:

    python infer.py face.png -k 6 --seed 1 --overwrite

A sharp photo, downscaled to 16 px first, to see what can be told from so little:

    python infer.py photo.jpg --downscale 16

A noisy input, whose grains the samples are not to follow; by default the noise is estimated, 0 says there is none:

    python infer.py noisy.png --noise-sigma 25

Four of sixteen samples that are far apart:

    python infer.py face.png --select 4-of-16

For face.png it writes
    out/face/grid.png      look at this one: the input, the samples, and where they disagree
    out/face/1.png …       the samples; the first is the point estimate
    out/face/input.png     the low-resolution face as it was used
    out/face/report.json   how well each sample downscales to the input (LR-PSNR), and what made it
    out/face/latents.npz   the style codes `ws` of the samples
    out/overview.png       the first 16 faces of the call in one picture

The exit status is 0 if everything was written, 1 if something was not (each face is named with the reason), 2 if the
command itself was wrong, and 130 after Ctrl-C, which leaves the faces that were finished. --overwrite replaces what an
earlier call wrote, and nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cli.sampling_options import SAVED, add_sampling_options, read_sampling, tell_of_samples
from data.command import (
    OVERVIEW_ROWS,
    Face,
    LowResolution,
    complain,
    line_of,
    low_resolution,
    reason_of,
    say,
    until_interrupted,
    warn_of_crop,
    write_overview,
)
from data.image_io import find_images
from data.report import check_free, complete_or_nothing, folder_names, make_report, write_face
from pipeline.samples import Samples
from pipeline.upsampler import RUNTIMES, Upsampler, batch_size

BAR_FROM = 4  # faces; fewer are done before a progress bar helps
WRITERS = 2  # threads
FAILURES = (ValueError, OSError, RuntimeError, MemoryError)


@dataclass(frozen=True)
class Job:
    """One input on its way.

    Attributes:
        path: The picture.
        folder: What it becomes.
        lr: The low-resolution face.
    """

    path: Path
    folder: Path
    lr: LowResolution


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
        upsampler = Upsampler.from_pretrained(args.bundle, args.device, args.runtime, args.precision)
    except FAILURES as error:
        complain(f"the bundle {args.bundle or ''} cannot be used: {reason_of(error)}")
        return 1
    smallest, largest = upsampler.about.lr_sizes
    if args.downscale is not None and not smallest <= args.downscale <= largest:
        parser.error(f"--downscale: expected {smallest} to {largest} px, which this bundle takes, got {args.downscale}")
    run = Run(upsampler, args)
    run.upsample(found.images)
    finished = write_overview(run.shown, args.out, args.overwrite) if "grid" in args.save else True
    return int(bool(found.problems) or run.failed > 0 or not finished)


def _parser() -> argparse.ArgumentParser:
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="infer.py", description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="pictures of one upright face each, or folders of them")
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
    add_sampling_options(parser.add_argument_group("samples"))
    add(
        "--save",
        default=",".join(SAVED),
        metavar="WHAT",
        help=f"what to write, of {', '.join(SAVED)}, with commas (default: all)",
    )
    add("--overwrite", action="store_true", help="replace what an earlier call wrote, and nothing else")
    return parser


def _check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Ends the program with status 2 if an option cannot be followed."""
    try:
        args.sampling = read_sampling(args)
    except ValueError as error:
        parser.error(str(error))
    args.save = args.save.split(",")
    unknown = [name for name in args.save if name not in SAVED]
    if unknown:
        parser.error(f"--save: expected some of {', '.join(SAVED)}, got {', '.join(unknown)}")
    for name in ("batch_size", "downscale"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected 1 or more, got {getattr(args, name)}")
    for name in ("out", "bundle"):
        if getattr(args, name) == "":  # as from an unset variable; Path("") would be the current folder
            parser.error(f"--{name}: expected a folder, got an empty name")
    args.out = Path(args.out)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: expected a folder, {args.out} is a file; name another place")


class Run:
    """Goes through the inputs, whatever happens to single ones: faces of one LR size together, written by threads.

    Attributes:
        shown: The first faces that were written, as many as the overview shows.
        failed: Inputs that came to nothing.
    """

    def __init__(self, upsampler: Upsampler, args: argparse.Namespace) -> None:
        self.upsampler, self.args = upsampler, args
        self.shown: list[Face] = []
        self.failed = 0
        about = upsampler.about
        self.batch = args.batch_size or batch_size(about.resolution, args.sampling.k, about.device)

    def upsample(self, paths: Sequence[Path]) -> None:
        """Upsamples all inputs; what fails is named and counted."""
        with ThreadPoolExecutor(WRITERS) as pool:
            waiting: list[tuple[Job, Future[Face]]] = []
            for jobs in self._batches(paths):
                waiting += self._sample(jobs, pool)
                while len(waiting) > 2 * self.batch:  # memory stays flat when the disk is slow
                    self._finish(*waiting.pop(0))
            for job, future in waiting:
                self._finish(job, future)

    def _batches(self, paths: Sequence[Path]) -> Iterator[list[Job]]:
        """Reads the inputs, and gives those of one LR size together."""
        waiting: dict[int, list[Job]] = {}
        for path, name in self._progress(list(zip(paths, folder_names(paths), strict=True))):
            job = self._read(path, self.args.out / name)
            if job is None:
                continue
            group = waiting.setdefault(job.lr.image.shape[-1], [])
            group.append(job)
            if len(group) == self.batch:
                yield waiting.pop(job.lr.image.shape[-1])
        yield from waiting.values()

    def _read(self, path: Path, folder: Path) -> Job | None:
        try:
            check_free(folder, self.args.overwrite, self.args.sampling.k)  # before the work, and again after it
            lr = low_resolution(path, self.upsampler.about.lr_sizes, self.args.downscale)
        except FAILURES as error:
            self._fail(path, error)
            return None
        warn_of_crop(path, *lr.origin)
        return Job(path, folder, lr)

    def _sample(self, jobs: list[Job], pool: ThreadPoolExecutor) -> list[tuple[Job, Future[Face]]]:
        try:
            lr = np.stack([job.lr.image for job in jobs])
            samples = self.args.sampling.sample(self.upsampler, lr)
        except FAILURES as error:
            if len(jobs) > 1:  # one bad face never stops the others
                return [pair for job in jobs for pair in self._sample([job], pool)]
            self._fail(jobs[0].path, error)
            return []
        return [(job, pool.submit(self._write, job, samples[i])) for i, job in enumerate(jobs)]

    def _write(self, job: Job, sample: Samples) -> Face:
        args, about = self.args, self.upsampler.about
        notes = {
            "input": job.path.name,
            "input_size": list(job.lr.origin),
            "lr_size": job.lr.image.shape[-1],
            "resolution": about.resolution,
            "bundle": {"name": about.name, "hash": about.hash},
        }
        report = make_report(notes | tell_of_samples(sample, args.sampling))
        with complete_or_nothing(job.folder, args.overwrite, len(sample.images)) as partial:
            write_face(partial, job.lr.image, sample.images, sample.ws, report, args.save)
        return Face(job.folder.name, job.lr.image, sample.images, sample.lr_psnr.tolist(), job.folder)

    def _finish(self, job: Job, future: Future[Face]) -> None:
        try:
            face = future.result()
        except FAILURES as error:
            self._fail(job.path, error)
            return
        say(line_of(job.path, face))
        if len(self.shown) < OVERVIEW_ROWS:
            self.shown.append(face)

    def _fail(self, path: Path, error: BaseException) -> None:
        self.failed += 1
        reason = reason_of(error)
        complain(reason if reason.startswith(f"{path}: ") else f"{path}: {reason}")

    @staticmethod
    def _progress(items: list[tuple[Path, str]]) -> Iterator[tuple[Path, str]]:
        if len(items) < BAR_FROM or not sys.stderr.isatty():
            return iter(items)
        from tqdm import tqdm

        return iter(tqdm(items, unit="face"))


if __name__ == "__main__":
    sys.exit(main())
