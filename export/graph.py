"""The exported graph: from low-resolution faces to samples that downscale to them, in one piece.

    (lr, noise, fidelity, sigma, edit, preserve_lr) -> (images, ws, lr_psnr, residual, sigma_used)

All of `models.bundle.Bundle.encode`, `generate` and `data.operator.back_project`, unrolled. The LR size s is that of
the input, so the matrices of the operator are computed inside, from their formulas, by what ONNX has:

- A from the cubic kernel at each pair of pixels and at their mirror images (`resize_matrix`);
- (A Aᵀ)⁻¹ by Newton and Schulz's iteration, which doubles the correct digits each time (`inverse`);
- the ridge for noisy inputs by conjugate gradients in place of an eigenbasis (`trusted_part`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from data.operator import KEYS_A
from export.synthesis import synthesize
from models.bundle import Bundle
from models.encoder_base import EncoderBase, Encoding
from models.generator import SynthesisNetwork

ROUNDS = 8  # of projecting and clamping, as `data.operator.back_project`
INVERSE_STEPS = 12  # exact to rounding; the condition number is at most 2.2 for usual sizes and 30 for s = R − 1
RIDGE_STEPS = 12  # within 0.1 of 255 from sigma 5 on, the least that is estimated
PERFECT = 1e-10  # mean squared error that counts as none, 100 dB
TINY = 1e-30  # in place of 0 / 0


class UpsamplerGraph(nn.Module):
    """A bundle as a function of arrays.

    Args:
        bundle: On the CPU, with our own encoder.
    """

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self.encoder: EncoderBase = bundle.encoder
        self.synthesis: SynthesisNetwork = bundle.generator.synthesis
        self.resolution = bundle.resolution

    def forward(
        self, lr: Tensor, noise: Tensor, fidelity: Tensor, sigma: Tensor, edit: Tensor, preserve_lr: Tensor
    ) -> tuple[Tensor, ...]:
        """Upsamples faces.

        Args:
            lr: Low-resolution faces (B, 3, s, s) in [-1, 1].
            noise: Noise (B, k, E), see `data.noise.face_noise`; zeros give the point estimate.
            fidelity: λ of the back-projection (B,), 0 to 1.
            sigma: Standard deviation of the noise in the faces, in grey levels (B,); a negative one is estimated.
            edit: What is added to the styles of all samples of a face (B, L, D).
            preserve_lr: Whether edited faces are to downscale to the input, too; else they take over what the
                unedited ones were corrected by. Booleans (B,).

        Returns:
            Images (B, k, 3, R, R) in [-1, 1]; styles (B, k, L, D); LR-PSNR of the 8-bit images in dB (B, k); mean
            square of y − D(G(w)) on [0, 1] before the projection (B, k); sigma as it was used (B,).
        """
        sigma = torch.where(sigma < 0, self.encoder.noise_level(lr), sigma)
        encoding = self._encode(lr, noise, sigma)
        ws = encoding.ws + edit[:, None]
        raw = self._generate(encoding.ws, encoding)  # (B, k, 3, R, R)
        start = torch.cond((edit != 0).any(), lambda: self._generate(ws, encoding), lambda: raw.clone())
        down = resize_matrix(self.resolution, lr.shape[3])  # A (s, R)
        missing = lr[:, None] - down @ raw @ down.T  # (B, k, 3, s, s), what the generator cannot explain
        # Unless the input is to be preserved, an edited face takes over what the unedited one was corrected by.
        residual = torch.where(_wide(preserve_lr), lr[:, None] - down @ start @ down.T, missing)
        images = project(start, residual, down, fidelity, self.encoder.noise_ratio(sigma))
        written = ((images + 1) * 127.5).round() / 127.5 - 1
        error = _mean_square(down @ written @ down.T - lr[:, None])
        return images, ws, -10 * error.clamp(min=PERFECT).log10(), _mean_square(missing), sigma

    def _encode(self, lr: Tensor, noise: Tensor, sigma: Tensor) -> Encoding:
        canvas = resize_matrix(lr.shape[3], self.encoder.canvas)  # (C, s)
        size = torch.full((lr.shape[0],), lr.shape[3], dtype=torch.float32)  # no float(): a trace would keep its value
        return self.encoder.sample(self.encoder.read(canvas @ lr @ canvas.T, size, sigma), noise)

    def _generate(self, ws: Tensor, encoding: Encoding) -> Tensor:
        details = {size: rows.flatten(0, 1) for size, rows in encoding.details.items()}
        return synthesize(self.synthesis, ws.flatten(0, 1), details).unflatten(0, ws.shape[:2])


def _wide(values: Tensor) -> Tensor:
    """Lets a value of each face (B,) meet pictures (B, k, 3, s, s)."""
    return values[:, None, None, None, None]


def _mean_square(difference: Tensor) -> Tensor:
    """Mean of differences of pictures (B, k, 3, s, s) in [-1, 1], squared, on [0, 1] (B, k)."""
    return (difference / 2).square().mean(dim=(2, 3, 4))


def project(images: Tensor, residual: Tensor, down: Tensor, fidelity: Tensor, ratio: Tensor) -> Tensor:
    """Moves images by A⁺ λ K(r) A⁺ᵀ and clamps them, then alternates both, see `data.operator.back_project`.

    Args:
        images: Images (B, k, 3, R, R), about [-1, 1].
        residual: r, what they lack (B, k, 3, s, s).
        down: A (s, R).
        fidelity: λ (B,).
        ratio: ρ = σ²/τ² (B,).

    Returns:
        Images (B, k, 3, R, R) in [-1, 1].
    """
    gram = down @ down.T
    up = down.T @ inverse(gram)  # A⁺ (R, s)
    trusted = torch.cond(
        (ratio > 0).any(), lambda: trusted_part(residual, gram, _wide(ratio)), lambda: residual.clone()
    )  # K(r)
    wanted = down @ images @ down.T + _wide(fidelity) * trusted
    for _ in range(ROUNDS):
        images = (images + up @ (wanted - down @ images @ down.T) @ up.T).clamp(-1, 1)
    return images


def resize_matrix(size_in: int, size_out: int) -> Tensor:
    """Computes `data.resize.resize_matrix` (size_out, size_in) for sizes from 4 px that a trace need not know.

    A[o, p] ∝ κ(p) + κ(−p) + κ(2 (size_in − 1) − p), κ(q) = cubic((q − c_o) / stretch): the pixel and its two mirror
    images, of which the first and the last pixel have one fewer. From 4 px on no tap lies further out. Numerators are
    whole numbers, so that float32 rounds but once.
    """
    wide, narrow = (torch.full((), size, dtype=torch.float32) for size in (size_in, size_out))
    odd = (wide > narrow) & (wide.remainder(2 * narrow) == narrow)  # PULSE's taps lie half a pixel further on
    p = torch.arange(size_in, dtype=torch.float32)
    o = torch.arange(size_out, dtype=torch.float32)[:, None]
    centre = (2 * o + 1) * wide - torch.where(odd, 0, narrow)  # 2 size_out c_o
    last = wide - 1

    def kernel(q: Tensor) -> Tensor:
        return cubic((2 * narrow * q - centre) / (2 * torch.maximum(wide, narrow)))

    matrix = kernel(p) + torch.where((p > 0) & (p < last), kernel(-p) + kernel(2 * last - p), 0)
    return matrix / matrix.sum(dim=1, keepdim=True)


def cubic(x: Tensor) -> Tensor:
    """Evaluates the cubic convolution kernel of Keys (1981), see `data.resize`."""
    x, a = x.abs(), KEYS_A
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x <= 1, inner, torch.where(x < 2, outer, 0.0))


def inverse(gram: Tensor) -> Tensor:
    """Inverts a symmetric positive definite M (s, s) by X ← X (2 I − M X) from I / ‖M‖ (Schulz 1933)."""
    identity = torch.eye(gram.shape[0])
    x = identity / gram.abs().sum(dim=1).max()
    for _ in range(INVERSE_STEPS):
        x = x @ (2 * identity - gram @ x)
    return x


def trusted_part(residual: Tensor, gram: Tensor, ratio: Tensor) -> Tensor:
    """Gives the part of a residual that is not noise, as `data.operator.trusted_part`: r − ρ z, M z M + ρ z = r.

    Args:
        residual: r (B, k, 3, s, s).
        gram: M = A Aᵀ (s, s).
        ratio: ρ = σ²/τ² (B, 1, 1, 1, 1).
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=(2, 3, 4), keepdim=True)

    z, rest, step = torch.zeros_like(residual), residual, residual
    energy = dot(rest, rest)
    for _ in range(RIDGE_STEPS):
        image = gram @ step @ gram + ratio * step
        length = energy / dot(step, image).clamp(min=TINY)
        z, rest = z + length * step, rest - length * image
        before, energy = energy, dot(rest, rest)
        step = rest + energy / before.clamp(min=TINY) * step
    return residual - ratio * z
