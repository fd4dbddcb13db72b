"""How far apart can candidates lie that explain the input equally well? The distribution beside style mixing.

Style mixing (pSp, Richardson et al. 2021, section 4.4) replaces the fine styles by those of random faces, here each
layer as far as `training.spread` finds that it may go. Both ways take the same passes of feedback afterwards. Each is
measured at several spreads, and its diversity, the mean pairwise LPIPS of k candidates, read off by linear
interpolation at one downscaling error: 1.6 times that of the best guesses.

Examples:
    python benchmarks/diversity.py --faces 32 --k 8
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.faces import Faces
from data.operator import Downscale, downscaling_error
from losses.perceptual import LPIPS
from models.bundle import DEFAULT_BUNDLE, Bundle, load_bundle
from training.spread import CALIBRATION_FACES, calibrate_spread

FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # of the calibrated spread
BUDGET = 1.6


def by_style_mixing(bundle: Bundle, faces: Tensor) -> Bundle:
    """Makes a bundle like another whose candidates come from style mixing, calibrated on faces (B, 3, R, R)."""
    encoder = copy.deepcopy(bundle.encoder)
    encoder.posterior = None
    calibrate_spread(encoder, bundle.generator, faces, BUDGET)
    return replace(bundle, encoder=encoder)


def with_spread(bundle: Bundle, factor: float) -> Bundle:
    """Makes a bundle like another whose candidates go further, or not so far."""
    encoder = copy.deepcopy(bundle.encoder)
    encoder.spread *= factor
    return replace(bundle, encoder=encoder)


@torch.inference_mode()
def measure(bundle: Bundle, faces: Tensor, lr_size: int, k: int, lpips: LPIPS) -> tuple[float, float, float]:
    """Measures k random candidates of each face.

    Args:
        bundle: Draws them.
        faces: Sharp faces (B, 3, R, R) in [-1, 1].
        lr_size: LR size in pixels.
        k: Candidates, without the best guess.
        lpips: The distance.

    Returns:
        Mean downscaling errors of the best guesses and of the candidates, and the candidates' mean pairwise LPIPS.
    """
    operator = Downscale(lr_size)
    first, second = torch.triu_indices(k, k, 1)
    best, others, distances = [], [], []
    for i, face in enumerate(faces):
        lr = operator(face[None])
        images = bundle.upsample(lr, k + 1, rng=np.random.default_rng(i))[0][0].clamp(-1, 1)  # (k + 1, 3, R, R)
        errors = downscaling_error(images, lr.expand(k + 1, -1, -1, -1), operator)
        best.append(errors[:1])
        others.append(errors[1:])
        features = lpips.features(images[1:])
        distances.append(lpips.distance([f[first] for f in features], [f[second] for f in features]))
    return tuple(float(torch.cat(parts).mean()) for parts in (best, others, distances))  # type: ignore[return-value]


def main(args: list[str] | None = None) -> None:
    """Prints the table.

    Args:
        args: Arguments in place of those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bundle", default=str(DEFAULT_BUNDLE), help="bundle with a distribution (default: bundles/celeba64)")
    add("--data", default="celeba128_val.zip", help="faces to measure on (%(default)s)")
    add("--train", default="celeba128_train.zip", help="faces to calibrate style mixing on (%(default)s)")
    add("--faces", type=int, default=32, help="how many (%(default)s)")
    add("--k", type=int, default=8, help="candidates of each (%(default)s)")
    add("--lr", type=int, nargs="+", default=[16, 8], metavar="PX", help="LR sizes (16 8)")
    arguments = parser.parse_args(args)
    bundle, lpips = load_bundle(arguments.bundle), LPIPS()

    def read(source: str, count: int) -> Tensor:
        return Faces(source, bundle.resolution, limit=count).images()

    ways = {"distribution": bundle, "style mixing": by_style_mixing(bundle, read(arguments.train, CALIBRATION_FACES))}
    faces = read(arguments.data, arguments.faces)
    print("| LR px | candidates by | " + " | ".join(f"spread × {f:g}" for f in FACTORS) + " | at equal error |")
    print("|---|---|" + "---:|" * (len(FACTORS) + 1))
    for size in arguments.lr:
        for name, way in ways.items():
            found = [measure(with_spread(way, factor), faces, size, arguments.k, lpips) for factor in FACTORS]
            wanted = BUDGET * found[0][0]
            errors, distances = [f[1] for f in found], [f[2] for f in found]
            equal = "–" if not errors[0] <= wanted <= errors[-1] else f"{np.interp(wanted, errors, distances):.4f}"
            cells = " | ".join(f"{distance:.4f} ({error:.1e})" for _, error, distance in found)
            print(f"| {size} | {name} | {cells} | {equal} |", flush=True)


if __name__ == "__main__":
    main()
