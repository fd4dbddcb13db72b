"""How many samples, and how they are made: the options, and what the report says of it."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Any

from pipeline.samples import Samples
from pipeline.wanted import Wanted

MAX_K = 64
SAVED = ("images", "grid", "latents", "report")


@dataclass(frozen=True)
class Sampling:
    """What is asked for; of the samples that are made, those that are far apart are kept."""

    wanted: Wanted  # of the pipeline; its k is what is sampled
    kept: int  # samples of each face

    def select(self, samples: Samples) -> Samples:
        """Keeps what is asked for of the samples of one face."""
        if self.kept == self.wanted.k:
            return samples
        from pipeline.selection import select_apart

        return select_apart(samples, self.kept)


def add_sampling_options(group: argparse._ArgumentGroup) -> None:
    """Adds -k, --seed, --fidelity, --noise-sigma and --select to a group of options."""
    add = group.add_argument
    add("-k", "--k", metavar="K", type=int, default=4, help=f"samples per face, 1 to {MAX_K} (default: 4)")
    add("--seed", metavar="N", type=int, default=0, help="of all random choices, from 0 (default: 0)")
    add(
        "--fidelity",
        metavar="λ",
        type=float,
        default=1.0,
        help="how exactly every sample downscales to the input: 1 exactly, 0 as the generator left it (default: 1)",
    )
    add(
        "--noise-sigma",
        metavar="S",
        type=float,
        help="standard deviation of the input's noise in grey levels, which samples need not follow; 0 for a clean "
        "input (default: estimated)",
    )
    add("--select", metavar="K-of-N", help="keep K of N samples, those that are far apart, such as 4-of-16")


def read_sampling(args: argparse.Namespace) -> Sampling:
    """Reads the options that `add_sampling_options` added; ValueError if one cannot be followed."""
    k, sampled = args.k, None
    if args.select is not None:
        match = re.fullmatch(r"(\d+)-of-(\d+)", args.select)
        k, sampled = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= k <= sampled <= MAX_K:
            raise ValueError(
                f"--select: expected K-of-N with 1 ≤ K ≤ N ≤ {MAX_K}, such as 4-of-16, got {args.select!r}"
            )
    if not 1 <= k <= MAX_K:
        raise ValueError(f"--k: expected 1 to {MAX_K} samples, got {k}")
    if args.seed < 0:
        raise ValueError(f"--seed: expected 0 or a larger number, got {args.seed}")
    if not 0 <= args.fidelity <= 1:
        raise ValueError(f"--fidelity: expected 0 to 1, got {args.fidelity}")
    if args.noise_sigma is not None and not 0 <= args.noise_sigma <= 255:
        raise ValueError(f"--noise-sigma: expected 0 to 255 grey levels, got {args.noise_sigma}")
    return Sampling(Wanted(sampled or k, args.seed, args.fidelity, args.noise_sigma), k)


def summarize_samples(samples: Samples, sampling: Sampling) -> dict[str, Any]:
    """Says in a report how the samples of one face were made, and how well each fits."""
    rows = [
        {"file": f"{i}.png", "lr_psnr": round(float(db), 2), "residual": float(f"{error:.3g}")}
        for i, (db, error) in enumerate(zip(samples.lr_psnr, samples.residual, strict=True), start=1)
    ]
    wanted = sampling.wanted
    notes = {"k": sampling.kept, "seed": wanted.seed, "fidelity": wanted.fidelity, "samples": rows}
    if sampling.kept != wanted.k:
        notes["selected_of"] = wanted.k
    return notes | {"noise_sigma": round(float(samples.sigma), 1)}
