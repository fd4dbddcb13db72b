"""What `infer.py --search STEPS` changes: the residual before projection, the spread of the samples, their fidelity.

Example:
    python benchmarks/search.py --faces 200 --lr 16 8 --steps 10

Samples of the same photos without and with the search, both projected. Columns: the residual before projection, mean
square of (y − D G(w)) / 2; share within ε; LR-PSNR, mean and worst; LPIPS truth–point estimate, truth–draw, draw–draw;
generator calls and seconds for each sample.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.faces import Faces
from data.image_io import from_uint8, to_uint8
from data.operator import Downscale, back_project
from evaluation.metrics import MetricSuite
from models.bundle import DEFAULT_BUNDLE, Bundle, load_bundle
from models.determinism import use_deterministic_kernels
from search.loop import SearchResult
from search.plan import EPSILONS, SearchPlan
from search.samples import find_samples, synthesize

AT_ONCE = 16  # faces


def find(bundle: Bundle, lr: Tensor, k: int, plan: SearchPlan) -> tuple[Tensor, SearchResult, float]:
    """Searches for samples of faces (B, 3, s, s): projected images (B, k, 3, R, R), the results, and seconds."""
    start = time.perf_counter()
    result = find_samples(bundle, lr, k, plan)
    images = back_project(synthesize(bundle, result), lr.to(bundle.device).repeat_interleave(k, dim=0))
    return images.unflatten(0, (len(lr), k)).cpu(), result, time.perf_counter() - start


def measure(
    bundle: Bundle, suite: MetricSuite, faces: Tensor, lr: Tensor, k: int, plan: SearchPlan
) -> dict[str, float]:
    """Measures samples by a plan; see the table's columns."""
    found = [find(bundle, part, k, plan) for part in lr.split(AT_ONCE)]
    figures = suite(faces, torch.cat([images for images, *_ in found]), lr)
    residual, nfe = (torch.cat([getattr(r, name) for _, r, _ in found]).cpu() for name in ("residual", "nfe"))
    figures |= {"residual": float(residual.mean()), "converged": float((residual <= plan.tolerance).float().mean())}
    return figures | {"nfe": float(nfe.float().mean()), "seconds": sum(s for *_, s in found) / len(nfe)}


def table_row(size: int, steps: int, f: dict[str, float]) -> str:
    """Writes a row of the table."""
    decibels = f"{f['lr_psnr']:.1f} | {f['lr_psnr_worst']:.1f}"
    lpips = " | ".join(f"{f[f'lpips_{name}']:.4f}" for name in ("point", "draw", "draws"))
    cells = f"{f['residual']:.2e} | {f['converged']:.0%} | {decibels} | {lpips} | {f['nfe']:.1f} | {f['seconds']:.3f}"
    return f"| {size} | {steps} | {cells} |"


def main(args: list[str] | None = None) -> None:
    """Prints the table in Markdown.

    Args:
        args: Arguments in place of those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bundle", default=str(DEFAULT_BUNDLE))
    add("--data", default="celeba128_val.zip", help="photos, a zip or a folder (default: %(default)s)")
    add("--faces", type=int, default=200, help="the first so many (default: %(default)s)")
    add("--lr", type=int, nargs="+", default=[16, 8], help="sizes in px (default: 16 8)")
    add("--k", type=int, default=4, help="samples per face, from 3 (default: %(default)s)")
    add("--steps", type=int, nargs="+", default=[0, 10], help="of the search (default: 0 10)")
    add("--epsilon", type=float, default=EPSILONS["amortized"], help="default: %(default)s")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(args)
    use_deterministic_kernels()
    bundle, suite = load_bundle(arguments.bundle, arguments.device), MetricSuite(arguments.device, ["lpips"])
    faces = Faces(arguments.data, bundle.resolution, arguments.faces, cache_bytes=0).images()
    print(f"{len(faces)} faces, {arguments.k} samples each, ε = {arguments.epsilon:g}, {arguments.device}\n")
    print("| LR px | steps | residual | within ε | LR-PSNR | worst | point | draw | draws | nfe | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for size in arguments.lr:
        lr = from_uint8(to_uint8(Downscale(size)(faces)))
        for steps in arguments.steps:
            plan = SearchPlan(steps=steps, epsilon=arguments.epsilon)
            print(table_row(size, steps, measure(bundle, suite, faces, lr, arguments.k, plan)), flush=True)


if __name__ == "__main__":
    main()
