"""How Gaussian the search spaces are: squared norms of the generator's own codes, in each space's coordinates.

Where codes are standard normal in D numbers, ‖u‖² follows χ² with D degrees of freedom: mean D, standard deviation √2D.
PULSE relies on it, for it keeps codes at that length; the regularized latent search learns a map for which it holds.

    z              what goes into the mapping network: normal by definition
    PULSE          u = (lrelu₅(w) − μ) / σ, each number for itself
    full Gaussian  u = F⁻¹ (lrelu₅(w) − μ), the whole covariance, see `models.latents`
    flow           u = f(w), see `models.flow`; left out for a bundle without one

Examples:
    python benchmarks/norms.py --flow runs/flow_64/flow.safetensors --picture docs/norms.png
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

from data.report import complete_file
from models.bundle import DEFAULT_BUNDLE, Bundle, load_bundle
from models.flow import FlowPrior, flow_of, load_flow
from models.latents import gaussianize
from search.sphere import GaussianMap

SIZE, MARGIN = (760, 380), 40
COLOURS = {"z": "#888888", "PULSE": "#d1495b", "full Gaussian": "#edae49", "flow": "#00798c"}
BINS = 60


def coordinates(bundle: Bundle, flow: FlowPrior | None, z: Tensor) -> dict[str, Tensor]:
    """Maps latents to the coordinates of each space.

    Args:
        bundle: The generator and its statistics.
        flow: f, or None.
        z: Latents (N, Z).

    Returns:
        Coordinates (N, Z or D) by the space's name.
    """
    latents = bundle.encoder.latents
    w = bundle.generator.mapping(z)[:, 0]  # (N, D)
    found = {"z": z, "PULSE": GaussianMap.of(latents).from_w(w)}
    centred = gaussianize(w) - latents.mean
    found["full Gaussian"] = torch.linalg.solve_triangular(latents.factor, centred.T, upper=False).T
    if flow is not None:
        found["flow"] = torch.cat([flow(part)[0] for part in w.split(2000)])
    return found


def chi_square_density(x: np.ndarray, degrees: int) -> np.ndarray:
    """The density of χ² at x > 0, x^(d/2 − 1) e^(−x/2) / (2^(d/2) Γ(d/2))."""
    half = degrees / 2
    return np.exp((half - 1) * np.log(x) - x / 2 - half * math.log(2) - math.lgamma(half))


def picture(squared: Mapping[str, np.ndarray], degrees: int) -> Image.Image:
    """Draws the distributions of ‖u‖² over that of χ², which is filled.

    Args:
        squared: ‖u‖² (N,) by space.
        degrees: D.

    Returns:
        The picture.
    """
    high = max(float(np.percentile(own, 99.5)) for own in squared.values())
    low = min(float(np.percentile(own, 0.5)) for own in squared.values())
    edges = np.linspace(max(low, 1e-3), high, BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    curves = {name: np.histogram(own, edges)[0] / len(own) / np.diff(edges) for name, own in squared.items()}
    expected = chi_square_density(middles, degrees)
    top = max(expected.max(), *(curve.max() for curve in curves.values())) * 1.05
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)

    def points(curve: np.ndarray) -> list[tuple[float, float]]:
        x = MARGIN + (middles - edges[0]) / (edges[-1] - edges[0]) * (SIZE[0] - 2 * MARGIN)
        y = SIZE[1] - MARGIN - curve / top * (SIZE[1] - 2 * MARGIN)
        return [(float(a), float(b)) for a, b in zip(x, y, strict=True)]

    floor = SIZE[1] - MARGIN
    outline = points(expected)
    draw.polygon([(outline[0][0], floor), *outline, (outline[-1][0], floor)], fill="#e3eef1")
    for name, curve in curves.items():
        draw.line(points(curve), fill=COLOURS[name], width=2)
    draw.line([(MARGIN, floor), (SIZE[0] - MARGIN, floor)], fill="black")
    for value in np.linspace(edges[0], edges[-1], 7):
        x = MARGIN + (value - edges[0]) / (edges[-1] - edges[0]) * (SIZE[0] - 2 * MARGIN)
        draw.text((x - 10, floor + 6), f"{value:.0f}", fill="black")
    draw.text((SIZE[0] // 2 - 110, 12), f"squared norm of codes, D = {degrees}; filled: chi-square", fill="black")
    for row, name in enumerate(curves):
        draw.line([(SIZE[0] - 180, 42 + 18 * row), (SIZE[0] - 150, 42 + 18 * row)], fill=COLOURS[name], width=3)
        draw.text((SIZE[0] - 142, 36 + 18 * row), name, fill="black")
    return image


@torch.inference_mode()
def main(args: list[str] | None = None) -> None:
    """Prints means and standard deviations of ‖u‖², relative to those of χ², and draws the picture.

    Args:
        args: Arguments in place of those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default=str(DEFAULT_BUNDLE))
    parser.add_argument("--flow", help="flow.safetensors of a training; left out: the bundle's own, if it has one")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--picture", default="docs/norms.png")
    arguments = parser.parse_args(args)
    bundle = load_bundle(arguments.bundle)
    try:
        flow = (
            load_flow(arguments.flow, bundle.info["parts"]["generator.safetensors"])
            if arguments.flow
            else flow_of(bundle)
        )
    except ValueError as error:
        if arguments.flow:
            parser.error(str(error))
        flow = None
    z = np.random.default_rng(1).standard_normal((arguments.samples, bundle.generator.z_dim), dtype=np.float32)
    found = coordinates(bundle, flow, torch.from_numpy(z))
    degrees = bundle.generator.w_dim
    print("| space | mean / D | standard deviation / √2D |\n|---|---|---|")
    squared = {name: u.square().sum(dim=1).numpy() for name, u in found.items()}
    for name, own in squared.items():
        width = found[name].shape[1]
        print(f"| {name} | {own.mean() / width:.3f} | {own.std() / math.sqrt(2 * width):.3f} |")
    with complete_file(Path(arguments.picture)) as partial:
        picture(squared, degrees).save(partial, format="PNG")


if __name__ == "__main__":
    main()
