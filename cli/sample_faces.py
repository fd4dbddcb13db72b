"""Makes the sample inputs: faces of nobody, made by the bundle's own generator and downscaled.

    python -m cli.sample_faces
    python -m cli.sample_faces --bundle runs/mine --out faces

Real people's pictures stay out of the repository. Faces that the generator made itself are easier for the encoder than
photos; figures in the README are measured on photos of people it never saw.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.console import blame, path_option, run_command
from data.files import ROOT, check_replaceable, owned_file
from data.image_io import write_image
from data.operator import Downscale
from models import load_generator
from models.bundle_info import DEFAULT_BUNDLE, GENERATOR

# Seed and LR size of each sample, chosen by eye for variety.
SAMPLES = ((1, 16), (2, 16), (3, 16), (4, 8), (5, 8), (6, 32))


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes samples/face-1-16px.png, … at their LR size.

    Returns:
        The exit status: 0, or 1 with a message when there is no generator, or no place for the pictures.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=DEFAULT_BUNDLE, help="default: bundles/celeba64")
    parser.add_argument("--out", type=path_option, default=ROOT / "samples", help="default: samples")
    parser.add_argument("--overwrite", action="store_true", help="replace pictures that an earlier call wrote")
    args = parser.parse_args(arguments)
    return run_command("cli.sample_faces", lambda: generate(args.bundle / GENERATOR, args.out, args.overwrite))


def generate(weights: Path, out: Path, overwrite: bool = False) -> int:
    """Writes the samples of a generator into the folder `out`; all, or none if one must not be replaced."""
    paths = [out / f"face-{i}-{size}px.png" for i, (_, size) in enumerate(SAMPLES, start=1)]
    with blame("--out"):
        for path in paths:
            check_replaceable(path, overwrite)
    with blame("--bundle"):
        generator = load_generator(weights)
    for path, (seed, size) in zip(paths, SAMPLES, strict=True):
        z = np.random.default_rng(seed).standard_normal((1, generator.z_dim), dtype=np.float32)
        with torch.no_grad():
            face = generator(torch.from_numpy(z), truncation_psi=0.7).clamp(-1, 1)
        with owned_file(path, overwrite) as partial:
            write_image(Downscale(size)(face)[0], partial)
    return 0


if __name__ == "__main__":
    sys.exit(main())
