"""The passes of learned feedback around feedback.onnx, on arrays: `models.feedback.take_passes` without torch.

    w ← w + ℓ (N(w) − w),   taken where the drawn face downscales closer to the LR face than before, else ℓ ← ℓ / 2

A pass that is a hair better or worse than what was there may be taken by one runtime and not by another, since both
round differently; such a row then ends elsewhere, and no worse. web/passes.js does the same in the browser.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data.taps import downscaling_errors, resize

ROWS = 64  # candidates that pass through feedback at once, as in `models.bundle`


def feedback_inputs(lr: np.ndarray, images: np.ndarray, ws: np.ndarray, canvas: int) -> dict[str, np.ndarray]:
    """Makes the inputs of feedback.onnx, as `EncoderBase.correct` does.

    Args:
        lr: LR faces (B, 3, s, s) in [-1, 1].
        images: The faces that the codes draw (B, 3, R, R), about [-1, 1].
        ws: The codes (B, L, D).
        canvas: Size c in pixels that the feedback sees LR faces at.

    Returns:
        lr and residual (B, 3, c, c), images (B, 3, 2c, 2c), lr_size (B,) and ws, float32.
    """
    size = lr.shape[-1]
    return {
        "lr": resize(lr, canvas),
        "residual": resize(lr - resize(images, size), canvas),
        "images": images if images.shape[-1] == 2 * canvas else resize(images, 2 * canvas),
        "lr_size": np.full(len(lr), size, np.float32),
        "ws": ws,
    }


def take_passes(
    correct: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    generate: Callable[[np.ndarray], np.ndarray],
    lr: np.ndarray,
    ws: np.ndarray,
    passes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Corrects codes several times, each for itself; a correction that makes things worse is taken back and halved.

    Args:
        correct: One pass, such as `Models.correct`.
        generate: The network that draws, such as `Models.generate`.
        lr: LR faces (N, 3, s, s) in [-1, 1], one per row.
        ws: Codes (N, L, D).
        passes: How often, from 0; each draws the faces once, and the first codes are drawn too.

    Returns:
        Codes (N, L, D) and the faces that they draw (N, 3, R, R), none worse in downscaling error than it was.
    """
    images = generate(ws)
    errors = downscaling_errors(images.clip(-1, 1), lr)  # (N,)
    length = np.ones((len(ws), 1, 1), np.float32)
    for _ in range(passes):
        moved = ws + length * (correct(lr, images, ws) - ws)
        drawn = generate(moved)
        found = downscaling_errors(drawn.clip(-1, 1), lr)
        better = found < errors
        ws = np.where(better[:, None, None], moved, ws)
        images = np.where(better[:, None, None, None], drawn, images)
        errors = np.where(better, found, errors)
        length = np.where(better[:, None, None], length, length / 2)
    return ws, images
