"""When not to believe the samples of a face: words for report.json and for the line under the picture."""

from __future__ import annotations

import numpy as np

from data.face_finder import DetectedFace
from pipeline.familiarity import Familiarity
from pipeline.samples import Samples

NO_FACE = "no face found"
CUT = "cut by the border"
TURNED = "far from frontal"
UNEXPLAINED = "hardly explained by the generator"
UNFAMILIAR = "unfamiliar to the generator"
LEAST_EYES = 8  # px
SMALL = f"under {LEAST_EYES} px between the eyes"
EYES = 0.25  # of the side of FFHQ's square, between the eyes of a frontal face

MAX_OUTSIDE = 0.1  # of a face's box that may lie outside of the photo on one side
MAX_NOSE = 0.4  # from the middle of the eyes sideways, in distances between the eyes


def place_doubts(face: DetectedFace, photo: tuple[int, int], scale: float) -> list[str]:
    """Says what is doubtful in how a face lies in its photo.

    Args:
        face: The face.
        photo: Width and height of the photo in pixels.
        scale: Pixels of the low-resolution face per pixel of the photo.

    Returns:
        Words, none if there is no doubt.
    """
    size = np.array(photo)
    outside = np.maximum(-face.box[0], face.box[1] - size) / (face.box[1] - face.box[0])
    eye, other, nose = face.points[:3]
    axis = other - eye
    sideways = abs((nose - (eye + other) / 2) @ axis) / max(axis @ axis, 1e-9)
    doubts = {
        CUT: outside.max() > MAX_OUTSIDE or (face.points < 0).any() or (face.points > size - 1).any(),
        TURNED: sideways > MAX_NOSE,
        SMALL: np.hypot(*axis) * scale < LEAST_EYES,
    }
    return [word for word, holds in doubts.items() if holds]


def size_doubts(lr_size: int) -> list[str]:
    """Says what is doubtful in a face of so many pixels that fills its square."""
    return [SMALL] if EYES * lr_size < LEAST_EYES else []


def sample_doubts(known: Familiarity | None, samples: Samples, lr_size: int, edit: np.ndarray | None) -> list[str]:
    """Says what is doubtful in the point estimate of a face.

    Args:
        known: What held-out photos show; None if that is not known.
        samples: Of one face (k, …).
        lr_size: Pixels of the face.
        edit: What was added to its codes (L, D); None for nothing.
    """
    if known is None:
        return []
    ws = np.asarray(samples.ws[0]) - (0 if edit is None else edit)
    doubts = {
        UNEXPLAINED: known.is_unexplained(float(samples.residual[0]), float(samples.sigma), lr_size),
        UNFAMILIAR: known.is_unfamiliar(ws, lr_size),
    }
    return [word for word, holds in doubts.items() if holds]
