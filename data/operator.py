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
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from data.resize import EPSILON, KEYS_A, resize_weights

__all__ = [
    "EPSILON",
    "KEYS_A",
    "Downscale",
    "back_project",
    "downscaling_error",
    "lift",
    "resize_matrix",
    "trusted_part",
    "upscale_bicubic",
]


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
        """Downscales images (B, C, H, H) of any range, H ≥ s, to (B, C, s, s).

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
    """Enlarges images (B, C, s, s) to (B, C, size, size) by bicubic interpolation with a = -0.5; not clamped.

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


@lru_cache(maxsize=128)
def _pseudo_inverse(size_in: int, size_out: int) -> np.ndarray:
    """A⁺ = Aᵀ(A Aᵀ)⁻¹ (size_in, size_out); A has full rank."""
    return np.linalg.pinv(resize_weights(size_in, size_out).astype(np.float64)).astype(np.float32)


@lru_cache(maxsize=128)
def _eigenbasis(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Λ (size_out,) and U (size_out, size_out) with A Aᵀ = U Λ Uᵀ."""
    matrix = resize_weights(size_in, size_out).astype(np.float64)
    values, vectors = np.linalg.eigh(matrix @ matrix.T)
    return values.astype(np.float32), vectors.astype(np.float32)


def lift(residual: Tensor, size: int) -> Tensor:
    """Gives the smallest images (B, C, R, R) that downscale to pictures r (B, C, s, s): A⁺ r A⁺ᵀ."""
    up = torch.from_numpy(_pseudo_inverse(size, int(residual.shape[-1]))).to(residual)  # A⁺ (R, s)
    return up @ residual @ up.T


def trusted_part(residual: Tensor, size: int, noise_ratio: Tensor) -> Tensor:
    """Gives the part of a residual that is not noise: the posterior mean for white noise.

    In the eigenbasis A Aᵀ = U Λ Uᵀ, the coefficient (i, j) is multiplied by λᵢ λⱼ / (λᵢ λⱼ + σ²/τ²).

    Args:
        residual: y − D(x) (B, C, s, s).
        size: Size R in pixels of the images x.
        noise_ratio: σ²/τ² (B,): the variance of the noise in y, over that of what x lacks; 0 trusts all of it.

    Returns:
        The part (B, C, s, s).
    """
    values, vectors = (torch.from_numpy(a).to(residual) for a in _eigenbasis(size, int(residual.shape[-1])))
    gains = torch.outer(values, values)  # (s, s)
    gains = gains / (gains + noise_ratio.to(residual)[:, None, None, None])  # (B, 1, s, s)
    return vectors @ (gains * (vectors.T @ residual @ vectors)) @ vectors.T


def back_project(
    images: Tensor, lr: Tensor, fidelity: float = 1.0, noise_ratio: Tensor | None = None, rounds: int = 8
) -> Tensor:
    """Moves images the shortest way to where they downscale to the low-resolution pictures, and clamps them.

    x ← clamp(x + A⁺(y_λ − A x Aᵀ)A⁺ᵀ), repeated, with the target y_λ = D x₀ + λ K(y − D x₀) fixed once; K is
    `trusted_part`, the identity for clean pictures. Gradients pass the clamp unchanged.

    Args:
        images: Images x₀ (B, C, R, R) in [-1, 1], or a little beyond.
        lr: Low-resolution pictures y (B, C, s, s) in [-1, 1], s ≤ R. With s = R and λ = 1 they are what comes out.
        fidelity: λ from 0, which only clamps, to 1.
        noise_ratio: See `trusted_part` (B,); None for clean pictures.
        rounds: How often to project and clamp.

    Returns:
        Images (B, C, R, R) in [-1, 1].

    Raises:
        ValueError: If the fidelity is out of range.
    """
    if not 0 <= fidelity <= 1:
        raise ValueError(f"Expected a fidelity from 0 to 1, got {fidelity}.")
    size, lr_size = int(images.shape[-1]), int(lr.shape[-1])
    down = resize_matrix(size, lr_size).to(images)  # A (s, R)
    up = torch.from_numpy(_pseudo_inverse(size, lr_size)).to(images)  # A⁺ (R, s)
    residual = lr - down @ images @ down.T
    if noise_ratio is not None:
        residual = trusted_part(residual, size, noise_ratio)
    x = images + up @ (fidelity * residual) @ up.T
    target = down @ x @ down.T  # y_λ, since A A⁺ = 1
    for round in range(rounds):
        if round:
            x = x + up @ (target - down @ x @ down.T) @ up.T
        x = x + (x.clamp(-1, 1) - x).detach()  # straight through
    return x
