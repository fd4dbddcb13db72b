"""When not to believe the samples of a face: words for report.json and for the line under the picture."""

from __future__ import annotations

import numpy as np

from data.face_finder import DetectedFace

NO_FACE = "no face found"
CUT = "cut by the border"
TURNED = "far from frontal"
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
