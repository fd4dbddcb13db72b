"""How much faster the encoder is than PULSE: seconds per face of both, in one run, on faces that the generator drew.

PULSE takes all of its steps for every face; it is timed once after a warm-up of one step, the encoder by its best of
several runs. Both include the drawing of the faces.

Examples:
    python benchmarks/amortized.py --threads 1
    python benchmarks/amortized.py --faces 1 --passes 0 1 3
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.operator import Downscale
from models.bundle import DEFAULT_BUNDLE, PRECISIONS, load_bundle
from search.candidates import Plan, find_candidates

NEVER = 1e-12  # a tolerance that no face reaches


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """Gives the shortest of several runs, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main(args: list[str] | None = None) -> None:
    """Prints seconds per face and their ratios.

    Args:
        args: Arguments in place of those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bundle", default=str(DEFAULT_BUNDLE), help="bundle to measure (default: bundles/celeba64)")
    add("--faces", type=int, default=16, help="faces at once (%(default)s)")
    add("--lr", type=int, default=16, metavar="PX", help="LR size (%(default)s)")
    add("--steps", type=int, default=100, help="of PULSE (%(default)s)")
    add("--passes", type=int, nargs="+", default=[0, 3], help="of learned feedback (0 3)")
    add("--precision", choices=PRECISIONS, default="float32", help="of the encoder; PULSE has float32 (%(default)s)")
    add("--threads", type=int, help="of torch (all cores)")
    arguments = parser.parse_args(args)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    bundle = load_bundle(arguments.bundle, precision=arguments.precision)
    published = replace(bundle, precision="float32")  # PULSE does not compute in bfloat16
    z = np.random.default_rng(0).standard_normal((arguments.faces, bundle.generator.z_dim), dtype=np.float32)
    with torch.inference_mode():
        lr = Downscale(arguments.lr)(bundle.generator(torch.from_numpy(z)).clamp(-1, 1))

    def pulse(steps: int) -> object:
        return find_candidates(published, lr, 1, Plan("pulse", "random", steps, epsilon=NEVER))

    pulse(1)
    searched = best_seconds(lambda: pulse(arguments.steps), 1) / arguments.faces
    print("| method | seconds a face | times faster |\n|---|---:|---:|")
    print(f"| PULSE, {arguments.steps} steps | {searched:.4f} | 1 |")
    for passes in arguments.passes:

        def encode(passes: int = passes) -> object:
            return bundle.upsample(lr, 1, passes=passes)

        encode()
        seconds = best_seconds(encode, 5) / arguments.faces
        print(f"| ours, {passes} passes of feedback | {seconds:.4f} | {searched / seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
