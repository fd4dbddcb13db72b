"""Measures a generator: its Fréchet distance between a floor and ceilings that give the number a meaning.

Examples:
    python benchmarks/prior.py --generator bundles/celeba64/generator.safetensors --grid samples.png
    python benchmarks/prior.py --generator my.pt --samples 5000 --val my_val.zip --train my_train.zip
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.faces import Faces
from data.operator import Downscale, upscale_bicubic
from evaluation.frechet import frechet_metric
from models import Generator, load_generator
from training.batches import step_rng

BATCH = 50
SAMPLES, GRID, SUBSET = -3, -4, -5  # "steps" of `step_rng`, apart from those of training


def to_bytes(images: Tensor) -> Tensor:
    """Turns images (B, 3, H, W) in [-1, 1], clamped, into uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


@torch.no_grad()
def drawn_faces(generator: Generator, count: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Draws faces at truncation 1 with stored noise, in batches uint8 (B, 3, R, R).

    Never seed `rng` with the bare seed of a training: weights that were initialised from the same stream correlate
    with such z, and the faces come out wrong.
    """
    for first in range(0, count, BATCH):
        z = torch.randn(min(BATCH, count - first), generator.z_dim, device=rng.device, generator=rng)
        yield to_bytes(generator(z))


def real_faces(faces: Faces, indices: list[int]) -> Iterator[Tensor]:
    """Gives batches uint8 (B, 3, R, R) of the faces with the given indices."""
    for first in range(0, len(indices), BATCH):
        yield torch.stack([faces[i] for i in indices[first : first + BATCH]])


def bicubic_faces(batches: Iterator[Tensor], factor: int) -> Iterator[Tensor]:
    """Gives faces uint8 (B, 3, R, R) downscaled by `factor` and enlarged again."""
    for batch in batches:
        size = batch.shape[-1]
        yield to_bytes(upscale_bicubic(Downscale(size // factor)(batch / 127.5 - 1), size))


def measure(arguments: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """Measures generator, floor and ceilings against the same validation faces: the metric's name, distances by row."""
    device = torch.device(arguments.device)
    generator = load_generator(arguments.generator, device)
    val = Faces(arguments.val, generator.resolution, arguments.samples)
    train = Faces(arguments.train, generator.resolution, cache_bytes=0)
    name, metric = frechet_metric(arguments.metric)
    metric = metric.to(device)
    everyone = list(range(len(val)))
    order = torch.randperm(len(train), generator=step_rng(arguments.seed, SUBSET, 0, "cpu")).tolist()
    for batch in real_faces(val, everyone):
        metric.update(batch.to(device), real=True)
    rng = step_rng(arguments.seed, SAMPLES, 0, device)
    rows = {
        "real: training faces": real_faces(train, order[: arguments.samples]),
        "generator, truncation 1": drawn_faces(generator, arguments.samples, rng),
        "bicubic x4": bicubic_faces(real_faces(val, everyone), 4),
        "bicubic x8": bicubic_faces(real_faces(val, everyone), 8),
    }
    distances = {}
    for row, batches in rows.items():
        for batch in batches:
            metric.update(batch.to(device), real=False)
        distances[row] = float(metric.compute())
        metric.reset()  # keeps the real faces
    if arguments.grid:
        save_grid(generator, arguments.grid, step_rng(arguments.seed, GRID, 0, device))
    return name, distances


def save_grid(generator: Generator, path: str | Path, rng: torch.Generator) -> None:
    """Writes 8 x 6 faces, not chosen."""
    faces = torch.cat(list(drawn_faces(generator, 48, rng)))
    grid = make_grid(faces.cpu(), nrow=8, padding=2)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


def main(args: list[str] | None = None) -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", required=True, help="weights that models.load_generator reads")
    parser.add_argument("--samples", type=int, default=2000, help="faces per set (default: %(default)s)")
    parser.add_argument("--val", default="celeba128_val.zip", help="validation faces, the reference")
    parser.add_argument("--train", default="celeba128_train.zip", help="training faces, for the floor")
    parser.add_argument("--metric", default="auto", choices=["auto", "fid", "fd_vgg11"])
    parser.add_argument("--grid", help="where to write a grid of samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(args)
    if arguments.samples < 2:
        parser.error(f"Expected at least 2 samples for a covariance, got {arguments.samples}.")
    name, distances = measure(arguments)
    print(f"| {arguments.samples} faces against validation faces | {name} |")
    print("|---|---|")
    for row, distance in distances.items():
        print(f"| {row} | {distance:.4f} |")


if __name__ == "__main__":
    main()
