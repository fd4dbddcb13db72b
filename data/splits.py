"""The standard splits of the face data sets, and splits of one's own.

    python -m data.splits celebahq CelebAMask-HQ.zip --out lists
    python -m data.splits ffhq images1024x1024 --out lists

writes lists/train.txt, lists/val.txt and lists/test.txt, a picture's name in each line, after checking that the data
set is complete. Training does not need the lists: `--data.split celebahq` makes the same ones, and `--data.split lists`
takes them as they are, so that a split of one's own is a folder with such files.

celeba    the pictures of CelebA, by their numbers (000001.jpg …): 162,770 / 19,867 / 19,962 of different people
celebahq  CelebA-HQ as CelebAMask-HQ numbers it (0.jpg … 29999.jpg): 24,183 / 2,993 / 2,824, by the part of CelebA that
          the picture was made from; needs CelebA-HQ-to-CelebA-mapping.txt, which comes with CelebAMask-HQ
ffhq      the first 60,000 (00000.png …) for training, the last 10,000 for validation
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data.console import path_option, print_error, print_line, run_command
from data.contents import MAPPING, Contents
from data.files import check_names, check_replaceable, owned_file, read_names, write_names

PARTS = ("train", "val", "test")
# The last picture of each part in CelebA's list_eval_partition.txt, which has no other content: a list written from
# these numbers has the MD5 of the published file (tests/test_splits.py).
CELEBA_ENDS = (162_770, 182_637, 202_599)
FFHQ_ENDS = (59_999, 69_999)  # README of NVlabs/ffhq-dataset; the StyleGAN papers train on all 70,000
CELEBAHQ_COUNT = 30_000
SIZES = {
    "celeba": {"train": 162_770, "val": 19_867, "test": 19_962},
    "celebahq": {"train": 24_183, "val": 2_993, "test": 2_824},
    "ffhq": {"train": 60_000, "val": 10_000, "test": 0},
}
# SHA-256 of `_canonical`, over the mapping's content whatever its header and blanks; from the copy in
# mit-han-lab/anycost-gan, which gives the three published sizes.
MAPPING_SHA256 = "729d9d869fe81b8c837ae3b536457deed7b4254fefa718f2c3ba372ca6ecd538"

Companion = Callable[[str], bytes]


def celeba_part(number: int) -> str:
    """Gives the part, train, val or test, of a picture from 1 to 202,599 of CelebA; no person occurs in two.

    Raises:
        ValueError: If CelebA has no such picture.
    """
    if not 1 <= number <= CELEBA_ENDS[-1]:
        raise ValueError(f"Expected the number of a picture of CelebA, 1 to {CELEBA_ENDS[-1]}, got {number}.")
    return PARTS[bisect_left(CELEBA_ENDS, number)]


def ffhq_part(number: int) -> str:
    """Gives the part of a picture from 0 to 69,999 of FFHQ: the first 60,000 are for training, the others val.

    Raises:
        ValueError: If FFHQ has no such picture.
    """
    if not 0 <= number <= FFHQ_ENDS[-1]:
        raise ValueError(f"Expected the number of a picture of FFHQ, 0 to {FFHQ_ENDS[-1]}, got {number}.")
    return PARTS[bisect_left(FFHQ_ENDS, number)]


def read_mapping(text: str) -> dict[int, int]:
    """Reads the content of CelebA-HQ-to-CelebA-mapping.txt, lines of "idx orig_idx orig_file" below a header.

    A mapping other than the published one is taken with a warning.

    Returns:
        Number in CelebA (1 to 202,599) of each picture of CelebA-HQ (0 to 29,999).

    Raises:
        ValueError: If a line is something else, or a picture occurs twice.
    """
    mapping: dict[int, int] = {}
    for i, line in enumerate(text.splitlines(), start=1):
        match = re.fullmatch(r"\s*(\d+)\s+(\d+)\s+0*(\d+)\.\w+\s*", line)
        if match is None:
            if not line.strip() or (i == 1 and line.split()[0] == "idx"):
                continue
            raise ValueError(f"{MAPPING}: expected 'idx orig_idx orig_file' in line {i}, got {line[:60]!r}.")
        index, _, number = map(int, match.groups())
        if index in mapping:
            raise ValueError(f"{MAPPING}: picture {index} occurs twice, again in line {i}; get the file anew.")
        mapping[index] = number
    if hashlib.sha256(_canonical(mapping).encode()).hexdigest() != MAPPING_SHA256:
        warnings.warn(f"{MAPPING} is not the published one of 30,000 lines; the split will differ.", stacklevel=2)
    return mapping


def _canonical(mapping: dict[int, int]) -> str:
    return "".join(f"{index} {mapping[index]}\n" for index in sorted(mapping))


def split_names(split: str, names: Sequence[str], companion: Companion) -> dict[str, list[str]]:
    """Divides the pictures of a data set.

    For the standard splits a picture's number is that of its file name, such as 00012.png or img00012.png; pictures
    named otherwise, such as the masks of CelebAMask-HQ, are left out.

    Args:
        split: "celeba", "celebahq", "ffhq", or a folder with train.txt, val.txt, test.txt (those that there are), which
            hold a picture's name or stem in each line.
        names: The pictures of the data set, paths within it.
        companion: Reads another file of the data set by name; `data.faces.Faces` looks for it in and next to it.

    Returns:
        The names in each part, in the order given.

    Raises:
        ValueError: If the names do not fit the split.
        FileNotFoundError: If the mapping of CelebA-HQ is missing, or there is no such split.
    """
    if split not in SIZES:
        return _split_by_lists(Path(split).expanduser(), names)
    numbers = _numbers(split, names)
    if split == "celebahq":
        mapping = read_mapping(companion(MAPPING).decode("utf-8", "replace"))

        def part_of(number: int) -> str:
            if number not in mapping:
                raise ValueError(f"the mapping has no picture {number}; CelebAMask-HQ counts from 0 to 29999.")
            return celeba_part(mapping[number])
    else:
        part_of = celeba_part if split == "celeba" else ffhq_part
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for number, name in numbers.items():
        try:
            parts[part_of(number)].append(name)
        except ValueError as error:
            raise ValueError(f"{name} does not fit the split {split}: {error}") from error
    return parts


def _numbers(split: str, names: Sequence[str]) -> dict[int, str]:
    """Gives the names by number, in the order given."""
    numbers: dict[int, str] = {}
    for name in names:
        match = re.fullmatch(r"\D*(\d+)", Path(name).stem)
        if match is None:
            continue
        number = int(match[1])
        if number in numbers:
            raise ValueError(
                f"Expected each picture once, but {numbers[number]} and {name} have the same number; name the folder "
                "of one size."
            )
        numbers[number] = name
    if split == "celebahq" and CELEBAHQ_COUNT in numbers and 0 not in numbers:
        raise ValueError(
            "These pictures of CelebA-HQ count from 1 to 30000; the split goes by CelebAMask-HQ's names, 0 to 29999. "
            "Rename each to one less."
        )
    return numbers


def _split_by_lists(folder: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Divides pictures by lists of their names."""
    lists = {part: folder / f"{part}.txt" for part in PARTS}
    if not any(path.is_file() for path in lists.values()):
        raise FileNotFoundError(
            f"Expected a split, {', '.join(SIZES)} or a folder with train.txt and val.txt, got {str(folder)!r}; "
            "python -m data.splits writes such a folder."
        )
    by_name: dict[str, str | None] = {}
    for name in names:
        for key in {name, Path(name).name, Path(name).stem}:
            by_name[key] = None if key in by_name else name  # of two with the same stem, only full names count
    parts: dict[str, list[str]] = {}
    for part, path in lists.items():
        wanted = [_written(line, by_name) for line in read_names(path)] if path.is_file() else []
        missing = [line for line in wanted if by_name.get(line) is None]
        if missing:
            raise ValueError(f"{path}: {len(missing)} pictures are missing or not unique, the first is {missing[0]!r}.")
        chosen = {by_name[line] for line in wanted}
        parts[part] = [name for name in names if name in chosen]
    both = set(parts["train"]) & (set(parts["val"]) | set(parts["test"]))
    if both:
        raise ValueError(f"{folder}: {min(both)} is in train.txt and in another list; {len(both)} pictures are.")
    return parts


def check_sizes(split: str, parts: dict[str, list[str]]) -> list[str]:
    """Says in a line each which parts of a standard split are not as large as they should be."""
    sizes = SIZES.get(split, {})
    return [
        f"{split}, {part}: {len(names)} pictures of {sizes[part]}"
        for part, names in parts.items()
        if part in sizes and len(names) != sizes[part]
    ]


def _written(line: str, known: Mapping[str, str | None]) -> str:
    """Takes a line as it stands if that is a name; people's lists may have blanks around them."""
    return line if line in known else line.strip()


def write_lists(parts: dict[str, list[str]], folder: Path, overwrite: bool = False) -> None:
    """Writes train.txt, val.txt and test.txt, one name in each line; empty parts are left out.

    Raises:
        ValueError: If a list must not be replaced; none is written then.
    """
    lists = {folder / f"{part}.txt": names for part, names in parts.items() if names}
    for path, names in lists.items():
        check_names(names)
        check_replaceable(path, overwrite)
    for path, names in lists.items():
        with owned_file(path, overwrite) as partial:
            write_names(partial, names)


def add_split_options(parser: argparse._ActionsContainer, part: str = "val") -> None:
    """Adds --split and --part, which every program that reads faces hands on to `data.faces.Faces`."""
    parser.add_argument(
        "--split",
        metavar="NAME",
        help=f"use one part of the data: {', '.join(SIZES)}, or a folder with train.txt, val.txt, test.txt "
        "(default: all pictures)",
    )
    parser.add_argument("--part", choices=PARTS, default=part, help="which part of the split (%(default)s)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the lists of a standard split; the exit status is 1 if that fails, or the data set is not complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", choices=SIZES)
    parser.add_argument("source", help="the data set, a folder or a zip")
    parser.add_argument(
        "--out", type=path_option, required=True, metavar="DIR", help="folder for train.txt, val.txt, test.txt"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace lists that an earlier call wrote")
    args = parser.parse_args(arguments)
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out: expected a folder, {args.out} is a file; name another place")
    return run_command("data.splits", lambda: _write_split(args))


def _write_split(args: argparse.Namespace) -> int:
    contents = Contents(args.source)
    parts = split_names(args.split, contents.pictures, contents.companion)
    if not any(parts.values()):
        raise ValueError(f"{contents.source}: no picture is named as in {args.split}.")
    write_lists(parts, args.out, args.overwrite)
    for part, names in parts.items():
        print_line(f"{part}: {len(names)} pictures")
    problems = check_sizes(args.split, parts)
    for problem in problems:
        print_error(f"data.splits: not complete: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
