"""NIQE: how far a picture's statistics are from those of natural pictures, without knowing the truth.

Own implementation of Mittal, Soundararajan & Bovik 2013, "Making a completely blind image quality analyzer". Luminance
is normalised locally, x̂ = (x − μ) / (σ + 1) with a Gaussian window of 7 px; blocks of 96 px give 18 numbers, the
parameters of (asymmetric) generalised Gaussians fitted to x̂ and to products of neighbours, and as many at half the
resolution.
With mean ν and covariance Σ of these over the blocks of a picture, and those of pristine pictures,

    NIQE = √((ν₁ − ν₂)ᵀ ((Σ₁ + Σ₂) / 2)⁺ (ν₁ − ν₂)).

Faces of 256 px have four blocks, the least that means something. Figures depend on the pristine pictures; compare only
those of one model, which this fits:

    python -m evaluation.niqe --data celebahq512_val.zip --size 512 --out niqe.npz
    python evaluate.py --bundle BUNDLE --niqe niqe.npz
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data.console import FAILURES, blame, number_option, path_option, print_line, run_command
from data.faces import Faces
from data.files import check_replaceable, owned_file
from data.image_io import from_uint8
from data.operator import Downscale
from data.splits import add_split_options

BLOCK = 96  # px
FEATURES = 36
SHARP = 0.75  # of the sharpest block; the others of a pristine picture do not count
WINDOW, WINDOW_SIGMA = 7, 7 / 6
LUMINANCE = (0.2989, 0.5870, 0.1140)
SHIFTS = ((0, 1), (1, 0), (1, 1), (-1, 1))  # of the neighbours, rows and columns
_SHAPES = torch.arange(0.2, 10.0005, 0.001, dtype=torch.float64)
_RATIOS = (2 * torch.lgamma(2 / _SHAPES) - torch.lgamma(1 / _SHAPES) - torch.lgamma(3 / _SHAPES)).exp()  # increasing


def fit_generalised_gaussian(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fits an asymmetric generalised Gaussian to numbers (N, M) by matching moments (Lasmar et al. 2009).

    p(x) ∝ exp(−(−x/β_l)^α) for x < 0, exp(−(x/β_r)^α) for x ≥ 0

    Returns:
        Shape α, in [0.2, 10], and the scales β_l and β_r, each (N,).
    """
    x = x.double()
    tiny = 1e-12
    left = ((x * (x < 0)).square().sum(dim=1) / (x < 0).sum(dim=1).clamp(min=1)).sqrt() + tiny  # (N,)
    right = ((x * (x > 0)).square().sum(dim=1) / (x > 0).sum(dim=1).clamp(min=1)).sqrt() + tiny
    g = left / right
    ratio = x.abs().mean(dim=1).square() / (x.square().mean(dim=1) + tiny)
    ratio = ratio * (g**3 + 1) * (g + 1) / (g**2 + 1).square()
    ratios, shapes = _RATIOS.to(x.device), _SHAPES.to(x.device)
    above = torch.searchsorted(ratios, ratio).clamp(1, len(ratios) - 1)
    nearer = (ratio - ratios[above - 1]).abs() < (ratio - ratios[above]).abs()
    alpha = shapes[above - nearer.long()]
    scale = (0.5 * (torch.lgamma(1 / alpha) - torch.lgamma(3 / alpha))).exp()
    return alpha, left * scale, right * scale


def normalise_locally(luminance: Tensor) -> tuple[Tensor, Tensor]:
    """Takes out local mean and contrast of pictures (B, 1, H, W) in [0, 255]: x̂ = (x − μ) / (σ + 1), and σ."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    taps = torch.exp(-offsets.square() / (2 * WINDOW_SIGMA**2))
    window = (taps / taps.sum()).to(luminance)

    def blur(x: Tensor) -> Tensor:
        x = F.pad(x, (WINDOW // 2,) * 4, mode="replicate")
        return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean = blur(luminance)
    deviation = (blur(luminance.square()) - mean.square()).abs().sqrt()
    return (luminance - mean) / (deviation + 1), deviation


def _blocks(x: Tensor, size: int) -> Tensor:
    """Cuts pictures (B, 1, H, W) into blocks (B, n, size, size); what is left over at the borders does not count."""
    return x.unfold(2, size, size).unfold(3, size, size).flatten(1, 3)


def block_features(images: Tensor) -> tuple[Tensor, Tensor]:
    """Measures the blocks of pictures (B, 3, H, H) in [-1, 1], of 96 px or more.

    Returns:
        Features (B, n, 36), and the mean σ of each block (B, n), its sharpness; in double precision.
    """
    if images.shape[-1] < BLOCK:
        raise ValueError(f"Expected pictures of {BLOCK} px or more for NIQE, got {images.shape[-1]} px.")
    pixels = (images.double() + 1) * 127.5
    weights = torch.tensor(LUMINANCE, dtype=pixels.dtype, device=pixels.device)
    luminance = (pixels * weights.view(1, 3, 1, 1)).sum(dim=1, keepdim=True)  # (B, 1, H, H)
    side = luminance.shape[-1] // BLOCK * BLOCK
    luminance = luminance[..., :side, :side]
    scales, sharpness = [], torch.empty(0)
    for size in (BLOCK, BLOCK // 2):
        normalised, deviation = normalise_locally(luminance)
        blocks = _blocks(normalised, size)  # (B, n, size, size)
        if size == BLOCK:
            sharpness = _blocks(deviation, size).mean(dim=(2, 3))
        scales.append(_describe(blocks.flatten(0, 1)).unflatten(0, blocks.shape[:2]))
        luminance = Downscale(side // 2)(luminance)
    return torch.cat(scales, dim=2), sharpness


def _describe(blocks: Tensor) -> Tensor:
    """Gives 18 numbers (N, 18) for blocks (N, h, h)."""
    alpha, left, right = fit_generalised_gaussian(blocks.flatten(1))
    columns = [alpha, (left + right) / 2]
    for shift in SHIFTS:
        products = blocks * blocks.roll(shift, dims=(1, 2))
        alpha, left, right = fit_generalised_gaussian(products.flatten(1))
        mean = (right - left) * (torch.lgamma(2 / alpha) - torch.lgamma(1 / alpha)).exp()
        columns += [alpha, mean, left, right]
    return torch.stack(columns, dim=1)


def _mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """ν (F,) and Σ (F, F) of features (n, F); Σ is 0 for a single block."""
    if len(features) < 2:
        return features.mean(dim=0), features.new_zeros(features.shape[1], features.shape[1])
    return features.mean(dim=0), torch.cov(features.T)


@dataclass(frozen=True)
class Pristine:
    """What natural pictures look like, by a Gaussian."""

    mean: Tensor  # ν (36,), double
    covariance: Tensor  # Σ (36, 36), double
    source: str = ""  # what it was fitted to

    @classmethod
    def fit(cls, pictures: Sequence[Tensor], source: str = "") -> Pristine:
        """Fits it to the sharp blocks of pictures (3, H, H), uint8; ValueError if there are too few."""
        kept = []
        for i in tqdm(range(len(pictures)), unit="picture", disable=None):
            features, sharpness = block_features(from_uint8(pictures[i][None]))
            kept.append(features[0][sharpness[0] > SHARP * sharpness[0].max()])
        blocks = torch.cat(kept)
        if len(blocks) <= FEATURES:
            raise ValueError(f"Expected more than {FEATURES} sharp blocks, got {len(blocks)}; take more pictures.")
        return cls(*_mean_and_covariance(blocks), source)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Writes the model as .npz; see `data.files.owned_file`."""
        with owned_file(path, overwrite) as partial, partial.open("wb") as file:
            np.savez(file, mean=self.mean.numpy(), covariance=self.covariance.numpy(), source=np.array(self.source))

    @classmethod
    def load(cls, path: str | Path) -> Pristine:
        """Reads what `save` wrote; ValueError if it is something else."""
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"Expected a pristine model at {path}, found none; python -m evaluation.niqe fits one."
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, covariance = torch.from_numpy(file["mean"]), torch.from_numpy(file["covariance"])
                source = str(file["source"])
        except (*FAILURES, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: expected a pristine model of evaluation.niqe, found another file ({error})."
            ) from error
        if mean.shape != (FEATURES,) or covariance.shape != (FEATURES, FEATURES):
            raise ValueError(f"{path}: expected {FEATURES} features, found {tuple(mean.shape)}; fit it again.")
        return cls(mean, covariance, source)

    def distance(self, images: Tensor) -> Tensor:
        """Measures NIQE (B,) ≥ 0 of pictures (B, 3, H, H) in [-1, 1], of 96 px or more; smaller is more natural."""
        features, _ = block_features(images)
        return torch.stack([self._distance(own) for own in features.cpu()])

    def _distance(self, features: Tensor) -> Tensor:
        mean, covariance = _mean_and_covariance(features)
        apart = mean - self.mean
        inverse = torch.linalg.pinv((covariance + self.covariance) / 2, hermitian=True)
        return (apart @ inverse @ apart).clamp(min=0).sqrt()


def main(arguments: Sequence[str] | None = None) -> int:
    """Fits a pristine model; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="zip or folder of square, sharp pictures")
    add_split_options(parser, part="train")
    parser.add_argument("--size", type=number_option, default=512, help="resolution in px (default: 512)")
    parser.add_argument("--limit", type=number_option, help="use the first so many")
    parser.add_argument("--out", required=True, type=path_option, help="the .npz to write")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier call wrote")
    args = parser.parse_args(arguments)
    try:
        check_replaceable(args.out, args.overwrite)
    except ValueError as error:
        parser.error(f"--out: {error}")
    return run_command("evaluation.niqe", lambda: _fit(args))


def _fit(args: argparse.Namespace) -> int:
    with blame("--data"):
        faces = Faces(args.data, args.size, args.limit, cache_bytes=0, split=args.split, part=args.part)
    model = Pristine.fit(faces, faces.source.name)  # type: ignore[arg-type]
    model.save(args.out, args.overwrite)
    print_line(
        f"{args.out}: fitted to {len(faces)} pictures of {model.source}; mean shape α {float(model.mean[0]):.2f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
