"""How much faster the encoder is than PULSE: seconds per face of both, in one run, on the generator's faces or photos.

PULSE takes all of its steps for every face; it is timed once after a warm-up of one step, the encoder by its best of
several runs. Both include the drawing of the faces. With --refine, several candidates of each face are searched for
from the encoder's, until they are within ε; its seconds are those of a candidate, like PULSE's, which gives one.

Examples:
    python benchmarks/amortized.py --threads 1
    python benchmarks/amortized.py --faces 1 --passes 0 1 3
    python benchmarks/amortized.py --threads 1 --data celeba128_val.zip --refine 10
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
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.faces import Faces
from data.image_io import from_uint8, to_uint8
from data.operator import Downscale
from models.bundle import DEFAULT_BUNDLE, PRECISIONS, Bundle, load_bundle
from search.candidates import Plan, find_candidates
from search.loop import draw

NEVER = 1e-12  # a tolerance that no face reaches


def best_seconds(run: Callable[[], object], repeats: int) -> float:
    """Gives the shortest of several runs, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def faces_of(bundle: Bundle, source: str | None, count: int) -> Tensor:
    """The faces (N, 3, R, R) in [-1, 1]: photos of a folder or zip, or the generator's where there is none."""
    if source is not None:
        return Faces(source, bundle.resolution, count).images()
    z = np.random.default_rng(0).standard_normal((count, bundle.generator.z_dim), dtype=np.float32)
    with torch.inference_mode():
        return bundle.generator(torch.from_numpy(z)).clamp(-1, 1)


def main(args: list[str] | None = None) -> None:
    """Prints seconds per face and their ratios.

    Args:
        args: Arguments in place of those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bundle", default=str(DEFAULT_BUNDLE), help="bundle to measure (default: bundles/celeba64)")
    add("--faces", type=int, default=16, help="faces at once (%(default)s)")
    add("--data", metavar="SOURCE", help="photos, a folder or zip (default: faces of the generator)")
    add("--lr", type=int, default=16, metavar="PX", help="LR size (%(default)s)")
    add("--steps", type=int, default=100, help="of PULSE (%(default)s)")
    add("--passes", type=int, nargs="+", default=[0, 3], help="of learned feedback (0 3)")
    add("--refine", type=int, default=0, metavar="STEPS", help="time a search from the encoder's candidates as well")
    add("--k", type=int, default=4, help="candidates that --refine searches for, of each face (%(default)s)")
    add("--precision", choices=PRECISIONS, default="float32", help="of the encoder; PULSE has float32 (%(default)s)")
    add("--threads", type=int, help="of torch (all cores)")
    arguments = parser.parse_args(args)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    bundle = load_bundle(arguments.bundle, precision=arguments.precision)
    published = replace(bundle, precision="float32")  # PULSE does not compute in bfloat16
    lr = from_uint8(to_uint8(Downscale(arguments.lr)(faces_of(bundle, arguments.data, arguments.faces))))

    def pulse(steps: int) -> object:
        return find_candidates(published, lr, 1, Plan("pulse", "random", steps, epsilon=NEVER))

    def refined() -> object:
        return draw(bundle.generator.synthesis, find_candidates(bundle, lr, arguments.k, Plan(steps=arguments.refine)))

    pulse(1)
    searched = best_seconds(lambda: pulse(arguments.steps), 1) / len(lr)
    print("| method | seconds a face | times faster |\n|---|---:|---:|")
    print(f"| PULSE, {arguments.steps} steps | {searched:.4f} | 1 |")
    for passes in arguments.passes:

        def encode(passes: int = passes) -> object:
            return bundle.upsample(lr, 1, passes=passes)

        encode()
        seconds = best_seconds(encode, 5) / len(lr)
        print(f"| ours, {passes} passes of feedback | {seconds:.4f} | {searched / seconds:.0f} |", flush=True)
    if arguments.refine:
        refined()
        seconds = best_seconds(refined, 2) / len(lr) / arguments.k
        print(f"| ours, refined, {arguments.k} candidates a face | {seconds:.4f} | {searched / seconds:.1f} |")


if __name__ == "__main__":
    main()
