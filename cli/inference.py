"""What infer.py does with its inputs: reads them, samples those of one size together, and writes them from threads."""

from __future__ import annotations

import argparse
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from cli.doubts import NO_FACE, sample_doubts, size_doubts
from cli.edit_options import SWEEP_FILE, write_sweep
from cli.failures import FAILED, note_failures, read_failures
from cli.inputs import InputFace, Item, read_picture, to_face, warn_of_crop
from cli.jobs import hash_pictures, hash_settings
from cli.overview import OVERVIEW, FaceResult, summarize_face
from cli.photos import PhotoFolder, PhotoReader
from cli.progress import Progress
from cli.sampling_options import summarize_samples
from cli.search_options import TRAJECTORY, search_progress, summarize_search
from data.console import FAILURES, format_error, print_error, print_line
from data.figures import OVERVIEW_ROWS
from data.files import check_folder, is_complete, is_ours, owned_file, owned_folder, remove_partials
from data.image_io import is_result
from data.listing import Picture
from data.report import FACES, REPORT, folder_names, make_report, write_face
from data.shards import AddFace, open_shard
from editing.direction import SWEEP, EditPlan
from pipeline.familiarity import Familiarity
from pipeline.processes import Processes
from pipeline.samples import Samples
from pipeline.upsampler import Upsampler, batch_size, bundle_folder

if TYPE_CHECKING:
    from cli.trajectory import TrajectoryRecorder

WRITERS = 2  # threads
READ_AHEAD = 32  # inputs


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


class Run:
    """Goes through the inputs, whatever happens to single ones: faces of one LR size together, written by threads."""

    def __init__(self, upsampler: Upsampler, args: argparse.Namespace, processes: Processes | None = None) -> None:
        self.upsampler, self.args = upsampler, args
        self.processes = processes or Processes()
        self.failed: dict[str, str] = {}  # reasons by input
        self.made: set[str] = set()  # inputs that failed in an earlier call, and did not now
        self.done = 0  # how many an earlier call had made
        about = upsampler.about
        self.settings = hash_settings(args, about.hash)
        self.batch = args.batch_size or batch_size(about.resolution, args.sampling.wanted.k, about.device)
        edits: EditPlan = args.edits
        edit = edits.offset(*about.styles) if edits.edits else None
        self.wanted = replace(args.sampling.wanted, edit=edit, preserve_lr=edits.preserve_lr)
        self.photos = PhotoReader(about, args.align, args.downscale)
        self.familiarity = Familiarity.load(bundle_folder(args.bundle), about.hash)
        self._known = read_failures(args.out)
        self._shown: dict[int, list[FaceResult]] = {}
        self._progress = Progress(0)
        self._add: AddFace | None = None  # to the file of the archive that is being written
        self._shard: Path | None = None  # that file
        self._needs_overview = "grid" in args.save and (args.overwrite or not is_result(args.out / OVERVIEW))

    @property
    def shown(self) -> list[FaceResult]:
        """The first faces of this process, as many as the overview shows."""
        faces = [face for number in sorted(self._shown) for face in self._shown[number]]
        return faces[:OVERVIEW_ROWS]

    def upsample(self, pictures: Sequence[Picture]) -> None:
        """Upsamples this process's share of the inputs; what fails is named and kept in `failed`."""
        args, (rank, count) = self.args, (self.processes.rank, self.processes.count)
        remove_partials(args.out)
        names = folder_names(pictures)
        if args.archive is not None:  # in which a dot ends a name
            names = folder_names([Path(f"{name.replace('.', '_')}.png") for name in names])
        items = [Item(*row) for row in zip(range(len(names)), pictures, names, strict=True)]
        if args.archive is None:
            own = items[rank::count]
            self._progress = Progress(len(own), rank == 0)
            self._stream(own, args.out)
        else:
            shards = [items[start : start + args.shard_size] for start in range(0, len(items), args.shard_size)]
            self._progress = Progress(sum(map(len, shards[rank::count])), rank == 0)
            for number in range(rank, len(shards), count):
                self._write_shard(args.out / f"faces-{number:05}.{args.archive}", shards[number])
        self._progress.close()

    def note_failures(self, inputs: int) -> bool:
        """Keeps what failed in a file, if there were several inputs, and says what had been made before.

        Returns:
            Whether that could be done.
        """
        if self.done:
            print_line(f"{self.done:,} inputs were there already")
        if inputs == 1 and not self._known:
            return True
        try:
            note_failures(self.args.out, self.failed, self.made)
        except FAILURES as error:
            print_error(format_error(error))
            return False
        if self.failed:
            print_line(f"{len(self.failed):,} failed, see {self.args.out / FAILED}")
        return True

    def _write_shard(self, path: Path, items: list[Item]) -> None:
        """Makes a file of the archive, unless it is there and none of its inputs failed."""
        key = hash_pictures(self.settings, [item.picture for item in items])
        if is_ours(path, key) and not any(str(item.picture) in self._known for item in items):
            for _ in items:
                self._skip()
            return
        self._shard = path
        try:
            with owned_file(path, self.args.overwrite, key) as partial, open_shard(partial) as self._add:
                with TemporaryDirectory(dir=partial.parents[1]) as faces:  # which goes if this process is killed
                    self._stream(items, Path(faces))
        except FAILURES as error:
            self._fail(path, error)

    def _stream(self, items: Sequence[Item], place: Path) -> None:
        """Makes faces in folders of `place`; reads and writes while others are computed."""
        waiting: deque[tuple[Job | PhotoFolder, Future[list[FaceResult]]]] = deque()
        with ThreadPoolExecutor(WRITERS) as writers:
            for batch in self._batches(items, place):
                if isinstance(batch, PhotoFolder):
                    waiting.append((batch, self._sample_photo(batch, writers)))
                else:
                    waiting += self._sample(batch, writers)
                while len(waiting) > 2 * self.batch:  # memory stays flat when the disk is slow
                    self._finish(*waiting.popleft())
            for pair in waiting:
                self._finish(*pair)

    def _batches(self, items: Sequence[Item], place: Path) -> Iterator[list[Job] | PhotoFolder]:
        """Gives photos one by one, faces of one LR size together."""
        waiting: dict[int, list[Job]] = {}
        for job in self._read_ahead(items, place):
            if isinstance(job, PhotoFolder):
                yield job
                continue
            group = waiting.setdefault(job.lr.image.shape[-1], [])
            group.append(job)
            if len(group) == self.batch:
                yield waiting.pop(job.lr.image.shape[-1])
        yield from waiting.values()

    def _read_ahead(self, items: Sequence[Item], place: Path) -> Iterator[Job | PhotoFolder]:
        """Reads in a thread the inputs that are to be made."""
        reader = ThreadPoolExecutor(1)  # one alone, as an archive has one place where it is read
        waiting: deque[tuple[Item, Future[Job | PhotoFolder | None]]] = deque()
        try:
            for item in items:
                waiting.append((item, reader.submit(self._read, item, place / item.name)))
                if len(waiting) > READ_AHEAD:
                    yield from self._take(*waiting.popleft())
            for pair in waiting:
                yield from self._take(*pair)
        finally:
            reader.shutdown(cancel_futures=True)

    def _read(self, item: Item, folder: Path) -> Job | PhotoFolder | None:
        """Reads an input; None if an earlier call has made its faces."""
        key = hash_pictures(self.settings, [item.picture])
        if self.args.archive is None:
            ledger = FACES if (folder / FACES).exists() else REPORT
            if not self._is_needed(item) and is_complete(folder, ledger, key):
                return None
            check_folder(folder, self.args.overwrite, ledger, job=key)  # before the work, and again after it
        image = read_picture(item.picture)
        faces = self.photos.faces(image)
        if faces:
            return PhotoFolder(item, folder, key, faces, self.args)
        lr = to_face(image, self.upsampler.about.lr_sizes, self.args.downscale)
        doubts = [NO_FACE] if faces is not None else []
        return Job(item, folder, key, lr, [*doubts, *size_doubts(lr.image.shape[-1])])

    def _is_needed(self, item: Item) -> bool:
        """Says whether an input is made again though it is there: something failed, or the overview is to show it."""
        return str(item.picture) in self._known or (self._needs_overview and self._is_shown(item))

    def _is_shown(self, item: Item) -> bool:
        return self.processes.rank == 0 and item.number < OVERVIEW_ROWS * self.processes.count

    def _take(self, item: Item, future: Future[Job | PhotoFolder | None]) -> list[Job | PhotoFolder]:
        """Gives what was read of an input."""
        try:
            job = future.result()
        except FAILURES as error:
            self._fail(item.picture, error)
            self._progress.advance()
            return []
        if job is None:
            self._skip()
            return []
        if isinstance(job, Job):
            warn_of_crop(item.picture, *job.lr.origin)
            if self.args.paste_back:
                print_error(f"note: {item.picture}: is taken for a face as a whole, nothing is put back into it")
        return [job]

    def _sample_photo(self, photo: PhotoFolder, writers: ThreadPoolExecutor) -> Future[list[FaceResult]]:
        """Samples the faces of a photo, those of one LR size together."""
        sizes: dict[int, list[Job]] = {}
        for face in photo.faces:
            if face.lr is not None:
                folder, place = photo.partial / face.name, photo.folder / face.name
                job = Job(photo.item, folder, photo.key, face.lr, face.doubts, place)
                sizes.setdefault(face.lr.image.shape[-1], []).append(job)
        batches = [jobs[i : i + self.batch] for jobs in sizes.values() for i in range(0, len(jobs), self.batch)]
        written = [future for jobs in batches for _, future in self._sample(jobs, writers)]
        return writers.submit(self._complete, photo, written)  # waits for those that began before it: never blocks

    @staticmethod
    def _complete(photo: PhotoFolder, written: Sequence[Future[list[FaceResult]]]) -> list[FaceResult]:
        """Lets the folder of a photo appear when all its faces are written."""
        with photo:
            faces = [face for future in written for face in future.result()]
            photo.finish({face.folder.name: face for face in faces})
        return faces

    def _sample(self, jobs: list[Job], writers: ThreadPoolExecutor) -> list[tuple[Job, Future[list[FaceResult]]]]:
        try:
            made = self._make(jobs)
        except FAILURES as error:
            if len(jobs) > 1:  # one bad face never stops the others
                return [pair for job in jobs for pair in self._sample([job], writers)]
            self._fail(jobs[0].item.picture, error)
            self._progress.advance(int(jobs[0].place is None))  # a photo's other faces are on their way
            return []
        return [(job, writers.submit(self._write, job, one)) for job, one in zip(jobs, made, strict=True)]

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
        title = jobs[0].item.picture.name if len(jobs) == 1 else f"{len(jobs)} faces"
        with search_progress(title, len(jobs) * k, recorder) as callback:
            samples, found = self.upsampler.backend.search(lr, self.wanted, args.plan, callback)
        parts = found.split(k)
        return [
            Made(samples[i], summarize_search(args.plan, part), recorder, slice(i * k, i * k + k))
            for i, part in enumerate(parts)
        ]

    def _write(self, job: Job, made: Made) -> list[FaceResult]:
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
        with self._place(job) as partial:
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

    @contextmanager
    def _place(self, job: Job) -> Iterator[Path]:
        """Gives the folder that a face is written into."""
        if self._add is None or job.place is not None:
            with owned_folder(job.folder, self.args.overwrite, REPORT, job=job.key) as partial:
                yield partial
        else:
            job.folder.mkdir()
            yield job.folder

    def _finish(self, done: Job | PhotoFolder, future: Future[list[FaceResult]]) -> None:
        """Tells of faces that were written, and puts them into the archive."""
        picture = done.item.picture
        self._progress.advance()
        try:
            faces = future.result()
            if self._add is not None:
                self._add(done.item.name, done.folder)
                shutil.rmtree(done.folder)
        except FAILURES as error:
            self._fail(picture, error)
            return
        for face in faces:
            print_line(summarize_face(picture, replace(face, folder=self._shard or face.folder)))
        for line in done.summary(self._shard) if isinstance(done, PhotoFolder) else ():
            print_line(line)
        if self._is_shown(done.item):
            self._shown[done.item.number] = faces
        if str(picture) in self._known:
            self.made.add(str(picture))

    def _skip(self) -> None:
        self.done += 1
        self._progress.advance()

    def _fail(self, path: Picture, error: BaseException) -> None:
        reason = format_error(error).removeprefix(f"{path}: ")
        self.failed[str(path)] = reason
        print_error(f"{path}: {reason}")
