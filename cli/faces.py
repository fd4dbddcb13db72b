"""What is made of each face: samples, perhaps edited or searched for, and the folder that they are written into."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.doubts import sample_doubts
from cli.edit_options import SWEEP_FILE, write_sweep
from cli.inputs import InputFace, Item
from cli.overview import FaceResult
from cli.sampling_options import summarize_samples
from cli.search_options import TRAJECTORY, search_progress, summarize_search
from data.files import owned_folder
from data.report import REPORT, make_report, write_face
from editing.direction import SWEEP, EditPlan
from pipeline.familiarity import Familiarity
from pipeline.samples import Samples
from pipeline.upsampler import Upsampler, bundle_folder

if TYPE_CHECKING:
    from cli.trajectory import TrajectoryRecorder


@dataclass(frozen=True)
class Job:
    """A face on its way."""

    item: Item
    folder: Path  # where it is written
    key: str  # hash of all that it is made of
    lr: InputFace
    doubts: Sequence[str] = ()  # why its samples should not be believed, as far as is known before they are made
    place: Path | None = None  # where the folder will be once the whole photo is done; None if it stays where it is


@dataclass(frozen=True)
class Made:
    """What was made of one face."""

    samples: Samples
    search: dict[str, Any] | None = None  # how it was searched, for report.json; None if it was not
    recorder: TrajectoryRecorder | None = None  # has the trajectories of the batch, None if they are not wanted
    rows: slice | None = None  # which of them are this face's
    sweep: np.ndarray | None = None  # samples at the strengths of a sweep (k, 5, 3, R, R), None if there is none


class FaceMaker:
    """Makes and writes faces.

    Args:
        upsampler: Makes them.
        args: The options.
    """

    def __init__(self, upsampler: Upsampler, args: argparse.Namespace) -> None:
        self.upsampler, self.args = upsampler, args
        about = upsampler.about
        edits: EditPlan = args.edits
        edit = edits.offset(*about.styles) if edits.edits else None
        self.wanted = replace(args.sampling.wanted, edit=edit, preserve_lr=edits.preserve_lr)
        self.familiarity = Familiarity.load(bundle_folder(args.bundle), about.hash)

    def make(self, jobs: Sequence[Job]) -> list[Made]:
        """Samples the faces of a batch, which have one LR size."""
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

    def _search(self, jobs: Sequence[Job], lr: np.ndarray) -> list[Made]:
        """Searches for the samples of a batch, and says how each face was searched."""
        from cli.trajectory import TrajectoryRecorder  # here, since a search needs torch

        args, k = self.args, self.wanted.k
        recorder = TrajectoryRecorder(len(jobs) * k) if args.save_trajectory else None
        title = jobs[0].item.picture.name if len(jobs) == 1 else f"{len(jobs)} faces"
        with search_progress(title, len(jobs) * k, recorder) as callback:
            samples, found = self.upsampler.backend.search(lr, self.wanted, args.plan, callback)
        parts = found.split(k)
        return [
            Made(samples[i], summarize_search(args.plan, part), recorder, slice(i * k, i * k + k))
            for i, part in enumerate(parts)
        ]

    def write(self, job: Job, made: Made) -> list[FaceResult]:
        """Writes what was made of a face."""
        args, about = self.args, self.upsampler.about
        doubts = list(job.doubts)
        if made.search is None:  # whose codes are not as the encoder's
            doubts += sample_doubts(self.familiarity, made.samples, job.lr.image.shape[-1], self.wanted.edit)
        notes = {
            "input": job.item.picture.name,
            "input_size": list(job.lr.origin),
            "lr_size": job.lr.image.shape[-1],
            "doubts": doubts,
            "resolution": about.resolution,
            "bundle": {"name": about.name, "hash": about.hash},
        }
        samples = args.sampling.select(made.samples)
        notes |= summarize_samples(samples, args.sampling) | args.edits.summarize()
        if made.search is not None:
            notes["search"] = made.search
        with owned_folder(job.folder, args.overwrite, REPORT, job=job.key) as partial:
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
        return [FaceResult(title, job.lr.image, samples.images, psnr, place, converged, doubts)]
