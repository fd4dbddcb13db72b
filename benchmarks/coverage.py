r"""Is the encoder's distribution over codes honest? Measured on faces of the generator, whose true codes are known.

For each bundle with a distribution: how many nats it gains over the prior N(0, I) of whitened codes; how often the
truth lies in the highest-density regions that should hold it with 50, 80 and 95 %; the same by TARP, whose regions are
balls around random points; and a picture with the TARP curve and the histogram of the truths' ranks among the samples
(flat if honest, a heap in the middle if too wide, heaps at the ends if too narrow).

Examples:
    python benchmarks/coverage.py --bundles gaussian=bundles/celeba64 flow=runs/posterior_64_flow/bundle \
        --picture docs/coverage.png
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.operator import Downscale
from data.report import complete_file
from models.bundle import Bundle, load_bundle
from training.coverage import LEVELS, expected_coverage, ranks, region_levels, tarp

BINS, AT_ONCE = 20, 50
COLOURS = ("#00798c", "#d1495b", "#edae49", "#66a182")
PANEL, MARGIN = (360, 300), 36


@torch.inference_mode()
def measure(bundle: Bundle, lr_size: int, pairs: int, samples: int, seed: int) -> dict[str, Tensor]:
    """Measures one distribution at one LR size.

    Args:
        bundle: With a posterior.
        lr_size: Width of the LR pictures in pixels.
        pairs: Faces.
        samples: Samples per face.
        seed: Of the faces and samples.

    Returns:
        By name, one number per face (N,): "gain" in nats, "region", "tarp"; and "ranks" (N, D) in [0, 1].

    Raises:
        ValueError: If the bundle has no distribution.
    """
    encoder, posterior = bundle.encoder, bundle.encoder.posterior
    if posterior is None:
        raise ValueError(f"Expected a bundle with a distribution, {bundle.name!r} has none; fit posterior_64.yaml.")
    rng = np.random.default_rng((seed, lr_size))
    found: dict[str, list[Tensor]] = {"gain": [], "region": [], "tarp": [], "ranks": []}
    for start in range(0, pairs, AT_ONCE):
        count = min(AT_ONCE, pairs - start)

        def normal(*shape: int, count: int = count) -> Tensor:
            return torch.from_numpy(rng.standard_normal((count, *shape), dtype=np.float32))

        w = bundle.generator.mapping(normal(bundle.generator.z_dim))
        lr = Downscale(lr_size)(bundle.generator.synthesis(w).clamp(-1, 1))
        lr = ((lr + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1
        size = torch.full((count,), lr_size)
        context = encoder.context(encoder.read(encoder.on_canvas(lr), size))
        octave, u = encoder.octave(size), encoder.latents.whiten(w[:, 0])
        drawn = posterior.sample(context, octave, normal(samples, posterior.noise_dim))  # (n, samples, D)
        prior = -0.5 * (u.square() + math.log(2 * math.pi)).sum(dim=1)
        found["gain"].append(posterior.log_prob(context, octave, u) - prior)
        found["region"].append(region_levels(posterior, context, octave, u, drawn))
        found["tarp"].append(tarp(u, drawn, normal(u.shape[1])))
        found["ranks"].append(ranks(u, drawn) / samples)
    return {name: torch.cat(parts) for name, parts in found.items()}


def row(name: str, lr_size: int, found: Mapping[str, Tensor]) -> str:
    """One line of the table."""
    levels = torch.tensor(LEVELS) / 100
    cells = [f"{float(found['gain'].mean()):.1f}"]
    for key in ("region", "tarp"):
        cells += [f"{100 * float(share):.1f}" for share in expected_coverage(found[key], levels)]
    return f"| {name} | {lr_size} | " + " | ".join(cells) + " |"


def picture(found: Mapping[str, Mapping[str, Tensor]]) -> Image.Image:
    """Draws the TARP curves on the left, the histograms of ranks on the right, one colour per distribution.

    Args:
        found: What `measure` gave, by title.

    Returns:
        The picture.
    """
    image = Image.new("RGB", (2 * PANEL[0], PANEL[1] + 18 * len(found)), "white")
    draw = ImageDraw.Draw(image)
    width, height = PANEL[0] - 2 * MARGIN, PANEL[1] - 2 * MARGIN

    def place(panel: int, x: float, y: float) -> tuple[float, float]:
        return panel * PANEL[0] + MARGIN + x * width, MARGIN + (1 - y) * height

    for panel, title in enumerate(("expected coverage by TARP over credibility", "ranks of the truth among samples")):
        draw.rectangle([place(panel, 0, 1), place(panel, 1, 0)], outline="#888888")
        draw.text((panel * PANEL[0] + MARGIN, 12), title, fill="black")
    draw.line([place(0, 0, 0), place(0, 1, 1)], fill="#bbbbbb")
    draw.line([place(1, 0, 0.5), place(1, 1, 0.5)], fill="#bbbbbb")
    alpha = torch.linspace(0, 1, 51)
    for i, (title, values) in enumerate(found.items()):
        colour = COLOURS[i % len(COLOURS)]
        curve = expected_coverage(values["tarp"], alpha)
        draw.line([place(0, float(a), float(c)) for a, c in zip(alpha, curve, strict=True)], fill=colour, width=2)
        density = torch.histc(values["ranks"].float(), BINS, 0, 1) * BINS / values["ranks"].numel()
        steps = [place(1, (b + e) / BINS, min(1.0, float(d) / 2)) for b, d in enumerate(density) for e in (0, 1)]
        draw.line(steps, fill=colour, width=2)
        y = PANEL[1] - 8 + 18 * i
        draw.line([(MARGIN, y + 6), (MARGIN + 30, y + 6)], fill=colour, width=3)
        draw.text((MARGIN + 38, y), title, fill="black")
    return image


def main(args: list[str] | None = None) -> None:
    """Prints the table and draws the picture.

    Args:
        args: Arguments in place of those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bundles", nargs="+", default=["ours=bundles/celeba64"], metavar="NAME=PATH", help="bundles to measure")
    add("--lr", type=int, nargs="+", default=[16, 8], metavar="PX", help="LR sizes (16 8)")
    add("--pairs", type=int, default=1000, help="faces (%(default)s)")
    add("--samples", type=int, default=400, help="samples per face (%(default)s)")
    add("--seed", type=int, default=7, help="of faces and samples; pairs for training have even seeds from 0")
    add("--picture", help="file for the picture, none if left out")
    arguments = parser.parse_args(args)
    for entry in arguments.bundles:
        if "=" not in entry:
            parser.error(f"argument --bundles: expected NAME=PATH, got {entry}")
    heads = [f"{way} {level} %" for way in ("HDR", "TARP") for level in LEVELS]
    print("| distribution | LR px | gain, nats | " + " | ".join(heads) + " |\n|---|---|" + "---:|" * (len(heads) + 1))
    found = {}
    for entry in arguments.bundles:
        name, _, path = entry.partition("=")
        bundle = load_bundle(path)
        for size in arguments.lr:
            key = f"{name}, {size} px"
            found[key] = measure(bundle, size, arguments.pairs, arguments.samples, arguments.seed)
            print(row(name, size, found[key]), flush=True)
    if arguments.picture:
        with complete_file(Path(arguments.picture)) as partial:
            picture(found).save(partial, format="PNG")


if __name__ == "__main__":
    main()
