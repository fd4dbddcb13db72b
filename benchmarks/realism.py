"""Measures how real a generator's faces look: distances between a floor and ceilings that give the numbers a meaning.

VGG11 knows colour and texture, EdgeFace faces; no loss uses either. ImageNet features are flattered by sharp texture on
broken faces, so look at all columns, and at the grid.

Examples:
    python benchmarks/realism.py --generator bundles/celeba64/generator.safetensors --grid samples.png
    python benchmarks/realism.py --generator my.pt --size 64 --samples 5000 --val my_val.zip --train my_train.zip
    python benchmarks/realism.py --generator my.pt --val CelebAMask-HQ.zip --train CelebAMask-HQ.zip --split celebahq
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.faces import Faces
from data.operator import Downscale, upscale_bicubic
from data.splits import add_split_options
from evaluation.features import EdgeFace, VGG11Features
from evaluation.frechet import frechet_distance, kernel_distance
from models import Generator, load_generator
from models.device import faces_at_once
from training.batches import step_rng

BATCH = 50
SAMPLES, GRID, SUBSET = -3, -4, -5  # "steps" of `step_rng`, apart from those of training
COLUMNS = {"fd_vgg11": (0, frechet_distance), "kid_vgg11": (0, kernel_distance), "fd_edgeface": (1, frechet_distance)}


def to_bytes(images: Tensor) -> Tensor:
    """Turns images (B, 3, H, W) in [-1, 1], clamped, into uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


@torch.no_grad()
def generated_faces(generator: Generator, count: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Generates faces at truncation 1 with stored noise, in batches uint8 (B, 3, R, R).

    Never seed `rng` with the bare seed of a training: weights that were initialised from the same stream correlate
    with such z, and the faces come out wrong.
    """
    for first in range(0, count, BATCH):
        z = torch.randn(min(BATCH, count - first), generator.z_dim, device=rng.device, generator=rng)
        yield torch.cat([to_bytes(generator(part)) for part in z.split(faces_at_once(generator))])


def real_faces(faces: Faces, indices: list[int]) -> Iterator[Tensor]:
    """Gives batches uint8 (B, 3, R, R) of the faces with the given indices."""
    for first in range(0, len(indices), BATCH):
        yield torch.stack([faces[i] for i in indices[first : first + BATCH]])


def resized(batches: Iterator[Tensor], size: int, factor: int = 1) -> Iterator[Tensor]:
    """Gives faces uint8 (B, 3, size, size), downscaled by `factor` and enlarged again."""
    for batch in batches:
        x = batch / 127.5 - 1
        x = Downscale(size)(x) if size < x.shape[3] else upscale_bicubic(x, size)
        yield to_bytes(upscale_bicubic(Downscale(size // factor)(x), size) if factor > 1 else x)


def networks(device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Loads both networks, and gives a function from faces uint8 (B, 3, H, W) to what they see (B, 256), (B, 512)."""
    vgg, edgeface = VGG11Features().to(device), EdgeFace().to(device)
    return lambda faces: (vgg(faces), edgeface(faces / 127.5 - 1))


def measure(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measures generator, floor and ceilings against the same validation faces: distances by row and column."""
    device = torch.device(arguments.device)
    see = networks(device)
    generator = load_generator(arguments.generator, device)
    size = arguments.size or generator.resolution
    val = Faces(arguments.val, size, arguments.samples, split=arguments.split, part=arguments.part)
    train = Faces(arguments.train, size, cache_bytes=0, split=arguments.split, part="train")
    everyone, rng = list(range(len(val))), step_rng(arguments.seed, SAMPLES, 0, device)
    order = torch.randperm(len(train), generator=step_rng(arguments.seed, SUBSET, 0, "cpu")).tolist()
    rows = {
        "real: validation faces": real_faces(val, everyone),
        "real: training faces": real_faces(train, order[: len(val)]),
        "generator, truncation 1": resized(generated_faces(generator, len(val), rng), size),
        "bicubic x2": resized(real_faces(val, everyone), size, 2),
        "bicubic x4": resized(real_faces(val, everyone), size, 4),
    }
    seen = {}
    for row, batches in rows.items():
        found = [see(batch.to(device)) for batch in batches]
        seen[row] = [torch.cat(features).cpu() for features in zip(*found, strict=True)]
    truth = seen.pop("real: validation faces")
    if arguments.grid:
        save_grid(generator, arguments.grid, step_rng(arguments.seed, GRID, 0, device))
    return {
        row: {name: distance(truth[i], features[i]) for name, (i, distance) in COLUMNS.items()}
        for row, features in seen.items()
    }


def save_grid(generator: Generator, path: str | Path, rng: torch.Generator) -> None:
    """Writes 8 x 6 faces, not chosen."""
    faces = torch.cat(list(generated_faces(generator, 48, rng)))
    grid = make_grid(faces.cpu(), nrow=8, padding=2)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


def main(args: list[str] | None = None) -> None:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generator", required=True, help="weights that models.load_generator reads")
    parser.add_argument("--size", type=int, metavar="PX", help="compare at this size (default: the generator's)")
    parser.add_argument("--samples", type=int, default=2000, help="faces per set (default: %(default)s)")
    parser.add_argument("--val", default="celeba128_val.zip", help="validation faces, the reference")
    parser.add_argument("--train", default="celeba128_train.zip", help="training faces, for the floor")
    add_split_options(parser)
    parser.add_argument("--grid", help="where to write a grid of samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(args)
    if arguments.samples < 2:
        parser.error(f"Expected at least 2 samples for a covariance, got {arguments.samples}.")
    table = measure(arguments)
    print(f"| {arguments.samples} faces against validation faces | " + " | ".join(COLUMNS) + " |")
    print("|---|" + "---:|" * len(COLUMNS))
    for row, distances in table.items():
        print(f"| {row} | " + " | ".join(f"{value:.3g}" for value in distances.values()) + " |")


if __name__ == "__main__":
    main()
