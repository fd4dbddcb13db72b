"""Edit directions and their arithmetic, in numpy alone: every runtime edits with the same few lines.

A direction is a step for each style, and the hyperplane n · w + b = 0 in W between faces with an attribute and faces
without it (Shen et al. 2020, "Interpreting the Latent Space of GANs for Semantic Face Editing"), its boundary. An edit
of strength s moves every style,

    w_l ← w_l + s d_l      with n · d = σ,    d the mean of the d_l,

where σ is the standard deviation of n · w over the generator's faces: a strength of 1 means one standard deviation
along the normal for every attribute, whatever else the steps d_l were made to avoid.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from data.console import WrongOption
from data.files import owned_file

FORMAT = "amortized-pulse/direction/1"
FOLDER = "directions"  # of a bundle
MAX_STRENGTH = 100.0
SWEEP = (-2.0, -1.0, 0.0, 1.0, 2.0)  # strengths of `--edit-sweep`

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class UnknownDirection(WrongOption):
    """A name was given of which there is no direction: a mistake on the command line, not in a bundle."""


@dataclass(frozen=True)
class EditDirection:
    """Where an attribute begins in W, and how to move a face towards it."""

    name: str  # such as "smile"; small letters, digits and hyphens
    normal: np.ndarray = field(repr=False)  # n (D,), of unit length; points to faces that have it
    intercept: float  # b; n · w + b is the signed distance of w from the boundary
    steps: np.ndarray = field(repr=False)  # one unit of strength, d_l (L, D)
    generator_sha256: str  # the generator whose W this is
    about: dict[str, Any] = field(default_factory=dict)  # what else is known, as JSON: the classifier's attribute, …
    sha256: str = ""  # of the file that it was read from

    def __post_init__(self) -> None:
        """Checks name, shapes and numbers."""
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"Expected a name of small letters, digits and hyphens, got {self.name!r}.")
        if self.normal.ndim != 1 or self.steps.ndim != 2 or self.steps.shape[1:] != self.normal.shape:
            raise ValueError(f"Expected (D,) and steps (L, D), got {self.normal.shape} and {self.steps.shape}.")
        if not all(np.isfinite(part).all() for part in (self.normal, self.steps, self.intercept)):
            raise ValueError(f"Expected finite numbers in the direction {self.name!r}, got NaN or infinite ones.")
        if abs(float(np.linalg.norm(self.normal)) - 1) > 1e-3:
            raise ValueError(f"Expected a normal of unit length, got one of {np.linalg.norm(self.normal):.3g}.")

    @property
    def sigma(self) -> float:
        """σ = n · d, the standard deviation of n · w over the generator's faces."""
        return float(self.steps.mean(axis=0) @ self.normal)


@dataclass(frozen=True)
class EditPlan:
    """What is asked for; edits add up, in any order."""

    edits: tuple[tuple[EditDirection, float], ...] = ()  # with strengths in standard deviations
    sweep: EditDirection | None = None  # for a picture with the strengths of `SWEEP`
    preserve_lr: bool = False  # project edited faces onto the input itself

    def offset(self, num_ws: int, w_dim: int) -> np.ndarray:
        """Adds up what the edits change in the codes of any face: e (L, D), float32.

        Raises:
            ValueError: If a direction is for a generator of another shape.
        """
        offset = np.zeros((num_ws, w_dim))
        for direction, strength in self.edits:
            if direction.steps.shape != offset.shape:
                raise ValueError(
                    f"Expected directions ({num_ws}, {w_dim}) for this generator, {direction.name!r} has "
                    f"{direction.steps.shape}; fit it for this generator."
                )
            offset += strength * direction.steps
        return offset.astype(np.float32)

    def summarize(self) -> dict[str, Any]:
        """Says in a report what was edited; empty if nothing was."""
        notes: dict[str, Any] = {}
        if self.edits:
            notes["edits"] = [{"name": d.name, "strength": s, "sha256": d.sha256} for d, s in self.edits]
            notes["edit_preserve_lr"] = self.preserve_lr
        if self.sweep is not None:
            notes["edit_sweep"] = {"name": self.sweep.name, "sha256": self.sweep.sha256}
        return notes


def is_direction_name(text: str) -> bool:
    """Says whether a direction may be called so."""
    return _NAME.fullmatch(text) is not None


def parse_edit(text: str) -> tuple[str, float]:
    """Reads "smile=+2" as a name and a strength; ValueError if it is anything else, or beyond ±100."""
    name, equals, number = text.partition("=")
    try:
        strength = float(number)
    except ValueError:
        strength = float("nan")
    if not equals or not _NAME.fullmatch(name) or not abs(strength) <= MAX_STRENGTH:
        raise ValueError(
            f"expected NAME=STRENGTH such as smile=+2, the strength in standard deviations within ±{MAX_STRENGTH:g}, "
            f"got {text!r}"
        )
    return name, strength


def write_direction(direction: EditDirection, path: Path, overwrite: bool = False) -> None:
    """Writes a direction, see `data.files.owned_file`; the same direction gives the same bytes."""
    notes = {"format": FORMAT, "name": direction.name, "generator_sha256": direction.generator_sha256}
    text = json.dumps({**notes, "about": direction.about}, sort_keys=True)
    with owned_file(path, overwrite, ours=is_direction_file) as partial, open(partial, "wb") as file:
        np.savez(  # which adds a suffix to a path, not to a file
            file,
            normal=direction.normal.astype(np.float32),
            intercept=np.float64(direction.intercept),
            steps=direction.steps.astype(np.float32),
            info=np.array(text),
        )


def is_direction_file(path: Path) -> bool:
    """Says whether `write_direction` wrote a file, by its content."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return json.loads(str(arrays["info"]))["format"] == FORMAT
    except Exception:  # of zipfile, json and numpy, for files of any kind
        return False


def read_direction(path: Path, generator_sha256: str | None = None) -> EditDirection:
    """Reads what `write_direction` wrote.

    Args:
        path: The file.
        generator_sha256: The generator that it is for; None accepts any.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, something else, or for another generator.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected a direction at {path}, found no such file.")
    content = path.read_bytes()
    try:
        with np.load(path, allow_pickle=False) as arrays:
            info = json.loads(str(arrays["info"]))
            if info["format"] != FORMAT:
                raise ValueError(f"format {info['format']!r}")
            direction = EditDirection(
                info["name"],
                arrays["normal"].astype(np.float64),
                float(arrays["intercept"]),
                arrays["steps"].astype(np.float64),
                str(info["generator_sha256"]),
                dict(info["about"]),
                hashlib.sha256(content).hexdigest(),
            )
    except (ValueError, KeyError, TypeError, IndexError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected a direction ({FORMAT}), found something else ({error}).") from error
    if generator_sha256 is not None and direction.generator_sha256 != generator_sha256:
        raise ValueError(
            f"{path}: expected a direction of the generator with sha256 {generator_sha256}, found one of "
            f"{direction.generator_sha256}: another generator's directions mean nothing here; fit it anew with "
            "python -m editing fit."
        )
    return direction


def read_directions(folder: Path, names: Sequence[str], generator_sha256: str | None) -> dict[str, EditDirection]:
    """Reads the directions NAME.npz that a command names, by name; see `read_direction`.

    Raises:
        UnknownDirection: If there is no such direction; says which there are.
        ValueError: If one is damaged or for another generator.
    """
    known = names_in(folder)
    for name in names:
        if name not in known:
            nearest = get_close_matches(name, known, 1)
            listed = f"there are: {', '.join(known)}" if known else f"there are none in {folder}"
            listed = f"did you mean {nearest[0]!r}? {listed}" if nearest else listed
            raise UnknownDirection(f"no edit direction {name!r}; {listed}")
    return {name: read_direction(folder / f"{name}.npz", generator_sha256) for name in dict.fromkeys(names)}


def names_in(folder: Path) -> list[str]:
    """Lists the directions in a folder by name."""
    return sorted(path.stem for path in folder.glob("*.npz")) if folder.is_dir() else []


def unit_normal(array: np.ndarray) -> np.ndarray:
    """Brings a normal (1, D) or (D,) of InterFaceGAN to unit length (D,), float64: 1e30² is beyond float32.

    Raises:
        ValueError: If the array is something else.
    """
    if not np.issubdtype(array.dtype, np.floating) or not array.ndim or array.size != array.shape[-1]:
        raise ValueError(f"Expected the normal (1, D) of an InterFaceGAN boundary, got {array.dtype} {array.shape}.")
    normal = array.reshape(-1).astype(np.float64)
    largest = np.abs(normal).max(initial=0.0)
    if not 0 < largest < np.inf:
        raise ValueError(
            f"Expected a normal of InterFaceGAN with a direction, got one whose largest number is {largest:g}."
        )
    normal /= largest
    return normal / np.linalg.norm(normal)


def import_interfacegan(
    array: np.ndarray, name: str, sigma: float, generator_sha256: str, num_ws: int
) -> EditDirection:
    """Takes over a boundary of InterFaceGAN, a unit normal (1, D) without an intercept.

    Args:
        array: The normal, (1, D) or (D,).
        name: The direction's name here.
        sigma: Standard deviation of n · w over the generator's faces, which is the step of all styles.
        generator_sha256: The generator that it was made for.
        num_ws: Number of styles L.

    Raises:
        ValueError: If the array is something else.
    """
    normal = unit_normal(array)
    about = {"from": "InterFaceGAN .npy, without intercept"}
    return EditDirection(name, normal, 0.0, np.tile(sigma * normal, (num_ws, 1)), generator_sha256, about)


def export_interfacegan(direction: EditDirection) -> np.ndarray:
    """Gives a direction as InterFaceGAN keeps it: the step of its edits (1, D), float32, of unit length.

    Raises:
        ValueError: If the steps of the styles differ, which such a file cannot hold.
    """
    step = direction.steps[:1]
    if not np.array_equal(direction.steps, np.broadcast_to(step, direction.steps.shape)):
        raise ValueError(
            f"expected the same step for all styles, those of {direction.name!r} differ; "
            f"python -m editing combine {direction.name} --without OTHERS --as NEW makes one that an .npy can hold"
        )
    return (step / np.linalg.norm(step)).astype(np.float32)
