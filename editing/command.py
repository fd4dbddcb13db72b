"""Editing on a command line: its options, and what is told of it. Numpy alone, as `export.run` needs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.pictures import strip_sheet
from editing.boundary import STRIP, Boundary, Edit, apply_edits, parse_edit, read_boundaries

STRIP_FILE = "strip.png"


@dataclass(frozen=True)
class Editing:
    """What is asked for.

    Attributes:
        edits: Boundaries with strengths; they add up.
        strip: The boundary of the five-step picture, None for no such picture.
        consistent: Keep the downscaled picture as it is.
    """

    edits: tuple[Edit, ...] = ()
    strip: Boundary | None = None
    consistent: bool = False

    def describe(self) -> list[dict[str, Any]]:
        """The edits for report.json."""
        return [{"name": b.name, "strength": s, "sha256": b.sha256, "layers": list(b.layers)} for b, s in self.edits]


def add_edit_options(group: argparse._ArgumentGroup, consistent: bool = True) -> None:
    """Adds --edit, --edit-strip and, where there are derivatives, --edit-consistent to a group of options."""
    add = group.add_argument
    add(
        "--edit",
        metavar="NAME=STRENGTH",
        action="append",
        default=[],
        help="change every candidate, such as smile=+2, in standard deviations; may be given several times",
    )
    add(
        "--edit-strip",
        metavar="NAME",
        help=f"also write {STRIP_FILE}: every candidate at {', '.join(f'{s:+g}' for s in STRIP)}",
    )
    if consistent:
        add(
            "--edit-consistent",
            action="store_true",
            help="take out of the edits what would show in the input, where that is possible",
        )


def check_edit_options(args: argparse.Namespace) -> None:
    """Reads the options that `add_edit_options` added, as far as that goes without boundaries; `args.edit` changes.

    Raises:
        ValueError: If they cannot be followed, in words for the command line.
    """
    pairs = []
    for text in args.edit:
        try:
            pairs.append(parse_edit(text))
        except ValueError as error:
            raise ValueError(f"--edit: {error}") from error
    args.edit = pairs
    if getattr(args, "edit_consistent", False) and not args.edit:
        raise ValueError("--edit-consistent: expected an --edit with it")


def read_editing(args: argparse.Namespace, folder: Path, generator_sha256: str | None) -> Editing:
    """Reads the boundaries that the options name.

    Args:
        args: After `check_edit_options`.
        folder: With the boundaries.
        generator_sha256: The generator that they must be for; None accepts any.

    Returns:
        What is asked for.

    Raises:
        ValueError: If there is no such boundary, or one is damaged or for another generator.
    """
    names = [name for name, _ in args.edit] + ([args.edit_strip] if args.edit_strip else [])
    found = read_boundaries(folder, names, generator_sha256) if names else {}
    edits = tuple((found[name], strength) for name, strength in args.edit)
    consistent = bool(getattr(args, "edit_consistent", False))
    return Editing(edits, found[args.edit_strip] if args.edit_strip else None, consistent)


def write_strip(
    boundary: Boundary,
    ws: np.ndarray,
    draw: Callable[[np.ndarray], np.ndarray],
    path: Path,
    strengths: Sequence[float] = STRIP,
) -> None:
    """Draws faces at five strengths of an edit, one row each.

    Args:
        boundary: The edit.
        ws: Codes (k, L, D).
        draw: Draws codes (k, L, D): faces (k, 3, R, R) in [-1, 1].
        path: The picture to write.
        strengths: In standard deviations.
    """
    steps = [draw(apply_edits(ws, [(boundary, strength)])) for strength in strengths]  # (k, 3, R, R) each
    titles = [f"{boundary.name} {strength:+g}" for strength in strengths]
    strip_sheet(titles, np.stack(steps, axis=1)).save(path, format="PNG")


def tell_of_edits(
    report: dict[str, Any], editing: Editing, visible: Sequence[float], kept: Sequence[float] | None = None
) -> None:
    """Adds to a report what was edited, and how much of it shows in the downscaled picture.

    Args:
        report: From `data.report.make_report`; changed in place.
        editing: What was asked for.
        visible: Root mean square change of each candidate's downscaled picture, in units of [0, 1] pictures.
        kept: Share of each face's change that is left where what shows was projected out.
    """
    if editing.strip is not None:
        report["edit_strip"] = {"name": editing.strip.name, "sha256": editing.strip.sha256, "file": STRIP_FILE}
    if not editing.edits:
        return
    report["edits"], report["edit_consistent"] = editing.describe(), editing.consistent
    for i, candidate in enumerate(report["candidates"]):
        candidate["edit_visible_in_lr"] = round(float(visible[i]), 6)
        if kept is not None:
            candidate["edit_kept"] = round(float(kept[i]), 4)
