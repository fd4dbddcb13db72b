"""The downscaling operator that training losses, search, report and degradations share.

Separable bicubic with a = -0.5, antialiased, with reflected borders: the operator D that PULSE (Menon et al. 2020)
assumes between a face and its low-resolution picture. It is linear, so each axis is one small matrix A and
D(x) = A x Aᵀ. That form takes any size and any factor, and exports to ONNX as two matrix products.

For whole factors f it equals PULSE's strided convolution: 4f taps at the offsets (i - 2f + 1/2) / f. With even f these
taps are centred on (o + 1/2) f - 1/2, as in PIL and MATLAB. With odd f, half-pixel offsets cannot be centred on a
pixel, and PULSE's padding puts them half an input pixel further on; so does this operator, for odd whole factors above
1 only. Fractional factors and enlarging are centred, and equal sizes give the identity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.taps import EPSILON, KEYS_A, resize_weights

__all__ = ["EPSILON", "KEYS_A", "Downscale", "downscaling_error", "resize_matrix", "upscale_bicubic"]


def resize_matrix(size_in: int, size_out: int) -> Tensor:
    """Gives the matrix A that resizes a row of pixels, y = A x.

    A[o, p] ∝ Σ_q cubic((q - c_o) / s), over all q that reflect to p, with c_o = (o + 1/2) f - 1/2 (and 1/2 more for
    odd whole factors above 1, see the module), f = size_in / size_out, s = max(f, 1).

    Args:
        size_in: Pixels in a row, at least 1.
        size_out: Pixels wanted, at least 1; a larger number than size_in means plain bicubic interpolation.

    Returns:
        Matrix (size_out, size_in), float32 on the CPU; its rows sum to 1. The weights are cached, the tensor is new.

    Raises:
        ValueError: If a size is below 1.

    References:
        Keys 1981, Cubic convolution interpolation for digital image processing.
        Menon et al. 2020, PULSE, the operator DS.
    """
    # Arrays are cached, not tensors: a tensor first made under inference_mode, a fake-tensor trace or a device context
    # would stay of that kind for every later caller, and a caller could write into it.
    return torch.tensor(resize_weights(int(size_in), int(size_out)), device="cpu")


# A constant to torch.compile and torch.export. `torch.compiler.assume_constant_result` sets this very mark, but imports
# the compiler to do so, which takes a second that a program that compiles nothing does not owe.
resize_matrix._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _resize(images: Tensor, size_out: int) -> Tensor:
    """Applies A from the left and Aᵀ from the right to square images (B, C, H, H)."""
    matrix = resize_matrix(int(images.shape[-1]), size_out).to(images)  # (s, H)
    return matrix @ images @ matrix.T  # (B, C, s, s)


def _check_square(images: Tensor) -> None:
    if images.ndim != 4:
        raise ValueError(f"Expected images (B, C, H, W), got shape {tuple(images.shape)}; batch one with image[None].")
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(f"Expected square images, got {tuple(images.shape[-2:])}; crop them.")


class Downscale(nn.Module):
    """The operator D: images of any square size to low-resolution images of one size, D(x) = A x Aᵀ.

    It does not clamp: bicubic kernels overshoot by a few percent at strong edges. It has no parameters, no buffers, and
    follows the device and dtype of its input.

    Args:
        lr_size: Width s of the low-resolution images in pixels, at least 1.

    Raises:
        ValueError: If lr_size is below 1.

    Example:
        >>> Downscale(8)(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(self, lr_size: int) -> None:
        super().__init__()
        if lr_size < 1:
            raise ValueError(f"Expected lr_size of at least 1 pixel, got {lr_size}.")
        self.lr_size = int(lr_size)

    def forward(self, images: Tensor) -> Tensor:
        """Downscales.

        Args:
            images: Images (B, C, H, H) with H ≥ s, of any range; the range of the output is that of the input, but for
                overshoot.

        Returns:
            Low-resolution images (B, C, s, s).

        Raises:
            ValueError: If the images are not a square batch, or smaller than s.
        """
        _check_square(images)
        if images.shape[-1] < self.lr_size:
            raise ValueError(
                f"Expected images of at least {self.lr_size} px, got {images.shape[-1]} px; "
                "use upscale_bicubic to enlarge."
            )
        return _resize(images, self.lr_size)

    def extra_repr(self) -> str:
        """Names the size in the printed module."""
        return f"lr_size={self.lr_size}"


def upscale_bicubic(lr: Tensor, size: int) -> Tensor:
    """Enlarges images by bicubic interpolation with a = -0.5, the baseline beside which faces are shown.

    Args:
        lr: Images (B, C, s, s) of any range.
        size: Width in pixels of the output, at least s.

    Returns:
        Images (B, C, size, size), not clamped.

    Raises:
        ValueError: If the images are not a square batch, or larger than size.
    """
    _check_square(lr)
    if size < lr.shape[-1]:
        raise ValueError(f"Expected a size of at least {lr.shape[-1]} px, got {size} px; use Downscale to shrink.")
    return _resize(lr, size)


def downscaling_error(images: Tensor, lr: Tensor, operator: Callable[[Tensor], Tensor]) -> Tensor:
    """Measures how far faces are from explaining the low-resolution picture, mean over C, H, W of ((D(x) - lr) / 2)².

    Args:
        images: Faces (B, C, H, H) in [-1, 1].
        lr: The low-resolution pictures (B, C, s, s) in [-1, 1], or one (1, C, s, s) for all faces.
        operator: D, such as a Downscale.

    Returns:
        Errors (B,), mean squared in units of [0, 1] pictures.

    Raises:
        ValueError: If D(images) and lr do not have the same shape.
    """
    downscaled = operator(images)  # (B, C, s, s)
    if lr.ndim != 4 or lr.shape[1:] != downscaled.shape[1:] or lr.shape[0] not in (1, downscaled.shape[0]):
        raise ValueError(
            f"Expected lr of shape {tuple(downscaled.shape)}, or with a batch of 1, got {tuple(lr.shape)}; "
            "build the operator with the size of lr."
        )
    return ((downscaled - lr) / 2).square().mean(dim=(1, 2, 3))  # (B,)
