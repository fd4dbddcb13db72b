"""The weights of the downscaling operator, and the operator on arrays: numpy alone, for programs without torch.

`data.operator` explains the operator and gives it to tensors, from these weights.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

KEYS_A = -0.5
EPSILON = 1e-3  # a face whose downscaling error is at most this explains the low-resolution picture


def _cubic(x: np.ndarray) -> np.ndarray:
    """Evaluates the cubic convolution kernel of Keys (1981), eq. 4 with a = -1/2; zero for |x| ≥ 2."""
    x, a = np.abs(x), KEYS_A
    inner = ((a + 2) * x - (a + 3)) * x**2 + 1
    outer = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))


def _reflect(positions: np.ndarray, size: int) -> np.ndarray:
    """Folds positions into 0 … size-1 by a triangle wave: mirrors at the edge pixels without repeating them."""
    if size == 1:
        return np.zeros_like(positions)
    period = 2 * (size - 1)
    folded = positions % period
    return np.minimum(folded, period - folded)


@lru_cache(maxsize=128)
def resize_weights(size_in: int, size_out: int) -> np.ndarray:
    """Computes the matrix A of `data.operator.resize_matrix`, cached, so it cannot be written to.

    In float64, rounded to float32. ValueError if a size is below 1.
    """
    if size_in < 1 or size_out < 1:
        raise ValueError(f"Expected sizes of at least 1 pixel, got {size_in} -> {size_out}.")
    factor = size_in / size_out
    stretch = max(factor, 1.0)
    centres = (np.arange(size_out) + 0.5) * factor - 0.5  # (size_out,)
    if size_in > size_out and size_in % (2 * size_out) == size_out:
        centres += 0.5  # an odd whole factor: PULSE's taps lie half a pixel further on
    first = np.ceil(centres - 2 * stretch).astype(np.int64)
    positions = first[:, None] + np.arange(int(np.ceil(4 * stretch)) + 1)  # (size_out, taps)
    taps = _cubic((positions - centres[:, None]) / stretch)
    taps /= taps.sum(axis=1, keepdims=True)
    matrix = np.zeros((size_out, size_in))
    np.add.at(matrix, (np.arange(size_out)[:, None], _reflect(positions, size_in)), taps)
    weights = matrix.astype(np.float32)
    weights.flags.writeable = False
    return weights


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes square images (…, H, H) to (…, size, size), float32: D where it shrinks, bicubic where it enlarges.

    Raises:
        ValueError: If the images are not square.
    """
    if images.ndim < 2 or images.shape[-1] != images.shape[-2]:
        raise ValueError(f"Expected square images (…, H, H), got shape {images.shape}; crop them first.")
    matrix = resize_weights(images.shape[-1], size)  # (size, H)
    return matrix @ images.astype(np.float32, copy=False) @ matrix.T
