"""Measures how fast the generator synthesizes, next to rosinality's on the same machine.

All variants take turns in one process, so that their ratios hold even where times do not.

Examples:
    python benchmarks/generator.py --rosinality stylegan2-pytorch    # a checkout, for the ratios
    python benchmarks/generator.py --gradient --resolution 256 --rosinality stylegan2-pytorch
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.references import rosinality_module
from models.generator import Generator

Synthesis = Callable[[Tensor], Tensor]  # ws (B, L, 512) -> images (B, 3, R, R)
REFERENCE, EXACT, HALF = "rosinality, float32", "ours, float32", "ours, bfloat16"
CHECKPOINTED = "ours, finest block checkpointed"


@dataclass
class Result:
    """What one variant took."""

    seconds: list[float]  # per image, one value per round
    megabytes: float | None  # peak memory beyond the weights, None where the system does not tell
    difference: float | None  # see `grey_levels`; None for float32 itself


def make_synthesis(name: str, resolution: int, checkout: str | None) -> Synthesis:
    """Builds a variant of R px with random weights; REFERENCE takes a checkout of rosinality's code."""
    torch.manual_seed(0)
    if name == REFERENCE:
        network = rosinality_module(Path(str(checkout)).resolve()).Generator(resolution, 512, 8).eval()
        network.requires_grad_(False)
        return lambda ws: network([ws], input_is_latent=True, randomize_noise=False)[0]
    generator = Generator(resolution).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    generator.synthesis.checkpointed = int(name == CHECKPOINTED)

    def synthesize(ws: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=name == HALF):
            return generator.synthesis(ws)

    return synthesize


def codes(batch: int, resolution: int) -> Tensor:
    """Samples style codes (B, L, 512), the same every time."""
    styles = 2 * resolution.bit_length() - 4
    return torch.randn(batch, styles, 512, generator=torch.Generator().manual_seed(1))


def once(synthesize: Synthesis, ws: Tensor, gradient: bool) -> float:
    """Times one batch, with the gradient of its codes or without; in seconds per image."""
    start = time.perf_counter()
    if gradient:
        leaf = ws.clone().requires_grad_(True)
        synthesize(leaf).square().mean().backward()
    else:
        with torch.no_grad():
            synthesize(ws)
    return (time.perf_counter() - start) / len(ws)


def peak_megabytes(name: str, resolution: int, checkout: str | None, batch: int, gradient: bool) -> float | None:
    """Measures a variant's peak memory beyond its weights, in this process, which should be a fresh one."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    synthesize, ws = make_synthesis(name, resolution, checkout), codes(batch, resolution)
    once(synthesize, ws, gradient)  # what libraries keep for themselves
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _kilobytes(status, "VmRSS")
    once(synthesize, ws, gradient)
    return (_kilobytes(status, "VmHWM") - before) / 1024


def _kilobytes(status: Path, field: str) -> int:
    return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])


@torch.no_grad()
def grey_levels(resolution: int) -> float:
    """Measures the mean difference of bfloat16 from float32, in levels of 255 where images have a spread of 0.5."""
    ws = codes(1, resolution)
    exact, half = (make_synthesis(name, resolution, None)(ws) for name in (EXACT, HALF))
    return float((exact - half).abs().mean() / exact.std() * 0.5 * 127.5)


def measure(arguments: argparse.Namespace) -> dict[str, Result]:
    """Measures all variants that the options of `main` ask for; the results by name."""
    names = [REFERENCE] * bool(arguments.rosinality) + [EXACT, CHECKPOINTED if arguments.gradient else HALF]
    batch, resolution, checkout = arguments.batch, arguments.resolution, arguments.rosinality
    ws = codes(batch, resolution)
    variants = {name: make_synthesis(name, resolution, checkout) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(arguments.rounds + 1):
        for name, synthesize in variants.items():
            spent = once(synthesize, ws, arguments.gradient)
            if turn:  # the first does not count
                seconds[name].append(spent)
    results = {}
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            task = partial(peak_megabytes, name, resolution, checkout, batch, arguments.gradient)
            megabytes = pool.apply(task)
        results[name] = Result(seconds[name], megabytes, grey_levels(resolution) if name == HALF else None)
    return results


def report(results: dict[str, Result], arguments: argparse.Namespace) -> str:
    """Writes the results as a table in Markdown."""
    what = "forward and backward" if arguments.gradient else "forward"
    lines = [
        f"{arguments.resolution} px, batch {arguments.batch}, {what}, {torch.get_num_threads()} threads",
        "",
        "| variant | ms per image | speed-up | peak MB | grey levels off |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, result in results.items():
        ratio = "–"
        if REFERENCE in results:
            pairs = zip(results[REFERENCE].seconds, result.seconds, strict=True)
            ratio = f"{statistics.median(a / b for a, b in pairs):.2f}"
        memory = "–" if result.megabytes is None else f"{result.megabytes:.0f}"
        off = "–" if result.difference is None else f"{result.difference:.2f}"
        lines.append(f"| {name} | {1e3 * statistics.median(result.seconds):.0f} | {ratio} | {memory} | {off} |")
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rosinality", metavar="DIR", help="checkout of rosinality/stylegan2-pytorch to compare with")
    parser.add_argument("--resolution", type=int, default=1024, choices=[32, 64, 128, 256, 512, 1024])
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: 1)")
    parser.add_argument("--gradient", action="store_true", help="forward and backward to the codes, as a search does")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every variant (default: 5)")
    arguments = parser.parse_args(args)
    if arguments.rosinality and not (Path(arguments.rosinality) / "model.py").is_file():
        parser.error(
            f"Expected a checkout with model.py in it, found none in {arguments.rosinality}; "
            "git clone https://github.com/rosinality/stylegan2-pytorch"
        )
    if arguments.batch < 1 or arguments.rounds < 1:
        parser.error("Expected a batch and a number of rounds of at least 1.")
    print(report(measure(arguments), arguments))


if __name__ == "__main__":
    main()
