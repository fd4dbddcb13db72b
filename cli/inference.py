"""What infer.py does with its inputs: reads them, samples those of one size together, and writes them from threads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.doubts import NO_FACE, size_doubts
from cli.edit_options import SWEEP_FILE, write_sweep
from cli.inputs import InputFace, read_picture, to_face, warn_of_crop
from cli.overview import FaceResult, summarize_face
from cli.photos import PhotoFolder, PhotoReader
from cli.sampling_options import summarize_samples
from cli.search_options import TRAJECTORY, search_progress, summarize_search
from data.console import FAILURES, format_error, print_error, print_line
from data.figures import OVERVIEW_ROWS
from data.files import check_folder, owned_folder
from data.listing import Picture
from data.report import REPORT, folder_names, make_report, write_face
from editing.direction import SWEEP, EditPlan
from pipeline.samples import Samples
from pipeline.upsampler import Upsampler, batch_size

if TYPE_CHECKING:
    from cli.trajectory import TrajectoryRecorder

BAR_FROM = 4  # faces; fewer are done before a progress bar helps
WRITERS = 2  # threads


@dataclass(frozen=True)
class Job:
    """One input on its way.

    Attributes:
        path: The picture.
        folder: What it becomes.
        lr: The low-resolution face.
        doubts: Why its samples should not be believed, as far as is known before they are made.
        place: Where the folder will be once the whole photo is done; None if it stays where it is.
    """

    path: Picture
    folder: Path
    lr: InputFace
    doubts: Sequence[str] = ()
    place: Path | None = None


@dataclass(frozen=True)
class Made:
    """What was made of one face.

    Attributes:
        samples: Its samples.
        search: How it was searched, for report.json; None if it was not.
        recorder: Has the trajectories of the batch, None if they are not wanted.
        rows: Which of them are this face's.
        sweep: Its samples at the strengths of a sweep (k, 5, 3, R, R), None if there is none.
    """

    samples: Samples
    search: dict[str, Any] | None = None
    recorder: TrajectoryRecorder | None = None
    rows: slice | None = None
    sweep: np.ndarray | None = None


class Run:
    """Goes through the inputs, whatever happens to single ones: faces of one LR size together, written by threads.

    Attributes:
        shown: The first faces that were written, as many as the overview shows.
        failed: Inputs that came to nothing.
    """

    def __init__(self, upsampler: Upsampler, args: argparse.Namespace) -> None:
        self.upsampler, self.args = upsampler, args
        self.shown: list[FaceResult] = []
        self.failed = 0
        about = upsampler.about
        self.batch = args.batch_size or batch_size(about.resolution, args.sampling.wanted.k, about.device)
        edits: EditPlan = args.edits
        edit = edits.offset(*about.styles) if edits.edits else None
        self.wanted = replace(args.sampling.wanted, edit=edit, preserve_lr=edits.preserve_lr)
        self.photos = PhotoReader(about, args.align, args.downscale)

    def upsample(self, paths: Sequence[Picture]) -> None:
        """Upsamples all inputs; what fails is named and counted."""
        with ThreadPoolExecutor(WRITERS) as pool:
            waiting: list[tuple[Job | PhotoFolder, Future[list[FaceResult]]]] = []
            for batch in self._batches(paths):
                if isinstance(batch, PhotoFolder):
                    waiting.append((batch, self._sample_photo(batch, pool)))
                else:
                    waiting += self._sample(batch, pool)
                while len(waiting) > 2 * self.batch:  # memory stays flat when the disk is slow
                    self._finish(*waiting.pop(0))
            for pair in waiting:
                self._finish(*pair)

    def _batches(self, paths: Sequence[Picture]) -> Iterator[list[Job] | PhotoFolder]:
        """Reads the inputs, and gives photos one by one, faces of one LR size together."""
        waiting: dict[int, list[Job]] = {}
        for path, name in self._progress(list(zip(paths, folder_names(paths), strict=True))):
            job = self._read(path, self.args.out / name)
            if isinstance(job, PhotoFolder):
                yield job
            elif job is not None:
                group = waiting.setdefault(job.lr.image.shape[-1], [])
                group.append(job)
                if len(group) == self.batch:
                    yield waiting.pop(job.lr.image.shape[-1])
        yield from waiting.values()

    def _read(self, path: Picture, folder: Path) -> Job | PhotoFolder | None:
        try:
            check_folder(folder, self.args.overwrite, REPORT)  # before the work, and again after it
            image = read_picture(path)
            faces = self.photos.faces(image)
            if faces:
                return PhotoFolder(path, folder, faces, self.args)
            lr = to_face(image, self.upsampler.about.lr_sizes, self.args.downscale)
        except FAILURES as error:
            self._fail(path, error)
            return None
        warn_of_crop(path, *lr.origin)
        doubts = [NO_FACE] if faces is not None else []
        return Job(path, folder, lr, [*doubts, *size_doubts(lr.image.shape[-1])])

    def _sample_photo(self, photo: PhotoFolder, pool: ThreadPoolExecutor) -> Future[list[FaceResult]]:
        """Samples the faces of a photo, those of one LR size together."""
        sizes: dict[int, list[Job]] = {}
        for face in photo.faces:
            if face.lr is not None:
                job = Job(photo.path, photo.partial / face.name, face.lr, face.doubts, photo.folder / face.name)
                sizes.setdefault(face.lr.image.shape[-1], []).append(job)
        batches = [jobs[i : i + self.batch] for jobs in sizes.values() for i in range(0, len(jobs), self.batch)]
        written = [future for jobs in batches for _, future in self._sample(jobs, pool)]
        return pool.submit(self._complete, photo, written)  # waits for those that began before it, so it never blocks

    @staticmethod
    def _complete(photo: PhotoFolder, written: Sequence[Future[list[FaceResult]]]) -> list[FaceResult]:
        """Lets the folder of a photo appear when all its faces are written."""
        with photo:
            faces = [face for future in written for face in future.result()]
            photo.finish({face.folder.name: face for face in faces})
        return faces

    def _sample(self, jobs: list[Job], pool: ThreadPoolExecutor) -> list[tuple[Job, Future[list[FaceResult]]]]:
        try:
            made = self._make(jobs)
        except FAILURES as error:
            if len(jobs) > 1:  # one bad face never stops the others
                return [pair for job in jobs for pair in self._sample([job], pool)]
            self._fail(jobs[0].path, error)
            return []
        return [(job, pool.submit(self._write, job, one)) for job, one in zip(jobs, made, strict=True)]

    def _make(self, jobs: list[Job]) -> list[Made]:
        """Samples the faces of a batch."""
        lr = np.stack([job.lr.image for job in jobs])
        if self.args.plan is not None:
            return self._search(jobs, lr)
        samples, sweep = self.upsampler.backend.sample(lr, self.wanted), self._sweep(lr)
        return [Made(samples[i], sweep=None if sweep is None else sweep[i]) for i in range(len(jobs))]

    def _sweep(self, lr: np.ndarray) -> np.ndarray | None:
        """Samples (B, k, 5, 3, R, R) at the strengths of a sweep; None if there is none."""
        direction = self.args.edits.sweep
        if direction is None:
            return None
        plans = [EditPlan(((direction, strength),)) for strength in SWEEP]
        edits = [plan.offset(*self.upsampler.about.styles) for plan in plans]
        made = [self.upsampler.backend.sample(lr, replace(self.wanted, edit=edit)).images for edit in edits]
        return np.stack(made, axis=2)

    def _search(self, jobs: list[Job], lr: np.ndarray) -> list[Made]:
        """Searches for the samples of a batch, and says how each face was searched."""
        from cli.trajectory import TrajectoryRecorder  # here, since a search needs torch

        args, k = self.args, self.wanted.k
        recorder = TrajectoryRecorder(len(jobs) * k) if args.save_trajectory else None
        title = jobs[0].path.name if len(jobs) == 1 else f"{len(jobs)} faces"
        with search_progress(title, len(jobs) * k, recorder) as callback:
            samples, found = self.upsampler.backend.search(lr, self.wanted, args.plan, callback)
        parts = found.split(k)
        return [
            Made(samples[i], summarize_search(args.plan, part), recorder, slice(i * k, i * k + k))
            for i, part in enumerate(parts)
        ]

    def _write(self, job: Job, made: Made) -> list[FaceResult]:
        args, about = self.args, self.upsampler.about
        notes = {
            "input": job.path.name,
            "input_size": list(job.lr.origin),
            "lr_size": job.lr.image.shape[-1],
            "doubts": list(job.doubts),
            "resolution": about.resolution,
            "bundle": {"name": about.name, "hash": about.hash},
        }
        samples = args.sampling.select(made.samples)
        notes |= summarize_samples(samples, args.sampling) | args.edits.summarize()
        if made.search is not None:
            notes["search"] = made.search
        with owned_folder(job.folder, args.overwrite, REPORT) as partial:
            write_face(partial, job.lr.image, samples.images, samples.ws, make_report(notes), args.save)
            if made.sweep is not None:
                write_sweep(args.edits, made.sweep, partial / SWEEP_FILE)
            if made.recorder is not None and made.rows is not None:
                import torch

                made.recorder.save(partial / TRAJECTORY, torch.from_numpy(job.lr.image), made.rows)
        converged = None if made.search is None else made.search["converged"]
        place = job.place or job.folder
        title = place.relative_to(args.out).as_posix()
        psnr = samples.lr_psnr.tolist()
        return [FaceResult(title, job.lr.image, samples.images, psnr, place, converged, job.doubts)]

    def _finish(self, done: Job | PhotoFolder, future: Future[list[FaceResult]]) -> None:
        try:
            faces = future.result()
        except FAILURES as error:
            self._fail(done.path, error)
            return
        for face in faces:
            print_line(summarize_face(done.path, face))
        for line in done.summary() if isinstance(done, PhotoFolder) else ():
            print_line(line)
        self.shown += faces[: OVERVIEW_ROWS - len(self.shown)]

    def _fail(self, path: Picture, error: BaseException) -> None:
        self.failed += 1
        reason = format_error(error)
        print_error(reason if reason.startswith(f"{path}: ") else f"{path}: {reason}")

    @staticmethod
    def _progress(items: list[tuple[Picture, str]]) -> Iterator[tuple[Picture, str]]:
        if len(items) < BAR_FROM or not sys.stderr.isatty():
            return iter(items)
        from tqdm import tqdm

        return iter(tqdm(items, unit="face"))
