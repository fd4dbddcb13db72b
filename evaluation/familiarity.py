"""Measures on held-out photos what infer.py needs to say when not to believe a face: see `pipeline.familiarity`.

    python -m evaluation.familiarity                                              # of the shipped bundle
    python -m evaluation.familiarity --bundle runs/amortized_64/bundle --data celeba128_val.zip --overwrite

The people in the photos must not have been trained on. The result is a file in the bundle's folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.console import format_error, number_option, print_error, print_line
from data.faces import Faces
from data.files import atomic_write, check_replaceable
from data.image_io import from_uint8, to_uint8
from data.resize import resize
from pipeline.familiarity import FILE, RANK, SHARE, Familiarity, fit_gaussian, gaussian_distance, unexplained
from pipeline.upsampler import DEFAULT_BUNDLE, Backend, Upsampler
from pipeline.wanted import Wanted

SIZES = (4, 8, 16, 32, 64)
BATCH = 32

Measured = tuple[np.ndarray, np.ndarray]  # codes of the point estimates (N, L D), and their residuals (N,)


def measure(backend: Backend, faces: np.ndarray, size: int) -> Measured:
    """Encodes faces (N, 3, R, R) in [-1, 1] that are downscaled to `size` px."""
    lr = from_uint8(to_uint8(resize(faces, size)))
    codes, residuals = [], []
    for start in tqdm(range(0, len(lr), BATCH), f"{size} px", disable=None):
        samples = backend.sample(lr[start : start + BATCH], Wanted(k=1))
        codes.append(samples.ws[:, 0].reshape(len(samples), -1))
        residuals.append(unexplained(samples.residual[:, 0], samples.sigma))
    return np.concatenate(codes), np.concatenate(residuals)


def calibrate(bundle: str, measured: Mapping[int, Measured], rank: int = RANK) -> Familiarity:
    """Fits the Gaussian to the codes of every second face at all sizes; the other faces give the limits.

    Args:
        bundle: The bundle's hash.
        measured: By size, from `measure`, of the same faces.
        rank: Wide directions of the Gaussian; fewer if there are few faces.

    Raises:
        ValueError: If there are too few faces.
    """
    count = len(next(iter(measured.values()))[0])
    rank = min(rank, count // 2 - 2)
    if rank < 1:
        raise ValueError(f"expected 6 faces or more, got {count}")
    fitted = np.arange(count) % 2 == 0
    gaussian = fit_gaussian(np.concatenate([codes[fitted] for codes, _ in measured.values()]), rank)
    sizes = sorted(measured)
    distances = [gaussian_distance(measured[size][0][~fitted], *gaussian) for size in sizes]
    return Familiarity(
        bundle,
        *gaussian,
        np.array(sizes),
        np.array([np.quantile(values, SHARE) for values in distances]),
        np.array([np.quantile(measured[size][1], SHARE) for size in sizes]),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the file.

    Returns:
        The exit status: 0, or 1 with a message.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bundle", type=Path, default=DEFAULT_BUNDLE, metavar="DIR", help="default: the one that is shipped")
    add("--data", default="celeba128_val.zip", help="zip or folder of square faces (%(default)s)")
    add("--faces", type=number_option, default=1000, help="use the first so many in sorted order (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 …, mps (%(default)s)")
    add("--overwrite", action="store_true", help="replace the file that is there")
    args = parser.parse_args(arguments)
    target = args.bundle / FILE
    try:
        check_replaceable(target, args.overwrite, ours=True)
        backend = Upsampler.from_pretrained(args.bundle, args.device).backend
        smallest, largest = backend.about.lr_sizes
        faces = Faces(args.data, backend.about.resolution, args.faces).images().numpy()
        sizes = [size for size in SIZES if smallest <= size <= largest]
        known = calibrate(backend.about.hash, {size: measure(backend, faces, size) for size in sizes})
        with atomic_write(target) as partial:
            known.save(partial)
    except (ValueError, OSError, RuntimeError) as error:
        print_error(f"evaluation.familiarity: {format_error(error)}")
        return 1
    print_line(f"{len(faces)} faces -> {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
