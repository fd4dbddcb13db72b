"""What infer.py does with its inputs: reads them, samples those of one size together, and writes them from threads."""

from __future__ import annotations

import argparse
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from cli.doubts import NO_FACE, size_doubts
from cli.faces import FaceMaker, Job
from cli.failures import FAILED, note_failures, read_failures
from cli.inputs import Item, read_picture, to_face, warn_of_crop
from cli.jobs import hash_pictures, hash_settings
from cli.overview import OVERVIEW, FaceResult, summarize_face
from cli.photos import PhotoFolder, PhotoReader
from cli.progress import Progress
from data.console import FAILURES, format_error, print_error, print_line
from data.figures import OVERVIEW_ROWS
from data.files import check_folder, is_complete, is_ours, owned_file, remove_partials
from data.image_io import is_result
from data.listing import Picture
from data.report import FACES, REPORT, folder_names
from data.shards import AddFace, open_shard
from pipeline.processes import Processes
from pipeline.upsampler import Upsampler, batch_size

WRITERS = 2  # threads
READ_AHEAD = 32  # inputs


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
        self.photos = PhotoReader(about, args.align, args.downscale)
        self.maker = FaceMaker(upsampler, args)
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
            made = self.maker.make(jobs)
        except FAILURES as error:
            if len(jobs) > 1:  # one bad face never stops the others
                return [pair for job in jobs for pair in self._sample([job], writers)]
            self._fail(jobs[0].item.picture, error)
            self._progress.advance(int(jobs[0].place is None))  # a photo's other faces are on their way
            return []
        return [(job, writers.submit(self.maker.write, job, one)) for job, one in zip(jobs, made, strict=True)]

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
