"""Edits: their options, and the picture of a sweep. Needs no torch."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from data.figures import strip_sheet
from editing.direction import SWEEP, EditPlan, parse_edit, read_directions

SWEEP_FILE = "sweep.png"


def add_edit_options(group: argparse._ArgumentGroup) -> None:
    """Adds --edit, --edit-sweep and --edit-preserve-lr to a group of options."""
    add = group.add_argument
    add(
        "--edit",
        metavar="NAME=STRENGTH",
        action="append",
        default=[],
        help="change every sample, such as smile=+2, in standard deviations; may be given several times",
    )
    add(
        "--edit-sweep",
        metavar="NAME",
        help=f"also write {SWEEP_FILE}: every sample at {', '.join(f'{s:+g}' for s in SWEEP)}",
    )
    add(
        "--edit-preserve-lr",
        action="store_true",
        help="let edited samples downscale to the input, which takes out of the edits what would show in it",
    )


def check_edit_options(args: argparse.Namespace) -> None:
    """Checks the options that `add_edit_options` added, as far as that goes without the bundle; raises ValueError."""
    for text in args.edit:
        try:
            parse_edit(text)
        except ValueError as error:
            raise ValueError(f"--edit: {error}") from error
    if args.edit_sweep == "":
        raise ValueError("--edit-sweep: expected the name of a direction, got an empty one")
    if args.edit_preserve_lr and not args.edit:
        raise ValueError("--edit-preserve-lr: expected an --edit with it")


def read_edit_plan(args: argparse.Namespace, folder: Path, generator_sha256: str | None) -> EditPlan:
    """Reads the directions that the options name; see `editing.direction.read_directions`."""
    edits = [parse_edit(text) for text in args.edit]
    names = [name for name, _ in edits] + ([args.edit_sweep] if args.edit_sweep else [])
    found = read_directions(folder, names, generator_sha256) if names else {}
    sweep = found[args.edit_sweep] if args.edit_sweep else None
    return EditPlan(tuple((found[name], strength) for name, strength in edits), sweep, args.edit_preserve_lr)


def write_sweep(plan: EditPlan, faces: np.ndarray, path: Path) -> None:
    """Writes the picture of a sweep, a row for each sample: faces (k, 5, 3, R, R) at the strengths of `SWEEP`."""
    name = plan.sweep.name if plan.sweep else ""
    strip_sheet([f"{name} {strength:+g}" for strength in SWEEP], faces).save(path, format="PNG")
