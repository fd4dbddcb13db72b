"""The square that FFHQ shows of a face, and how it is cut out of a photo.

The square depends on four points alone: the centres of the eyes and the corners of the mouth. Karras et al. take them
from 68 landmarks; the five points of MTCNN, or of CelebA's lists, hold the same four. Written from the papers: Karras
et al. 2018 (Progressive Growing of GANs, appendix C, for CelebA-HQ) and 2019 (StyleGAN, appendix A, for FFHQ).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

EYES, MOUTHS = 2.0, 1.8  # half the side, in distances between the eyes and from the eyes to the mouth
DOWNWARDS = 0.1  # from the eyes to the centre, in distances from the eyes to the mouth
FADE = 0.3  # of the side: where what was mirrored at the border has faded to one colour
BLUR = 0.02  # of the side: sigma of the blur, which sets in at once, or a second face would look out of the border
ONSET = 10  # after a tenth of the way the blur is complete


@dataclass(frozen=True)
class Square:
    """A square in a photo, turned with the face. Lengths in pixels; the centre of the first pixel is (0.5, 0.5).

    Attributes:
        centre: Its centre (2,), x before y.
        right: The vector (2,) from its centre to the middle of its right side, as one sees the picture.
    """

    centre: np.ndarray
    right: np.ndarray

    @property
    def side(self) -> float:
        """The length of a side in pixels."""
        return 2 * float(np.hypot(*self.right))

    @property
    def corners(self) -> np.ndarray:
        """The corners (4, 2), from the top left counter-clockwise as one sees the picture."""
        x, y = self.right, np.array([-self.right[1], self.right[0]])
        return self.centre + np.stack([-x - y, -x + y, x + y, x - y])

    def moved(self, offset: np.ndarray, scale: float) -> Square:
        """Gives the square in a picture that begins at `offset` (2,) of this one and is `scale` times as large."""
        return Square((self.centre - offset) * scale, self.right * scale)


def ffhq_square(points: np.ndarray) -> Square:
    """Computes the square of a face.

    With e from eye to eye, m from the middle of the eyes to the middle of the mouth, and R a quarter turn:
    right = max(2 |e|, 1.8 |m|) · (e − R m) / |e − R m|, centre = middle of the eyes + 0.1 m.

    Args:
        points: Landmarks (5, 2) in pixels, x before y, the centre of the first pixel at (0, 0): the eye and the other
            eye from left to right as one sees the picture, nose, corners of the mouth from left to right.

    Raises:
        ValueError: If the points are not (5, 2), or coincide.
    """
    points = np.asarray(points, np.float64)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise ValueError(f"Expected five landmarks (5, 2), got {points.tolist()}.")
    eye_left, eye_right, _, mouth_left, mouth_right = points + 0.5
    eyes = (eye_left + eye_right) / 2
    e, m = eye_right - eye_left, (mouth_left + mouth_right) / 2 - eyes
    direction = e + np.array([m[1], -m[0]])
    length = np.hypot(*direction)
    if length < 1e-6:
        raise ValueError(f"Expected landmarks of a face, got points that coincide: {points.tolist()}.")
    right = direction / length * max(EYES * np.hypot(*e), MOUTHS * np.hypot(*m))
    return Square(eyes + DOWNWARDS * m, right)


def cut_out(picture: Image.Image, square: Square, size: int) -> Image.Image:
    """Cuts a square out of a photo, turned upright.

    The photo is sampled bicubically at one to four times the size, whichever its own pixels allow, and brought to the
    size by Lanczos. What lies beyond the photo's borders is mirrored at them, blurred, and fades to the
    photo's median colour, as in FFHQ; unlike there, no pixel of the photo itself is blurred.

    Args:
        picture: The photo, RGB.
        square: From `ffhq_square`.
        size: Width in pixels of the result.

    Returns:
        An RGB picture of size x size px.
    """
    shrink = int(square.side / size / 2)
    if shrink > 1:  # by whole factors first: more samples than four a pixel would have to be taken otherwise
        picture, square = picture.reduce(shrink), square.moved(np.zeros(2), 1 / shrink)
    picture, square = _cropped(picture, square)
    picture, square = _padded(picture, square)
    samples = size * min(4, max(1, int(np.ceil(square.side / size - 1e-6))))
    top_left, bottom_left, _, top_right = square.corners
    across, down = (top_right - top_left) / samples, (bottom_left - top_left) / samples
    affine = (across[0], down[0], top_left[0], across[1], down[1], top_left[1])
    face = picture.transform((samples, samples), Image.Transform.AFFINE, affine, Image.Resampling.BICUBIC)
    return face if samples == size else face.resize((size, size), Image.Resampling.LANCZOS)


def _cropped(picture: Image.Image, square: Square) -> tuple[Image.Image, Square]:
    """Leaves away what is far from the square; half a side around it stays, for what is mirrored."""
    margin = int(np.ceil(square.side / 2)) + 2
    low = np.floor(square.corners.min(axis=0)).astype(int) - margin
    high = np.ceil(square.corners.max(axis=0)).astype(int) + margin
    low, high = np.maximum(low, 0), np.minimum(high, picture.size)
    if (low >= high).any():  # a square wholly outside, which no detector gives
        return picture, square
    return picture.crop((low[0], low[1], high[0], high[1])), square.moved(low, 1.0)


def _padded(picture: Image.Image, square: Square) -> tuple[Image.Image, Square]:
    """Continues a picture beyond its borders where the square leaves it."""
    before = np.maximum(np.ceil(-square.corners.min(axis=0) - 1e-6), 0).astype(int)
    after = np.maximum(np.ceil(square.corners.max(axis=0) - picture.size - 1e-6), 0).astype(int)
    if not before.any() and not after.any():
        return picture, square
    width, height = picture.size
    before, after = np.where(before, before + 2, 0), np.where(after, after + 2, 0)  # the samples' neighbours
    pixels = np.pad(np.asarray(picture), ((before[1], after[1]), (before[0], after[0]), (0, 0)), mode="symmetric")
    # How far outside, in units of the way on which the picture fades.
    way = np.maximum(np.stack([before, after]), FADE * square.side)  # (2, xy)
    x, y = np.arange(pixels.shape[1]) - before[0], np.arange(pixels.shape[0]) - before[1]
    outside_x = np.maximum(-x / way[0, 0], (x - width + 1) / way[1, 0])
    outside_y = np.maximum(-y / way[0, 1], (y - height + 1) / way[1, 1])
    outside = np.maximum(outside_x[None], outside_y[:, None])  # (H, W), up to 0 within the picture
    continued = Image.fromarray(pixels)
    blurred = continued.filter(ImageFilter.GaussianBlur(BLUR * square.side))
    continued = Image.composite(blurred, continued, _mask(ONSET * outside))
    median = Image.new("RGB", continued.size, tuple(np.median(pixels, axis=(0, 1)).astype(int).tolist()))
    return Image.composite(median, continued, _mask(outside)), square.moved(-before, 1.0)


def _mask(weights: np.ndarray) -> Image.Image:
    return Image.fromarray((weights.clip(0, 1) * 255).round().astype(np.uint8))
