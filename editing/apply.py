"""Edited samples: the correction of the unedited sample is carried over, so that the input does not undo the edit.

    x_e = P(G(w + e), y_e),    y_e = y + D G(w + e) − D G(w)

with P the back-projection. Where nothing is clamped this is G(w + e) + A⁺(y − D G(w))A⁺ᵀ: the face of the edited
codes, with what the unedited one lacked of the input. An edit of nothing changes nothing. `--edit-preserve-lr` is
P(G(w + e), y) instead, which takes out of the edit what shows in the input.
"""

from __future__ import annotations

from torch import Tensor

from data.operator import Downscale


def edited_target(lr: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Gives what edited faces are to downscale to.

    Args:
        lr: Low-resolution faces y (N, 3, s, s) in [-1, 1].
        before: The generator's faces G(w) before the edit (N, 3, R, R), not clamped.
        after: And after it, G(w + e).

    Returns:
        y_e (N, 3, s, s), about [-1, 1], for `data.operator.back_project`.
    """
    return lr + Downscale(lr.shape[-1])(after - before)
