"""Boundaries and their arithmetic, in numpy alone: `infer.py` and `export.run` edit with the same few lines.

A boundary is the hyperplane n · w + b = 0 in W between faces with an attribute and faces without it (Shen et al. 2020,
"Interpreting the Latent Space of GANs for Semantic Face Editing"). An edit of strength s moves the styles of a range of
layers,

    w_l ← w_l + s d_l      with n · d = σ,    d the mean of the d_l,

where σ is the standard deviation of n · w over the generator's faces: a strength of 1 means one standard deviation
along the normal for every attribute, whatever else the steps d_l were made to avoid. They are one and the same for all
layers, or one for each.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.files import atomic_write

FORMATS = ("amortized-pulse/boundary/1", "amortized-pulse/boundary/2")  # one direction for all layers; one for each
FOLDER = "boundaries"  # of a bundle
MAX_STRENGTH = 100.0
STRIP = (-2.0, -1.0, 0.0, 1.0, 2.0)  # strengths of the five-step picture

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_ARRAYS = ("normal", "direction")


@dataclass(frozen=True)
class Boundary:
    """Where an attribute begins in W, and how to move a face towards it.

    Attributes:
        name: Such as "smile"; small letters, digits and hyphens.
        normal: n (D,), of unit length; it points to the faces that have the attribute.
        intercept: b; n · w + b is the signed distance of w from the boundary.
        direction: One unit of strength: d (D,) for all its layers, or d_l (l, D), a row for each.
        layers: First style that is edited, and the first after it that is not.
        generator_sha256: The generator whose W this is.
        about: What else is known, as JSON: the classifier's attribute, conditions, samples, accuracy.
        sha256: Of the file that it was read from, "" if it was made here.
    """

    name: str
    normal: np.ndarray = field(repr=False)
    intercept: float
    direction: np.ndarray = field(repr=False)
    layers: tuple[int, int]
    generator_sha256: str
    about: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""

    def __post_init__(self) -> None:
        """Checks name, shapes and numbers."""
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"Expected a name of small letters, digits and hyphens, got {self.name!r}.")
        start, stop = self.layers
        if not 0 <= start < stop:
            raise ValueError(f"Expected layers from 0, the first before the last, got {start} to {stop}.")
        shapes = (self.normal.shape, (stop - start, *self.normal.shape))
        if self.normal.ndim != 1 or self.direction.shape not in shapes:
            raise ValueError(
                f"Expected a normal (D,) and a direction (D,) or ({stop - start}, D), one for each layer, got "
                f"{self.normal.shape} and {self.direction.shape}."
            )
        if not all(np.isfinite(part).all() for part in (self.normal, self.direction, self.intercept)):
            raise ValueError(f"Expected finite numbers in the boundary {self.name!r}, got NaN or infinite ones.")
        if abs(float(np.linalg.norm(self.normal)) - 1) > 1e-3:
            raise ValueError(f"Expected a normal of unit length, got one of {np.linalg.norm(self.normal):.3g}.")

    @property
    def steps(self) -> np.ndarray:
        """d_l (l, D), a row for each of its layers, whether they differ or not."""
        start, stop = self.layers
        return np.broadcast_to(self.direction, (stop - start, len(self.normal)))

    @property
    def spread(self) -> float:
        """σ = n · d, the standard deviation of n · w over the generator's faces."""
        return float(self.steps.mean(axis=0) @ self.normal)

    def distance(self, w: np.ndarray) -> np.ndarray:
        """The signed distance n · w + b of codes (…, D), in the units of W."""
        return w @ self.normal + self.intercept


Edit = tuple[Boundary, float]
"""A boundary, and the strength in standard deviations."""


def offset_of(edits: Sequence[Edit], num_ws: int, w_dim: int) -> np.ndarray:
    """Adds up what edits change in the styles of any face.

    Args:
        edits: Boundaries with strengths.
        num_ws: Number of styles L.
        w_dim: Width D of a style.

    Returns:
        Offset (L, D), float32.

    Raises:
        ValueError: If a boundary edits layers that the generator does not have, or is of another width.
    """
    offset = np.zeros((num_ws, w_dim))
    for boundary, strength in edits:
        start, stop = boundary.layers
        if stop > num_ws or len(boundary.normal) != w_dim:
            raise ValueError(
                f"Expected a boundary for at most {num_ws} styles of width {w_dim}, {boundary.name!r} has layers "
                f"{start} to {stop - 1} of width {len(boundary.normal)}; fit it for this generator."
            )
        offset[start:stop] += strength * boundary.direction
    return offset.astype(np.float32)


def apply_edits(ws: np.ndarray, edits: Sequence[Edit]) -> np.ndarray:
    """Edits faces; several edits add up, in any order.

    Args:
        ws: Codes (…, L, D).
        edits: Boundaries with strengths.

    Returns:
        Codes (…, L, D), float32.
    """
    return (ws + offset_of(edits, *ws.shape[-2:])).astype(np.float32)


def parse_edit(text: str) -> tuple[str, float]:
    """Reads "smile=+2" as a name and a strength.

    Raises:
        ValueError: If it is not of this form, or the strength is beyond ±100.
    """
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


def write_boundary(boundary: Boundary, path: Path) -> None:
    """Writes a boundary, complete or not at all; the same boundary gives the same bytes."""
    notes = {
        "format": FORMATS[boundary.direction.ndim - 1],
        "name": boundary.name,
        "generator_sha256": boundary.generator_sha256,
    }
    text = json.dumps({**notes, "about": boundary.about}, sort_keys=True)
    with atomic_write(path) as partial, open(partial, "wb") as file:  # savez adds a suffix to a path, not to a file
        np.savez(
            file,
            normal=boundary.normal.astype(np.float32),
            intercept=np.float64(boundary.intercept),
            direction=boundary.direction.astype(np.float32),
            layers=np.array(boundary.layers, np.int64),
            info=np.array(text),
        )


def is_boundary_file(path: Path) -> bool:
    """Says whether `write_boundary` wrote a file, by what stands in it."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return json.loads(str(arrays["info"]))["format"] in FORMATS
    except Exception:  # of zipfile, json and numpy, for files of any kind
        return False


def read_boundary(path: Path, generator_sha256: str | None = None) -> Boundary:
    """Reads a boundary.

    Args:
        path: What `write_boundary` wrote.
        generator_sha256: The generator that it is for; None accepts any.

    Returns:
        The boundary.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, something else, or for another generator.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected a boundary at {path}, found no such file.")
    content = path.read_bytes()
    try:
        with np.load(path, allow_pickle=False) as arrays:
            info = json.loads(str(arrays["info"]))
            if info["format"] not in FORMATS:
                raise ValueError(f"format {info['format']!r}")
            start, stop = (int(number) for number in arrays["layers"])
            boundary = Boundary(
                info["name"],
                *(arrays["normal"].astype(np.float64), float(arrays["intercept"])),
                arrays["direction"].astype(np.float64),
                (start, stop),
                str(info["generator_sha256"]),
                dict(info["about"]),
                hashlib.sha256(content).hexdigest(),
            )
    except (ValueError, KeyError, TypeError, IndexError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected a boundary ({FORMATS[0]} or 2), found something else ({error}).") from error
    if generator_sha256 is not None and boundary.generator_sha256 != generator_sha256:
        raise ValueError(
            f"{path}: expected a boundary of the generator with sha256 {generator_sha256}, found one of "
            f"{boundary.generator_sha256}: another generator's directions mean nothing here; fit it anew with "
            "python -m editing.boundaries fit."
        )
    return boundary


def read_boundaries(folder: Path, names: Sequence[str], generator_sha256: str | None) -> dict[str, Boundary]:
    """Reads the boundaries that a command names.

    Args:
        folder: With one NAME.npz each.
        names: Which; each once.
        generator_sha256: The generator that they must be for.

    Returns:
        The boundaries by name.

    Raises:
        ValueError: If there is no such boundary; says which there are. Or see `read_boundary`.
    """
    known = names_in(folder)
    for name in names:
        if name not in known:
            listed = f"there are: {', '.join(known)}" if known else f"there are none in {folder}"
            raise ValueError(f"no boundary {name!r}; {listed}")
    return {name: read_boundary(folder / f"{name}.npz", generator_sha256) for name in dict.fromkeys(names)}


def names_in(folder: Path) -> list[str]:
    """Lists the boundaries in a folder by name."""
    return sorted(path.stem for path in folder.glob("*.npz")) if folder.is_dir() else []


def import_interfacegan(array: np.ndarray, name: str, spread: float, generator_sha256: str, num_ws: int) -> Boundary:
    """Takes over a boundary of InterFaceGAN: a unit normal (1, D), saved by `numpy.save`.

    Its files have no intercept, no layers and no standard deviation: they edit all layers, and the intercept is 0.

    Args:
        array: The normal, (1, D) or (D,).
        name: The boundary's name here.
        spread: Standard deviation of n · w over the generator's faces.
        generator_sha256: The generator that it was made for.
        num_ws: Number of styles L.

    Returns:
        The boundary.

    Raises:
        ValueError: If the array is something else.
    """
    if not np.issubdtype(array.dtype, np.floating) or array.size != array.shape[-1] or not np.linalg.norm(array) > 0:
        raise ValueError(f"Expected the normal (1, D) of an InterFaceGAN boundary, got {array.dtype} {array.shape}.")
    normal = array.reshape(-1).astype(np.float64)
    normal /= np.linalg.norm(normal)
    about = {"from": "InterFaceGAN .npy, without intercept"}
    return Boundary(name, normal, 0.0, spread * normal, (0, num_ws), generator_sha256, about)


def export_interfacegan(boundary: Boundary) -> np.ndarray:
    """Gives a boundary as InterFaceGAN keeps it: the direction of its edits (1, D), float32, of unit length.

    Raises:
        ValueError: If it has a direction for each layer, which such a file cannot hold.
    """
    if boundary.direction.ndim != 1:
        raise ValueError(
            f"expected a boundary with one direction for all layers, {boundary.name!r} has one for each; "
            f"python -m editing.boundaries combine {boundary.name} --without OTHERS --as NEW makes one"
        )
    return (boundary.direction / np.linalg.norm(boundary.direction))[None].astype(np.float32)
