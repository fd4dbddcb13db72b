"""What is shown of the faces that were written: a line each, and a picture of the first ones; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.console import FAILURES, format_error, print_error, print_line
from data.figures import overview, save_overview
from data.files import atomic_write, check_replaceable
from data.image_io import is_result
from data.listing import Picture

if TYPE_CHECKING:
    from torch import Tensor

OVERVIEW = "overview.png"


@dataclass(frozen=True)
class FaceResult:
    """What one input became.

    Attributes:
        title: Its title in the overview.
        lr: The low-resolution face (3, s, s) in [-1, 1].
        images: Its samples (k, 3, R, R) in [-1, 1].
        lr_psnr: How well each downscales to the input, in dB.
        folder: Where they were written.
        converged: How many samples a search brought within its tolerance, None if nothing was searched.
        doubts: Why they should not be believed.
    """

    title: str
    lr: np.ndarray | Tensor
    images: np.ndarray | Tensor
    lr_psnr: list[float]
    folder: Path
    converged: int | None = None
    doubts: Sequence[str] = ()


def write_overview(faces: Sequence[FaceResult], out: Path, overwrite: bool) -> bool:
    """Plots the overview of the faces that were written, and says what to look at.

    Args:
        faces: The first OVERVIEW_ROWS of them.
        out: The folder that gets overview.png.
        overwrite: Replace the overview of an earlier call.

    Returns:
        Whether all went well.
    """
    if not faces:
        return True
    target = out / OVERVIEW
    first = faces[0].folder / "grid.png"
    finished = True
    try:
        if is_result(target) and not overwrite:
            print_error(f"note: {target} is of an earlier call and stays; --overwrite replaces it")
        else:
            check_replaceable(target, overwrite, ours=is_result(target))
            with atomic_write(target) as partial:
                save_overview(overview([(face.title, face.lr, face.images) for face in faces]), partial)
            first = target if len(faces) > 1 else first
    except FAILURES as error:
        print_error(f"{target}: could not be written ({format_error(error)}); the faces are complete")
        finished = False
    print_line(f"Open {first}")
    return finished


def summarize_face(path: Picture, face: FaceResult) -> str:
    """Says in one line what became of an input."""
    shown = (
        " ".join(f"{db:.0f}" for db in face.lr_psnr)
        if len(face.lr_psnr) <= 4
        else (f"{min(face.lr_psnr):.0f} to {max(face.lr_psnr):.0f}")
    )
    search = "" if face.converged is None else f", {face.converged} of {len(face.lr_psnr)} converged"
    doubts = f"; doubtful: {', '.join(face.doubts)}" if face.doubts else ""
    return f"{path.name}: {face.lr.shape[-1]} px, LR-PSNR {shown} dB{search}{doubts} -> {face.folder}"
