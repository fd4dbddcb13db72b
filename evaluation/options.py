"""The options of evaluate.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from data.degradation import find_degradation
from data.image_io import MIN_SIDE
from data.splits import add_split_options
from evaluation.methods import DEFAULT_METHODS, METHODS
from evaluation.metrics import DEFAULT_NETWORKS, NETWORKS
from evaluation.truth import GENERATED
from losses.perceptual import TRUNKS
from models.bundle_info import DEFAULT_BUNDLE
from models.device import choose_device

DEFAULT_LR = (16, 8)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Makes the reader of the command line; its description is the program's."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_faces(parser.add_argument_group("what is measured"))
    _add_measures(parser.add_argument_group("how"))
    return parser


def _add_faces(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--bundle",
        action="append",
        metavar="[NAME=]DIR",
        help="folder of the bundle to measure; NAME=DIR adds the encoder of another one (default: bundles/celeba64)",
    )
    add(
        "--methods",
        nargs="+",
        choices=[*METHODS, "all"],
        default=list(DEFAULT_METHODS),
        help=f"which to compare, of {', '.join(METHODS)}, all ({' '.join(DEFAULT_METHODS)})",
        metavar="NAME",
    )
    add(
        "--projection",
        choices=["both", "without", "only"],
        default="both",
        help="rows of each method: as it is, and with back-projection as its last step (%(default)s)",
    )
    add("--search", type=int, default=10, metavar="STEPS", help="of the method amortized+search (%(default)s)")
    add("--data", default="celeba128_val.zip", help=f"zip or folder of square faces, or {GENERATED!r} (%(default)s)")
    add_split_options(group)
    add("--faces", type=int, default=200, help="use the first so many in sorted order (%(default)s)")
    add("--lr", type=int, nargs="+", metavar="PX", help=f"LR sizes ({' '.join(map(str, DEFAULT_LR))})")
    add(
        "--degradation",
        nargs="+",
        default=["clean"],
        metavar="NAME",
        help="clean, noise25, noise50, salt-and-pepper, jpeg, motion-blur, or other strengths (clean)",
    )
    add(
        "--folders",
        nargs=2,
        metavar=("TRUTH", "SAMPLES"),
        help="measure pictures instead: SAMPLES holds NAME/1.png, NAME/2.png … or NAME.png for each face of TRUTH",
    )


def _add_measures(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--networks",
        nargs="+",
        choices=list(NETWORKS),
        default=list(DEFAULT_NETWORKS),
        metavar="NAME",
        help=f"which to measure with, of {', '.join(NETWORKS)}; for distances between sets vgg11 is enough, inception "
        f"gives the FID ({' '.join(DEFAULT_NETWORKS)})",
    )
    add("--lpips", choices=list(TRUNKS), default="squeeze", help="trunk of LPIPS (%(default)s)")
    add("--k", type=int, default=4, help="samples per face, the point estimate among them (%(default)s)")
    add("--seed", type=int, default=0, help="seed of samples, degradations and generated faces (%(default)s)")
    add(
        "--group-by", action="append", default=[], metavar="FILE:COLUMN", help="success per group, by a table of labels"
    )
    add("--attributes", metavar="FILE", help="classifier that counts attributes in samples and truth")
    add("--niqe", metavar="FILE", help="pristine model for NIQE; `python -m evaluation.niqe` fits one")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 …, mps; auto takes CUDA if it is there (%(default)s)")
    add("--out", default="results", help="folder for what is written (%(default)s)")
    add("--overwrite", action="store_true", help="replace what another command wrote into it")
    add("--keep", action="store_true", help="keep what was measured: a later run measures only what is new")


def parse(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Reads the command line; ends the program with status 2 if an option cannot be followed.

    Returns:
        The options: `bundle` (a path) and `others` (paths by name), `degradation` (objects), `device`, and the rest.
    """
    parser = make_parser(description)
    args = parser.parse_args(argv)
    for name, least in (("faces", 1), ("k", 1), ("seed", 0), ("search", 1)):
        if getattr(args, name) < least:
            parser.error(f"argument --{name}: expected at least {least}, got {getattr(args, name)}")
    if args.lr and min(args.lr) < MIN_SIDE:
        parser.error(f"argument --lr: expected at least {MIN_SIDE} px, got {min(args.lr)}")
    if args.folders and args.lr and len(args.lr) > 1:
        parser.error("argument --lr: expected one size with --folders, that of the inputs")
    for name in ("data", "out"):
        if not getattr(args, name):  # as from an unset variable; Path("") would be the current folder
            parser.error(f"argument --{name}: expected a path, got an empty name")
    args.out = Path(args.out)
    args.methods = list(METHODS) if "all" in args.methods else list(dict.fromkeys(args.methods))
    args.bundle, args.others = _read_bundles(args.bundle or [], args.methods, parser)
    if not args.folders:
        args.lr = list(dict.fromkeys(args.lr or DEFAULT_LR))
    _find_objects(args, parser)
    return args


def _find_objects(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Replaces names by degradations and the device."""
    try:
        args.degradation = [find_degradation(name) for name in dict.fromkeys(args.degradation)]
    except ValueError as error:
        parser.error(f"argument --degradation: {error}")
    try:
        args.device = choose_device(args.device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")


def _read_bundles(
    given: Sequence[str], methods: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[Path, dict[str, Path]]:
    """Tells the bundle that is measured from those that add a row."""
    main, others = [], {}
    for text in given:
        name, separator, folder = text.rpartition("=")
        if not folder or (separator and (not name or name in methods or name in others or not _is_plain(name))):
            parser.error(
                f"argument --bundle: expected DIR or NAME=DIR, NAME of letters, digits and -_. and of no other method, "
                f"got {text!r}"
            )
        if separator:
            others[name] = Path(folder)
        else:
            main.append(Path(folder))
    if len(main) > 1:
        parser.error(f"argument --bundle: expected one bundle without a name, got {', '.join(map(str, main))}")
    return (main[0] if main else DEFAULT_BUNDLE), others


def _is_plain(name: str) -> bool:
    """Says whether a name can be part of a file's."""
    return name[0] != "." and all(c.isascii() and (c.isalnum() or c in "-_.") for c in name)
