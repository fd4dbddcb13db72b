"""Compares searches on the same faces: how many candidates come within ε, how far the codes move, at what work.

Examples:
    python benchmarks/search.py --faces 200 --lr 16 8 --k 4 --data celeba128_val.zip
    python benchmarks/search.py --faces 8 --k 1 --methods encoder plain curvature     # faces drawn by the bundle

Passes are generator passes per candidate (forward 1, backward 2, forward-mode derivative 2); PULSE's 100 steps are 300.
"Moved" is the root mean square distance of the codes from their start, in standard deviations of w.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.faces import Faces
from data.image_io import from_uint8, to_uint8
from data.operator import EPSILON, Downscale
from models.bundle import DEFAULT_BUNDLE, Bundle, load_bundle
from models.determinism import use_deterministic_kernels
from search.candidates import Plan, curvature_of, find_candidates, rows_at_once, start_codes
from search.loop import Found, search
from search.optimisers import Adam, constant
from search.refine import OPTIMISERS, SPACES, RefineSettings, refine_problem, spread_of_w
from search.sphere import GaussianMap

ADAM = "Adam 200, plain W+, from the mean"
Searched = tuple[Found, Tensor]
"""What was found, and the codes (N, L, D) that it started from."""


def adam_from_the_mean(bundle: Bundle, lr: Tensor, k: int, steps: int = 200) -> Searched:
    """The yardstick: Adam at 0.1 deviations in plain W+, no prior, from the mean and about it."""
    ws = start_codes(bundle, lr, k, Plan(start="mean"))
    operator = Downscale(lr.shape[-1])
    problem = refine_problem(
        bundle.generator.synthesis, bundle.encoder.latents, operator, RefineSettings(space="plain", pull=0.0)
    )
    variables, target = {"x": torch.zeros_like(ws)}, lr.repeat_interleave(k, dim=0)
    optimiser = Adam(constant(0.1))
    return search(
        problem, variables, {"start": ws}, target, optimiser, steps, EPSILON, at_once=rows_at_once(bundle)
    ), ws


def encoder_alone(bundle: Bundle, lr: Tensor, k: int) -> Searched:
    """The encoder's candidates as they are."""
    return find_candidates(bundle, lr, k, Plan()), start_codes(bundle, lr, k, Plan())


def pulse(bundle: Bundle, lr: Tensor, k: int, steps: int = 100) -> Searched:
    """PULSE as published, with the paper's ε."""
    found = find_candidates(bundle, lr, k, Plan("pulse", "random", steps))
    rngs = [np.random.default_rng((0, j)) for j in range(k)]
    shape = (bundle.generator.num_ws, bundle.generator.w_dim)
    u = torch.from_numpy(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs])).to(bundle.device)
    return found, GaussianMap.of(bundle.encoder.latents).to_w(u).repeat(len(lr), 1, 1)


def ours(settings: RefineSettings, steps: int) -> Callable[[Bundle, Tensor, int], Searched]:
    """Our refinement of the encoder's candidates."""

    def run(bundle: Bundle, lr: Tensor, k: int) -> Searched:
        plan = Plan(steps=steps, settings=settings)
        return find_candidates(bundle, lr, k, plan), start_codes(bundle, lr, k, plan)

    return run


def make_methods(steps: int, rates: list[float]) -> dict[str, Callable[[Bundle, Tensor, int], Searched]]:
    """Names what can be compared; Adam of ours comes with each of the learning rates."""
    methods: dict[str, Callable[[Bundle, Tensor, int], Searched]] = {
        "encoder": encoder_alone,
        ADAM: adam_from_the_mean,
        "PULSE 100": pulse,
    }
    for space in SPACES:
        for optimiser in OPTIMISERS:
            for rate in rates if optimiser == "adam" else [0.0]:
                name = f"ours {steps}, {optimiser}{f' {rate:g}' if rate else ''}, {space}"
                methods[name] = ours(RefineSettings(optimiser, space, rate=rate), steps)
    return methods


def read_faces(arguments: argparse.Namespace, bundle: Bundle) -> Tensor:
    """Gives faces (N, 3, R, R) in [-1, 1]: photos, or else faces that the generator draws, which are easier."""
    if arguments.data:
        return Faces(arguments.data, bundle.resolution, arguments.faces, cache_bytes=0).images()
    z = np.random.default_rng(1).standard_normal((arguments.faces, bundle.generator.z_dim), dtype=np.float32)
    with torch.no_grad():
        return bundle.generator(torch.from_numpy(z).to(bundle.device), truncation_psi=0.7).clamp(-1, 1).cpu()


def row(name: str, size: int, found: Found, start: Tensor, sigma: float, seconds: float) -> str:
    """Writes a row of the table."""
    errors, moved = found.errors, (found.ws - start).square().mean(dim=(1, 2)).sqrt() / sigma
    share = float((errors <= EPSILON).float().mean())
    return (
        f"| {size} | {name} | {share:.1%} | {float(errors.mean()):.2e} | {float(errors.median()):.2e} | "
        f"{float(moved.mean()):.3f} | {float(found.passes.float().mean()):.1f} | {seconds / len(errors):.3f} |"
    )


def main(args: list[str] | None = None) -> None:
    """Prints the table in Markdown.

    Args:
        args: Arguments in place of those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default=str(DEFAULT_BUNDLE))
    parser.add_argument("--data", help="photos, a zip or a folder; left out: faces that the bundle draws")
    parser.add_argument("--faces", type=int, default=8, help="the first so many (default: %(default)s)")
    parser.add_argument("--lr", type=int, nargs="+", default=[16, 8], help="sizes in px (default: 16 8)")
    parser.add_argument("--k", type=int, default=4, help="candidates per face (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of ours (default: %(default)s)")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.045], help="of ours with Adam, in deviations")
    parser.add_argument("--methods", nargs="+", help="those whose names contain one of these; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(args)
    use_deterministic_kernels()
    bundle = load_bundle(arguments.bundle, arguments.device)
    faces, sigma = read_faces(arguments, bundle), spread_of_w(bundle.encoder.latents)
    print(f"{len(faces)} faces, {arguments.k} candidates each, ε = {EPSILON:g}, {arguments.device}\n")
    print("| LR px | method | within ε | mean error | median error | moved | passes | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for size in arguments.lr:
        lr = from_uint8(to_uint8(Downscale(size)(faces))).to(bundle.device)
        for name, method in make_methods(arguments.steps, arguments.rates).items():
            if arguments.methods and not any(part in name for part in arguments.methods):
                continue
            if "curvature" in name:
                curvature_of(bundle, size)  # once for a generator and a size, so not in the seconds
            begin = time.perf_counter()
            found, start = method(bundle, lr, arguments.k)
            seconds = time.perf_counter() - begin  # found.errors was read on the host: the work is done
            print(row(name, size, found, start, sigma, seconds), flush=True)


if __name__ == "__main__":
    main()
