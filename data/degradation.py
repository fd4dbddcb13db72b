"""What happened to a picture besides being downscaled: the degradations that evaluation and training apply.

    lr = 8-bit(after(D(before(x))))

Motion blur comes before the operator D, where the camera moves; noise, dead pixels and JPEG come after it. Methods see
the result alone and know nothing but D (`data.operator`), so an error is worth telling against the degraded picture and
against the clean one: to match the noise is no virtue.

    degradation = find_degradation("noise25")
    lr = degradation(faces, Downscale(16), face_rngs(seed, range(len(faces))))
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.image_io import from_uint8, to_uint8

BLUR_FRAME = 1024  # px; the width of face that the length of a motion blur is given for
JPEG_QUALITY = 75  # what Pillow and libjpeg take where nothing is said

Rng = np.random.Generator | Sequence[np.random.Generator]


def face_rngs(seed: int, faces: Sequence[int]) -> list[np.random.Generator]:
    """Makes one source of randomness per face of the data set, so that it meets the same noise in whatever batch."""
    return [np.random.default_rng((seed, face)) for face in faces]


@dataclass(frozen=True)
class Degradation:
    """Nothing but downscaling and 8 bits: "clean", and the base of the others."""

    @property
    def name(self) -> str:
        """What it is called on a command line; `find_degradation` understands it."""
        return "clean"

    def before(self, faces: Tensor, rng: Rng) -> Tensor:
        """Degrades faces (B, 3, R, R) in [-1, 1] before they are downscaled; same shape and range, not rounded.

        `rng` is one generator, which is used face by face, or B of them.
        """
        return faces

    def after(self, lr: Tensor, rng: Rng) -> Tensor:
        """Degrades downscaled faces (B, 3, s, s) in [-1, 1] and puts them on the 8-bit grid of a saved picture."""
        return _rounded(lr)

    def __call__(self, faces: Tensor, operator: Callable[[Tensor], Tensor], rng: Rng) -> Tensor:
        """Makes the LR picture of a face that something happened to: after(D(before(x))).

        Args:
            faces: Faces (B, 3, R, R) in [-1, 1].
            operator: D, such as a `data.operator.Downscale`.
            rng: One generator, or B of them, such as `face_rngs` gives.

        Returns:
            LR faces (B, 3, s, s) in [-1, 1], on the 8-bit grid.
        """
        return self.after(operator(self.before(faces, rng)), rng)


@dataclass(frozen=True)
class GaussianNoise(Degradation):
    """Independent normal noise on every number of the LR picture."""

    sigma: float  # standard deviation in levels of 255, at least 0

    @property
    def name(self) -> str:
        """Its name with sigma, such as noise25."""
        return f"noise{self.sigma:g}"

    def after(self, lr: Tensor, rng: Rng) -> Tensor:
        """Adds the noise, see `Degradation.after`."""
        noise = _sample(rng, lr, lambda one: one.standard_normal(lr.shape[1:], dtype=np.float32))
        return _rounded(lr + noise * (self.sigma / 127.5))


@dataclass(frozen=True)
class SaltAndPepper(Degradation):
    """Pixels, with all their colours, that turn white or black, each kind as often."""

    amount: float = 0.05  # the probability in [0, 1] with which a pixel does

    @property
    def name(self) -> str:
        """Its name, salt-and-pepper, with the amount where it is not the usual one."""
        return "salt-and-pepper" + ("" if self.amount == 0.05 else f"{self.amount:g}")

    def after(self, lr: Tensor, rng: Rng) -> Tensor:
        """Replaces the pixels, see `Degradation.after`."""
        u = _sample(rng, lr, lambda one: one.random((1, *lr.shape[2:]), dtype=np.float32))  # (B, 1, s, s)
        pepper, salt = u < self.amount / 2, u >= 1 - self.amount / 2
        return _rounded(lr.masked_fill(pepper, -1.0).masked_fill(salt, 1.0))


@dataclass(frozen=True)
class Jpeg(Degradation):
    """The LR picture saved as JPEG (by Pillow, colours at half resolution) and read again."""

    quality: int = JPEG_QUALITY  # 1 to 95, in libjpeg's scale

    @property
    def name(self) -> str:
        """Its name, jpeg, with the quality where it is not the usual one."""
        return "jpeg" + ("" if self.quality == JPEG_QUALITY else f"{self.quality}")

    def after(self, lr: Tensor, rng: Rng) -> Tensor:
        """Saves and reads, see `Degradation.after`; nothing is taken from rng."""
        pixels = to_uint8(lr).permute(0, 2, 3, 1).cpu().numpy()  # (B, s, s, 3)
        read = np.stack([self._saved(face) for face in pixels])
        return from_uint8(torch.from_numpy(read).permute(0, 3, 1, 2).contiguous()).to(lr)

    def _saved(self, pixels: np.ndarray) -> np.ndarray:
        with io.BytesIO() as buffer:
            Image.fromarray(pixels).save(buffer, "JPEG", quality=self.quality, subsampling="4:2:0")
            with Image.open(buffer, formats=["JPEG"]) as picture:
                return np.array(picture.convert("RGB"))


@dataclass(frozen=True)
class MotionBlur(Degradation):
    """The face moved along a line while the shutter was open; the angle is random for every face."""

    length: float = 100.0  # in pixels of a face of 1024 px, 0 to 1024

    @property
    def name(self) -> str:
        """Its name, motion-blur, with the length where it is not the usual one."""
        return "motion-blur" + ("" if self.length == 100 else f"{self.length:g}")

    def before(self, faces: Tensor, rng: Rng) -> Tensor:
        """Blurs with reflected borders, see `Degradation.before`."""
        length = self.length * faces.shape[-1] / BLUR_FRAME
        kernels = _sample(rng, faces, lambda one: line_kernel(length, one.uniform(0, 180)))  # (B, K, K)
        return _convolve(faces, kernels[:, None].to(faces))


def line_kernel(length: float, angle: float) -> np.ndarray:
    """Plots an antialiased line of constant weight into a kernel (K, K), float32, K odd, which sums to 1.

    The line is sampled far denser than the grid, and every sample is shared bilinearly among the four pixels around it.
    Its length is in pixels and may be fractional, its angle in degrees, counter-clockwise from the horizontal.
    """
    half = math.ceil(length / 2)
    count = 16 * max(1, math.ceil(length))
    along = ((np.arange(count) + 0.5) / count - 0.5) * length  # (count,)
    x = half + along * math.cos(math.radians(angle))
    y = half - along * math.sin(math.radians(angle))  # rows count downwards
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    kernel = np.zeros((2 * half + 2, 2 * half + 2))  # one row and column for neighbours that weigh nothing
    for column, of_column in ((left, left + 1 - x), (left + 1, x - left)):
        for row, of_row in ((top, top + 1 - y), (top + 1, y - top)):
            np.add.at(kernel, (row, column), of_row * of_column / count)
    return kernel[:-1, :-1].astype(np.float32)


DEGRADATIONS: dict[str, Degradation] = {
    d.name: d for d in (Degradation(), GaussianNoise(25), GaussianNoise(50), SaltAndPepper(), Jpeg(), MotionBlur())
}
"""The six conditions of the robustness table, by name."""


def find_degradation(name: str) -> Degradation:
    """Finds one of DEGRADATIONS by name, or another strength of it.

    These are "noise10", "jpeg30" (quality), "salt-and-pepper0.1" (share), "motion-blur40" (px of 1024).

    Raises:
        ValueError: If there is none of that name, or its strength is out of range; lists the names.
    """
    match = re.fullmatch(r"([a-z-]+?)(\d+(?:\.\d+)?)?", name)
    kind, number = match.groups() if match else ("", None)
    if name in DEGRADATIONS:
        return DEGRADATIONS[name]
    strength = float(number) if number else math.nan
    if kind == "noise" and 0 <= strength <= 255:
        return GaussianNoise(strength)
    if kind == "jpeg" and 1 <= strength <= 95 and strength == int(strength):
        return Jpeg(int(strength))
    if kind == "salt-and-pepper" and 0 <= strength <= 1:
        return SaltAndPepper(strength)
    if kind == "motion-blur" and 0 <= strength <= BLUR_FRAME:
        return MotionBlur(strength)
    raise ValueError(
        f"Expected a degradation, one of {', '.join(DEGRADATIONS)}, or with a strength: noise0 to noise255, jpeg1 to "
        f"jpeg95, salt-and-pepper0.1, motion-blur40; got {name!r}."
    )


def random_degradation(rng: np.random.Generator, clean: float = 0.5) -> Degradation:
    """Samples what happens to one batch of training: with probability `clean` nothing, otherwise one kind.

    The kinds are equally likely, their strengths uniform from next to nothing up to those of DEGRADATIONS (JPEG: any
    quality from 30 to 95).
    """
    choice, kind, strength = rng.random(3)
    if choice < clean:
        return Degradation()
    quality = 30 + int(strength * 66)
    return (GaussianNoise(50 * strength), SaltAndPepper(0.05 * strength), Jpeg(quality), MotionBlur(100 * strength))[
        int(kind * 4)
    ]


def _rounded(lr: Tensor) -> Tensor:
    """Brings images to the 8-bit grid in [-1, 1]."""
    return from_uint8(to_uint8(lr)).to(lr)


def _sample(rng: Rng, images: Tensor, one: Callable[[np.random.Generator], np.ndarray]) -> Tensor:
    """Samples for every image of a batch (B, …) what `one` samples for one; on the CPU, so that devices agree."""
    sources = [rng] * len(images) if isinstance(rng, np.random.Generator) else list(rng)
    if len(sources) != len(images):
        raise ValueError(f"Expected one generator, or one for each of {len(images)} images, got {len(sources)}.")
    return torch.from_numpy(np.stack([one(source) for source in sources])).to(images.device)


def _convolve(images: Tensor, kernels: Tensor) -> Tensor:
    """Convolves each image (B, C, H, H) with its kernel (B, 1, K, K), K odd, borders reflected.

    By Fourier transform: at 1024 px the kernel has ten thousand weights.
    """
    pad = kernels.shape[-1] // 2
    padded = F.pad(images, (pad, pad, pad, pad), mode="reflect")  # (B, C, N, N)
    size = padded.shape[-2:]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(kernels, s=size)
    # The first K - 1 rows and columns are those that a circular convolution wraps around.
    return torch.fft.irfft2(spectrum, s=size)[..., 2 * pad :, 2 * pad :].contiguous()
