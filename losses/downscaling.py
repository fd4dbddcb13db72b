"""The downscaling loss: does the face, made small again, give the low-resolution input?"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def downscaling_loss(images: Tensor, lr: Tensor, operator: Callable[[Tensor], Tensor]) -> Tensor:
    """Measures the downscaling error of faces.

    L_DS = mean (DS(x) − lr)² / 4, the mean squared error on [0, 1].

    Args:
        images: Faces (B, 3, H, W) in [-1, 1]; values outside are not clamped, so that they keep a gradient.
        lr: Low-resolution inputs (B, 3, h, w) in [-1, 1].
        operator: The downscaling DS, (B, 3, H, W) to (B, 3, h, w).

    Returns:
        Errors (B,), ≥ 0, to be compared with ε (1e-3 by default).

    Raises:
        ValueError: If the operator's output and the input differ in shape.

    References:
        Menon et al. 2020, "PULSE", eq. 1 with p = 2, as a mean.
    """
    small = operator(images)  # (B, 3, h, w)
    if small.shape != lr.shape:
        raise ValueError(
            f"Expected the operator to give the shape of lr, {tuple(lr.shape)}, got {tuple(small.shape)}; "
            "use an operator with the factor H / h, and one lr per image."
        )
    return (small - lr).square().mean(dim=(1, 2, 3)) / 4.0  # [-1, 1] is twice as wide as [0, 1]
