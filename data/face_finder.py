"""Finds faces in photos by MTCNN (Zhang et al. 2016); the weights come with facenet-pytorch, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.ffhq_crop import cut_out, ffhq_square

CONFIDENCE = 0.9
VIEW = 240  # px; a smaller face is looked at again at such a size, turned upright, since MTCNN places points by pixels
SAME = 0.3  # of a face's height: nearer to the centre of a larger face, it is that face
AROUND = 1.5  # sides of the face's square in that view

# Where a point (x, y) of a photo that was turned by 90°, 180° and 270° counter-clockwise lies in the photo itself, of
# which (right, bottom) is the last pixel.
_Back = Callable[[np.ndarray, np.ndarray, int, int], tuple[np.ndarray, np.ndarray]]
_TURNED_BACK: tuple[_Back, ...] = (
    lambda x, y, right, bottom: (right - y, x),
    lambda x, y, right, bottom: (right - x, bottom - y),
    lambda x, y, right, bottom: (y, bottom - x),
)


@dataclass(frozen=True)
class DetectedFace:
    """A face in a photo, in pixels, x before y, the centre of the first pixel at (0, 0).

    Attributes:
        points: Eyes, nose and corners of the mouth (5, 2), see `data.ffhq_crop.ffhq_square`.
        box: Two opposite corners (2, 2) of the box from eyebrows to chin, the smaller coordinates first.
        confidence: Its probability, in [0, 1].
    """

    points: np.ndarray
    box: np.ndarray
    confidence: float


class FaceFinder:
    """Finds faces and their five points.

    Args:
        confidence: The least probability, in [0, 1], that makes a face.
        smallest: Pixels of the smallest face that is searched for; None for a twentieth of the photo's shorter side, 20
            at least, which takes as long for large photos as for small ones.
        device: Where the networks run.

    Raises:
        ImportError: If facenet-pytorch is not installed.
    """

    def __init__(self, confidence: float = CONFIDENCE, smallest: int | None = None, device: str = "cpu") -> None:
        try:
            from facenet_pytorch import MTCNN
        except ImportError as error:
            raise ImportError(
                "expected facenet-pytorch, which finds the faces and brings its weights along; pip install "
                '"facenet-pytorch>=2.5.3,<2.6" --no-deps'
            ) from error
        self.confidence = confidence
        self.smallest = smallest
        self._mtcnn: Any = MTCNN(keep_all=True, device=device)

    def __call__(self, path: Path, picture: Image.Image) -> np.ndarray:
        """Gives the points (n, 5, 2) of the faces that `detect` finds; the path is not looked at."""
        return np.array([face.points for face in self.detect(picture)]).reshape(-1, 5, 2)

    def detect(self, picture: Image.Image, smallest: int | None = None) -> list[DetectedFace]:
        """Finds the faces of a photo, largest first; where there is none, also of the photo on its side or head.

        Args:
            picture: The photo, RGB.
            smallest: Pixels of the smallest face that is searched for; None for those of `smallest_in`.
        """
        right, bottom = picture.width - 1, picture.height - 1
        smallest = smallest or self.smallest_in(picture)
        if faces := self._find(picture, smallest):
            return faces
        for turn, back in enumerate(_TURNED_BACK, start=1):
            if faces := self._find(picture.rotate(90 * turn, expand=True), smallest):

                def turn_back(points: np.ndarray, back: _Back = back) -> np.ndarray:
                    return np.stack(back(points[:, 0], points[:, 1], right, bottom), axis=-1)

                return [
                    DetectedFace(turn_back(face.points), np.sort(turn_back(face.box), axis=0), face.confidence)
                    for face in faces
                ]
        return []

    def smallest_in(self, picture: Image.Image) -> int:
        """Gives the pixels of the smallest face that is searched for in a photo."""
        return self.smallest or max(20, min(picture.size) // 20)

    def _find(self, picture: Image.Image, smallest: int) -> list[DetectedFace]:
        """Finds upright faces, and places their points precisely."""
        kept: list[DetectedFace] = []
        for face in self._search(picture, smallest):
            face = self._look_again(picture, face)
            centre, reach = face.box.mean(axis=0), SAME * np.ptp(face.box, axis=0).max()
            if all(np.hypot(*(centre - other.box.mean(axis=0))) > reach for other in kept):
                kept.append(face)
        return kept

    def _search(self, picture: Image.Image, smallest: int) -> list[DetectedFace]:
        """Finds upright faces of so many pixels or more."""
        if min(picture.size) <= smallest:
            return []
        self._mtcnn.min_face_size = smallest
        try:
            boxes, probabilities, points = self._mtcnn.detect(picture, landmarks=True)
        except (RuntimeError, ValueError) as error:
            if "non-empty list" in str(error):  # how MTCNN fails where no candidate lies within the picture
                return []
            raise
        found = zip(boxes, points, probabilities, strict=True) if boxes is not None else ()
        return [
            DetectedFace(np.asarray(face, np.float64), np.asarray(box, np.float64).reshape(2, 2), float(probability))
            for box, face, probability in found
            if probability >= self.confidence
        ]

    def _look_again(self, picture: Image.Image, face: DetectedFace) -> DetectedFace:
        """Places the points of a small face anew, in an enlarged view of it."""
        square = ffhq_square(face.points)
        square = replace(square, right=AROUND * square.right)
        if square.side >= VIEW:
            return face
        view = self._search(cut_out(picture, square, VIEW), VIEW // 4)
        centre = (VIEW - 1) / 2
        distances = [float(np.hypot(*(other.box.mean(axis=0) - centre))) for other in view]
        if not view or min(distances) > VIEW / 8:
            return face
        top_left, bottom_left, _, top_right = square.corners
        axes = np.stack([top_right - top_left, bottom_left - top_left]) / VIEW
        points = top_left + (view[int(np.argmin(distances))].points + 0.5) @ axes - 0.5
        return replace(face, points=points)
