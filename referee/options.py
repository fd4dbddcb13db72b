"""The options of evaluate.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from data.degradation import find_degradation
from data.reading import MIN_SIDE
from models.bundle import DEFAULT_BUNDLE
from models.device import choose_device
from referee.methods import DEFAULT_METHODS, METHODS


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Makes the reader of the command line; its description is the program's."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--bundle",
        action="append",
        metavar="[NAME=]DIR",
        help="folder of the bundle to measure; NAME=DIR adds the encoder of another one (default: bundles/celeba64)",
    )
    add("--data", default="celeba128_val.zip", help="zip or folder of square faces (%(default)s)")
    add("--faces", type=int, default=200, help="use the first so many in sorted order (%(default)s)")
    add("--lr", type=int, nargs="+", default=[16, 8], metavar="PX", help="LR sizes (16 8)")
    add(
        "--degradation",
        nargs="+",
        default=["clean"],
        metavar="NAME",
        help="clean, noise25, noise50, salt-and-pepper, jpeg, motion-blur, or other strengths (clean)",
    )
    add("--k", type=int, default=4, help="candidates per face (%(default)s)")
    add(
        "--methods",
        nargs="+",
        choices=[*METHODS, "all"],
        default=list(DEFAULT_METHODS),
        help=f"which to compare, of {', '.join(METHODS)}, all ({' '.join(DEFAULT_METHODS)})",
        metavar="NAME",
    )
    add("--refine", type=int, default=10, metavar="STEPS", help="of the method refined (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the candidates and degradations (%(default)s)")
    add(
        "--group-by", action="append", default=[], metavar="FILE:COLUMN", help="success per group, by a table of labels"
    )
    add("--attributes", metavar="FILE", help="classifier that counts attributes in results and truth")
    add("--niqe", metavar="FILE", help="pristine model for NIQE; `python -m referee.niqe` fits one")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 …, mps; auto takes CUDA if it is there (%(default)s)")
    add("--out", default="results", help="folder for what is written (%(default)s)")
    add("--keep", action="store_true", help="keep what was measured: a later run measures only what is new")
    return parser


def parse(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Reads the command line; ends the program with status 2 if an option cannot be followed.

    Args:
        argv: Arguments in place of those of the process.
        description: Of the program.

    Returns:
        The options: `bundle` (a path) and `others` (paths by name), `degradation` (objects), `device`, and the rest.
    """
    reader = make_parser(description)
    args = reader.parse_args(argv)
    for name, least in (("faces", 1), ("k", 1), ("seed", 0), ("refine", 1)):
        if getattr(args, name) < least:
            reader.error(f"argument --{name}: expected at least {least}, got {getattr(args, name)}")
    if min(args.lr) < MIN_SIDE:
        reader.error(f"argument --lr: expected at least {MIN_SIDE} px, got {min(args.lr)}")
    for name in ("data", "out"):
        if not getattr(args, name):  # as from an unset variable; Path("") would be the current folder
            reader.error(f"argument --{name}: expected a path, got an empty name")
        setattr(args, name, Path(getattr(args, name)))
    args.methods = list(METHODS) if "all" in args.methods else list(dict.fromkeys(args.methods))
    args.bundle, args.others = _read_bundles(args.bundle or [], args.methods, reader)
    args.lr = list(dict.fromkeys(args.lr))
    try:
        args.degradation = [find_degradation(name) for name in dict.fromkeys(args.degradation)]
    except ValueError as error:
        reader.error(f"argument --degradation: {error}")
    device = args.device
    if device == "auto" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"  # one GPU for each process of torchrun
    try:
        args.device = choose_device(device)
    except ValueError as error:
        reader.error(f"argument --device: {error}")
    return args


def _read_bundles(
    given: Sequence[str], methods: Sequence[str], reader: argparse.ArgumentParser
) -> tuple[Path, dict[str, Path]]:
    """Tells the bundle that is measured from those that add a row."""
    main, others = [], {}
    for text in given:
        name, separator, folder = text.rpartition("=")
        if not folder or (separator and (not name or name in methods or name in others or not _is_plain(name))):
            reader.error(
                f"argument --bundle: expected DIR or NAME=DIR, NAME of letters, digits and -_. and of no other method, "
                f"got {text!r}"
            )
        if separator:
            others[name] = Path(folder)
        else:
            main.append(Path(folder))
    if len(main) > 1:
        reader.error(f"argument --bundle: expected one bundle without a name, got {', '.join(map(str, main))}")
    return (main[0] if main else DEFAULT_BUNDLE), others


def _is_plain(name: str) -> bool:
    """Says whether a name can be part of a file's."""
    return name[0] != "." and all(c.isascii() and (c.isalnum() or c in "-_.") for c in name)
