"""Cuts faces out of photos as FFHQ shows them: what training, evaluation and infer.py expect.

    python -m data.align photo.jpg holiday/ --out faces                  # 1024 px, every face of every photo
    python -m data.align holiday --out faces --size 256 --largest        # one face a photo
    python -m data.align holiday --out faces --sheet sheet.png           # and a sheet to look at
    python -m data.align img_align_celeba --landmarks list_landmarks_align_celeba.txt --out datasets/celeba --size 128

INPUT is photos or folders. The largest face of photo.jpg becomes photo.png, the next photo_face2.png and so on. Faces
are found by MTCNN, whose weights come with the package facenet-pytorch; nothing is downloaded. With --landmarks nothing
is searched: the file gives five points for each picture, as CelebA's lists do.

A photo without a face, or one that cannot be read, is named with the reason; the others continue, and the exit status
is 1 at the end. A photo whose faces are there already is skipped, so a repeated call continues an interrupted one.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from data.console import (
    WrongOption,
    blame,
    format_error,
    number_option,
    path_option,
    print_error,
    print_line,
    run_command,
)
from data.face_finder import CONFIDENCE, FaceFinder
from data.ffhq_crop import Square, cut_out, ffhq_square
from data.figures import OVERVIEW_ROWS, overview
from data.files import check_replaceable, check_writable, owned_file, sha256_of
from data.image_io import from_uint8, read_bytes
from data.listing import find_images
from data.report import folder_names

MARK = "amortized-pulse/face/1"  # in the files, under "Software"
SHEET_TILE = 160  # px
FURTHER_FACES = 6  # after the first, on the sheet

Finder = Callable[[Path, Image.Image], np.ndarray]


def read_landmarks(path: Path) -> dict[str, np.ndarray]:
    """Reads lists such as CelebA's list_landmarks_align_celeba.txt: a name and ten numbers in each line.

    Args:
        path: A text with blanks, or a table with commas, semicolons or tabs; lines of another form at its beginning are
            a header. Names may hold blanks.

    Returns:
        Five points (5, 2) for each file name: left eye, right eye, nose, left and right corner of the mouth.

    Raises:
        ValueError: If a line below the first points is something else, or there are no points at all.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a text of names and points ({error}).") from error
    lines = [line for line in text.splitlines() if line.strip()]
    delimiter = next((mark for mark in ";\t," if lines and lines[-1].count(mark) >= 10), None)
    rows = list(csv.reader(lines, delimiter=delimiter)) if delimiter else [line.rsplit(None, 10) for line in lines]
    landmarks: dict[str, np.ndarray] = {}
    for line, row in zip(lines, rows, strict=False):
        name, *values = [cell.strip() for cell in row]
        try:
            numbers = np.array([cell.replace(",", ".") for cell in values], np.float64)
            landmarks[name] = numbers.reshape(5, 2)
        except ValueError:
            if landmarks:
                raise ValueError(f"{path}: expected a name and ten numbers, got the line {line[:60]!r}.") from None
    if not landmarks:
        raise ValueError(f"{path}: no line holds a name and ten numbers, the five points of a face.")
    return landmarks


@dataclass(frozen=True)
class Task:
    """What is to be done with every photo.

    Attributes:
        find: Gives the five points of each face (n, 5, 2) of a photo, the largest first.
        size: Width in pixels of the faces.
        smallest_square: Faces whose square has fewer pixels a side are skipped: they would be blurred.
        largest: Take the first face alone.
        overwrite: Replace faces that are there.
        settings: All that the result depends on besides the photo, in words: other settings are another job.
    """

    find: Finder
    size: int
    smallest_square: int
    largest: bool
    overwrite: bool
    settings: str = ""


def align(path: Path, task: Task) -> tuple[Image.Image, list[tuple[Square, Image.Image]]]:
    """Cuts the faces out of one photo: the photo, and of each face its square and the picture.

    Raises:
        ValueError: If the photo cannot be read, or shows no face, or none that is large enough.
    """
    picture = Image.fromarray(read_bytes(path))
    try:
        points = task.find(path, picture)
    except RuntimeError as error:  # what torch says of anything, such as too little memory
        raise ValueError(f"the search for faces failed ({format_error(error)}); use a smaller picture") from error
    if not len(points):
        smallest = getattr(task.find, "smallest_in", lambda picture: 20)(picture)
        raise ValueError(
            f"no face found in any of four turns; a frontal one of at least {smallest} px from eyebrows to chin is "
            "needed, --min-face searches for smaller"
        )
    squares = sorted((ffhq_square(face) for face in points), key=lambda square: -square.side)
    large = [square for square in squares if square.side >= task.smallest_square]
    if not large:
        raise ValueError(
            f"the largest face takes up {squares[0].side:.0f} px, less than {task.smallest_square}; "
            "--smallest takes smaller ones, which will be blurred"
        )
    chosen = large[:1] if task.largest else large
    return picture, [(square, cut_out(picture, square, task.size)) for square in chosen]


def _targets(name: str, count: int, out: Path, taken: set[str]) -> list[Path]:
    """Names the files of a photo's faces; further faces pass by the names of other photos."""
    names, number = [name], 2
    while len(names) < count:
        if f"{name}_face{number}".casefold() not in taken:
            names.append(f"{name}_face{number}")
        number += 1
    taken.update(name.casefold() for name in names)
    return [out / f"{name}.png" for name in names]


def _job_of(target: Path) -> str | None:
    """Says what a file was made of, by its header; None if it is none of our faces."""
    try:
        with Image.open(target, formats=["PNG"]) as there:
            return there.info.get("Job", "") if there.info.get("Software") == MARK else None
    except Exception:  # decoders raise whatever they stumble over
        return None


def _is_face(path: Path) -> bool:
    return _job_of(path) is not None


def _is_done(target: Path, job: str, overwrite: bool) -> bool:
    """Says whether a photo's faces are there already.

    Raises:
        ValueError: If what is there is something else, and must not be replaced.
    """
    made_of = _job_of(target)
    if made_of == job and not overwrite:
        return True
    if made_of is not None and not overwrite:
        raise ValueError(
            f"{target} exists, made of another photo or otherwise; --overwrite replaces it, or name another --out"
        )
    check_replaceable(target, overwrite, ours=made_of is not None)
    return False


def _save(faces: Sequence[Image.Image], targets: Sequence[Path], job: str, overwrite: bool) -> None:
    """Writes the faces of a photo, the first one last: where it is, the others are."""
    notes = PngInfo()
    notes.add_text("Software", MARK)
    notes.add_text("Job", job)
    for face, target in reversed(list(zip(faces, targets, strict=True))):
        with owned_file(target, overwrite or _job_of(target) == job, ours=_is_face) as partial:
            face.save(partial, format="PNG", pnginfo=notes)


def _row(name: str, photo: Image.Image, faces: Sequence[Image.Image]) -> tuple[str, np.ndarray, np.ndarray]:
    """Makes a row of the sheet: the photo in a white square, and its faces."""
    small = photo.copy()
    small.thumbnail((SHEET_TILE, SHEET_TILE))
    tile = Image.new("RGB", (SHEET_TILE, SHEET_TILE), "white")
    tile.paste(small, ((SHEET_TILE - small.width) // 2, (SHEET_TILE - small.height) // 2))
    shown = [face.resize((SHEET_TILE, SHEET_TILE), Image.Resampling.LANCZOS) for face in faces[: 1 + FURTHER_FACES]]
    arrays = [from_uint8(np.asarray(image).transpose(2, 0, 1)) for image in (tile, *shown)]
    return name, arrays[0], np.stack(arrays[1:])


def _hash_of(path: Path) -> str:
    """Gives what tells a photo from others, whatever its name; empty if it cannot be read, which is said later."""
    try:
        return sha256_of(path)[:16]
    except OSError:
        return ""


def align_all(paths: Sequence[Path], out: Path, task: Task, sheet: Path | None = None, sheet_job: str = "") -> int:
    """Aligns photos into a folder.

    Args:
        paths: The photos.
        out: The folder, made if need be.
        task: What is to be done.
        sheet: File for a picture of the first photos and their faces.
        sheet_job: What that is made of, see `data.files.owned_file`.

    Returns:
        How many photos failed; each was named with its reason.
    """
    names = folder_names(paths, reserved=set())
    taken = {name.casefold() for name in names}
    inputs = {os.path.realpath(path) for path in paths}
    rows: list[tuple[str, np.ndarray, np.ndarray]] = []
    failed, done = 0, 0
    for path, name in zip(tqdm(paths, "photos", disable=None), names, strict=True):
        try:
            job = f"{_hash_of(path)}, {task.settings}"
            if _is_done(out / f"{name}.png", job, task.overwrite):
                done += 1
                continue
            photo, faces = align(path, task)
            targets = _targets(name, len(faces), out, taken)
            ours = [target for target in targets if os.path.realpath(target) in inputs]
            if ours:
                raise ValueError(f"{ours[0]} is one of the photos; name another folder with --out")
            for target in targets[1:]:
                made_of = _job_of(target)
                check_replaceable(target, task.overwrite or made_of == job, ours=made_of is not None)
            _save([face for _, face in faces], targets, job, task.overwrite)
        except (ValueError, OSError, MemoryError) as error:
            print_error(f"{path}: {format_error(error).removeprefix(f'{path}: ')}")
            failed += 1
            continue
        for (square, _), target in zip(faces, targets, strict=True):
            enlarged = f", enlarged to {task.size} px" if square.side < task.size else ""
            print_line(f"{path}: a face of {square.side:.0f} px{enlarged} -> {target}")
        if sheet is not None and len(rows) < OVERVIEW_ROWS:
            rows.append(_row(name, photo, [face for _, face in faces]))
    if done:
        print_line(f"{done} photos were aligned before; --overwrite does it again")
    if sheet is not None and rows:
        with owned_file(sheet, task.overwrite, sheet_job) as partial:
            overview(rows).save(partial, format="PNG")
        print_line(f"Open {sheet}")
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="photos, or folders of photos")
    parser.add_argument("--out", type=path_option, required=True, metavar="DIR", help="folder for the faces")
    parser.add_argument(
        "--size", type=number_option, default=1024, metavar="PX", help="width of the faces (default: 1024)"
    )
    parser.add_argument("--largest", action="store_true", help="take the largest face of each photo alone")
    parser.add_argument(
        "--smallest", type=number_option, metavar="PX",
        help="pass by faces whose square is smaller in the photo (default: a quarter of --size)",
    )  # fmt: skip
    parser.add_argument(
        "--min-face", type=number_option, metavar="PX",
        help="smallest face searched for, from eyebrows to chin (default: 1/20 of the photo, at least 20)",
    )  # fmt: skip
    parser.add_argument(
        "--confidence", type=float, default=CONFIDENCE, metavar="P",
        help=f"the least probability of a face, 0 to 1 (default: {CONFIDENCE})",
    )  # fmt: skip
    parser.add_argument("--landmarks", type=path_option, metavar="FILE", help="five points of each picture; see above")
    parser.add_argument(
        "--sheet", type=path_option, metavar="FILE", help="a picture of the first photos and their faces"
    )
    parser.add_argument("--overwrite", action="store_true", help="align again what is there already")
    parser.add_argument("--device", default="cpu", help="where faces are searched for (default: cpu)")
    return parser


def _finder(args: argparse.Namespace) -> Finder:
    """Makes what gives the points of a photo's faces."""
    if args.landmarks is None:
        try:
            return FaceFinder(args.confidence, args.min_face, args.device)
        except RuntimeError as error:  # such as a device that is not there
            raise WrongOption(f"--device: {format_error(error)}") from error
    with blame("--landmarks"):
        landmarks = read_landmarks(args.landmarks)

    def look_up(path: Path, picture: Image.Image) -> np.ndarray:
        points = landmarks.get(path.name)
        if points is None:
            raise ValueError(f"{args.landmarks} has no line for it")
        if not ((points >= -0.5) & (points <= np.array(picture.size) - 0.5)).all():
            raise ValueError(
                f"{args.landmarks} gives points outside its {picture.width} x {picture.height} px: {points.tolist()}; "
                "they are in pixels of the picture as it is shown, x before y"
            )
        return points[None]

    return look_up


def _settings(args: argparse.Namespace, smallest: int) -> str:
    by = f"confidence {args.confidence:g}, min face {args.min_face}"
    if args.landmarks is not None:
        by = f"landmarks {_hash_of(args.landmarks)}"
    return f"{args.size} px, smallest {smallest} px, {'largest' if args.largest else 'all'}, {by}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Aligns the photos that the command line names; the exit status is 1 if one failed."""
    parser = _parser()
    args = parser.parse_args(arguments)
    if not 0 <= args.confidence <= 1:
        parser.error(f"--confidence: expected a probability, 0 to 1, got {args.confidence}")
    smallest = args.size // 4 if args.smallest is None else args.smallest
    sheet_job = f"{_settings(args, smallest)}: {args.inputs}"
    if args.sheet is not None:
        try:
            check_replaceable(args.sheet, args.overwrite, sheet_job)
        except ValueError as error:
            parser.error(f"--sheet: {error}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: expected a folder, {args.out} is a file; name another place")
    return run_command("data.align", lambda: _align(args, smallest, sheet_job), "the faces that were finished stay")


def _align(args: argparse.Namespace, smallest: int, sheet_job: str) -> int:
    finder = _finder(args)
    with blame("--out"):
        check_writable(args.out)
    found = find_images(args.inputs)
    photos = [path for path in found.images if isinstance(path, Path)]
    archives = {path.archive for path in found.images if not isinstance(path, Path)}
    found.problems.extend((path, "is an archive; unpack it into a folder first") for path in sorted(archives))
    for path, reason in [*found.problems, *found.skipped]:
        print_error(f"{path}: {reason}")
    task = Task(finder, args.size, smallest, args.largest, args.overwrite, _settings(args, smallest))
    failed = align_all(photos, args.out, task, args.sheet, sheet_job)
    return 1 if failed or found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
