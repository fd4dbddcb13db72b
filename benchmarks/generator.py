"""Measures how fast the generator draws, beside rosinality's on the same machine, and beside what the machine can do.

All variants take turns in one process, so that their ratios hold even where times do not. The floor is the time of the
convolutions alone at the best rate that a 3x3 convolution reaches here, plus one pass over every layer's features.

Examples:
    python benchmarks/generator.py --rosinality stylegan2-pytorch    # a checkout, for the ratios
    python benchmarks/generator.py --resolution 256 --batch 8
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
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.references import rosinality_module
from models.generator import Generator

Draw = Callable[[Tensor], Tensor]  # ws (B, L, 512) -> images (B, 3, R, R)
REFERENCE, EXACT, HALF = "rosinality, float32", "ours, float32", "ours, bfloat16"
CHECKPOINTED = "ours, finest block checkpointed"


@dataclass
class Result:
    """What one variant took.

    Attributes:
        seconds: Per image, one value per round.
        megabytes: Peak memory beyond the weights, None where the system does not tell.
        difference: Mean absolute difference from float32, in grey levels of 255 where images have a standard deviation
            of 0.5, as faces in [-1, 1] do; None for float32 itself.
    """

    seconds: list[float]
    megabytes: float | None
    difference: float | None


def make_drawing(name: str, resolution: int, checkout: str | None) -> Draw:
    """Builds one variant, with random weights.

    Args:
        name: REFERENCE, EXACT, HALF or CHECKPOINTED.
        resolution: Size R in pixels.
        checkout: Of rosinality's code, for REFERENCE.

    Returns:
        What draws.
    """
    torch.manual_seed(0)
    if name == REFERENCE:
        network = rosinality_module(Path(str(checkout)).resolve()).Generator(resolution, 512, 8).eval()
        network.requires_grad_(False)
        return lambda ws: network([ws], input_is_latent=True, randomize_noise=False)[0]
    generator = Generator(resolution).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    generator.synthesis.checkpointed = int(name == CHECKPOINTED)

    def draw(ws: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=name == HALF):
            return generator.synthesis(ws)

    return draw


def codes(batch: int, resolution: int) -> Tensor:
    """Draws style codes (B, L, 512), the same every time."""
    styles = 2 * resolution.bit_length() - 4
    return torch.randn(batch, styles, 512, generator=torch.Generator().manual_seed(1))


def once(draw: Draw, ws: Tensor, gradient: bool) -> float:
    """Times one drawing, or one drawing with the gradient of the codes; in seconds per image."""
    start = time.perf_counter()
    if gradient:
        leaf = ws.clone().requires_grad_(True)
        draw(leaf).square().mean().backward()
    else:
        with torch.no_grad():
            draw(ws)
    return (time.perf_counter() - start) / len(ws)


def peak_megabytes(name: str, resolution: int, checkout: str | None, batch: int, gradient: bool) -> float | None:
    """Measures a variant's peak memory beyond its weights, in this process, which should be a fresh one."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    draw, ws = make_drawing(name, resolution, checkout), codes(batch, resolution)
    once(draw, ws, gradient)  # what libraries keep for themselves
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _kilobytes(status, "VmRSS")
    once(draw, ws, gradient)
    return (_kilobytes(status, "VmHWM") - before) / 1024


def _kilobytes(status: Path, field: str) -> int:
    return int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])


def floor_seconds(resolution: int, dtype: torch.dtype) -> tuple[float, float, float]:
    """Estimates the least time per image that this machine allows.

    Args:
        resolution: Size R in pixels.
        dtype: Precision of the convolutions.

    Returns:
        Seconds, the convolutions' rate in GFLOP/s, and that of memory in GB/s that it rests on.
    """
    generator = Generator(resolution).eval().requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.device("meta"):
        generator.to("meta").synthesis(torch.empty(1, generator.num_ws, 512))
    features = sum(layer.weight.shape[0] * layer.resolution**2 for layer in generator.synthesis.layers)
    rate = max(_convolution_rate(width, size, dtype) for width, size in ((512, 32), (256, 64), (128, 128)))
    large = torch.zeros(2**24, dtype=dtype)
    moved = 2 * large.numel() * large.element_size()  # read and written
    bandwidth = moved / min(_seconds(lambda: large.mul_(1.0)) for _ in range(5))
    spent = counter.get_total_flops() / rate + 2 * features * large.element_size() / bandwidth
    return spent, rate / 1e9, bandwidth / 1e9


def _convolution_rate(width: int, size: int, dtype: torch.dtype) -> float:
    x = torch.randn(1, width, size, size).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(width, width, 3, 3).to(dtype, memory_format=torch.channels_last)
    with torch.no_grad():
        return 2 * 9 * width**2 * size**2 / min(_seconds(lambda: F.conv2d(x, weight, padding=1)) for _ in range(5))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.no_grad()
def grey_levels(resolution: int) -> float:
    """Measures how far bfloat16 is from float32, as in `Result.difference`."""
    ws = codes(1, resolution)
    exact, half = (make_drawing(name, resolution, None)(ws) for name in (EXACT, HALF))
    return float((exact - half).abs().mean() / exact.std() * 0.5 * 127.5)


def measure(arguments: argparse.Namespace) -> dict[str, Result]:
    """Measures all variants.

    Args:
        arguments: See `main`.

    Returns:
        The results by name.
    """
    names = [REFERENCE] * bool(arguments.rosinality) + [EXACT, CHECKPOINTED if arguments.gradient else HALF]
    batch, resolution, checkout = arguments.batch, arguments.resolution, arguments.rosinality
    ws = codes(batch, resolution)
    drawings = {name: make_drawing(name, resolution, checkout) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(arguments.rounds + 1):
        for name, draw in drawings.items():
            spent = once(draw, ws, arguments.gradient)
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
    """Writes the results as Markdown.

    Args:
        results: See `measure`.
        arguments: See `main`.

    Returns:
        A table and the floors that its shares refer to.
    """
    what = "forward and backward" if arguments.gradient else "forward"
    lines = [
        f"{arguments.resolution} px, batch {arguments.batch}, {what}, {torch.get_num_threads()} threads",
        "",
        "| variant | ms an image | times the reference's speed | share of the floor | peak MB | grey levels off |",
        "|---|---|---|---|---|---|",
    ]
    floors = {}
    for name, result in results.items():
        median = statistics.median(result.seconds)
        ratio = "–"
        if REFERENCE in results:
            pairs = zip(results[REFERENCE].seconds, result.seconds, strict=True)
            ratio = f"{statistics.median(a / b for a, b in pairs):.2f}"
        dtype = torch.bfloat16 if name == HALF else torch.float32
        if dtype not in floors:
            floors[dtype] = floor_seconds(arguments.resolution, dtype)
        share = "–" if arguments.gradient else f"{floors[dtype][0] / median:.0%}"
        memory = "–" if result.megabytes is None else f"{result.megabytes:.0f}"
        off = "–" if result.difference is None else f"{result.difference:.2f}"
        lines.append(f"| {name} | {1e3 * median:.0f} | {ratio} | {share} | {memory} | {off} |")
    lines.append("")
    lines += [
        f"- floor in {str(dtype).removeprefix('torch.')}: {1e3 * spent:.0f} ms (convolutions at {rate:.0f} GFLOP/s, "
        f"one pass over the features at {bandwidth:.0f} GB/s)"
        for dtype, (spent, rate, bandwidth) in floors.items()
        if not arguments.gradient
    ]
    return "\n".join(lines).rstrip()


def main(args: list[str] | None = None) -> None:
    """Prints the report.

    Args:
        args: Arguments in place of those of the process.
    """
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
