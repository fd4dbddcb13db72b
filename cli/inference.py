"""What infer.py does with its inputs: reads them, samples those of one size together, and writes them from threads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.sampling_options import summarize_samples
from cli.search_options import TRAJECTORY, search_progress, summarize_search
from data.command import (
    OVERVIEW_ROWS,
    Face,
    LowResolution,
    complain,
    line_of,
    low_resolution,
    reason_of,
    say,
    warn_of_crop,
)
from data.files import check_folder, owned_folder
from data.report import REPORT, folder_names, make_report, write_face
from pipeline.samples import Samples
from pipeline.upsampler import Upsampler, batch_size

if TYPE_CHECKING:
    from cli.trajectory import TrajectoryRecorder

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


@dataclass(frozen=True)
class SearchNotes:
    """How one face was searched.

    Attributes:
        report: For report.json.
        recorder: Has the trajectories of the batch, None if they are not wanted.
        rows: Which of them are this face's.
    """

    report: dict[str, Any]
    recorder: TrajectoryRecorder | None
    rows: slice


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
        self.batch = args.batch_size or batch_size(about.resolution, args.sampling.wanted.k, about.device)

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
            check_folder(folder, self.args.overwrite, REPORT)  # before the work, and again after it
            lr = low_resolution(path, self.upsampler.about.lr_sizes, self.args.downscale)
        except FAILURES as error:
            self._fail(path, error)
            return None
        warn_of_crop(path, *lr.origin)
        return Job(path, folder, lr)

    def _sample(self, jobs: list[Job], pool: ThreadPoolExecutor) -> list[tuple[Job, Future[Face]]]:
        try:
            made = self._make(jobs)
        except FAILURES as error:
            if len(jobs) > 1:  # one bad face never stops the others
                return [pair for job in jobs for pair in self._sample([job], pool)]
            self._fail(jobs[0].path, error)
            return []
        return [(job, pool.submit(self._write, job, *one)) for job, one in zip(jobs, made, strict=True)]

    def _make(self, jobs: list[Job]) -> list[tuple[Samples, SearchNotes | None]]:
        """Samples the faces of a batch, and says how each was searched."""
        args, lr = self.args, np.stack([job.lr.image for job in jobs])
        if args.plan is None:
            samples = self.upsampler.backend.sample(lr, args.sampling.wanted)
            return [(samples[i], None) for i in range(len(jobs))]
        from cli.trajectory import TrajectoryRecorder  # here, since a search needs torch

        k = args.sampling.wanted.k
        recorder = TrajectoryRecorder(len(jobs) * k) if args.save_trajectory else None
        title = jobs[0].path.name if len(jobs) == 1 else f"{len(jobs)} faces"
        with search_progress(title, len(jobs) * k, recorder) as callback:
            samples, found = self.upsampler.backend.search(lr, args.sampling.wanted, args.plan, callback)
        notes = [summarize_search(args.plan, part) for part in found.split(k)]
        return [(samples[i], SearchNotes(note, recorder, slice(i * k, i * k + k))) for i, note in enumerate(notes)]

    def _write(self, job: Job, samples: Samples, searched: SearchNotes | None) -> Face:
        args, about = self.args, self.upsampler.about
        notes = {
            "input": job.path.name,
            "input_size": list(job.lr.origin),
            "lr_size": job.lr.image.shape[-1],
            "resolution": about.resolution,
            "bundle": {"name": about.name, "hash": about.hash},
        }
        samples = args.sampling.select(samples)
        notes |= summarize_samples(samples, args.sampling)
        if searched is not None:
            notes["search"] = searched.report
        with owned_folder(job.folder, args.overwrite, REPORT) as partial:
            write_face(partial, job.lr.image, samples.images, samples.ws, make_report(notes), args.save)
            if searched is not None and searched.recorder is not None:
                import torch

                searched.recorder.save(partial / TRAJECTORY, torch.from_numpy(job.lr.image), searched.rows)
        converged = None if searched is None else searched.report["converged"]
        return Face(job.folder.name, job.lr.image, samples.images, samples.lr_psnr.tolist(), job.folder, converged)

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
