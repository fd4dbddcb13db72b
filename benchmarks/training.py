"""Measures one training step of the prior, part by part, beside what convolutions reach on this machine.

Examples:
    python benchmarks/training.py
    python benchmarks/training.py --config configs/stylegan2_64.yaml --batch 64 --precision 32-true --no-compile
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.compiling import compile_if_possible
from training.randomness import step_rng
from training.stylegan2 import Stream, StyleGAN2Training

ROOT = Path(__file__).resolve().parents[1]


class Bare(StyleGAN2Training):
    """The training without a trainer: nothing is logged, and backward is backward."""

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Differentiates the loss."""
        loss.backward()

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Logs nothing."""

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """Logs nothing."""


class NoModules(contextlib.nullcontext):
    """Keeps the counter from attributing operations to modules, which fails where a gradient is differentiated."""

    parents = ("Global",)


def gflops(work: Callable[[], Any]) -> float:
    """Counts the matrix products and convolutions of a piece of work, in 1e9 floating-point operations."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()  # type: ignore[assignment]
    with counter:
        work()
    return counter.get_total_flops() / 1e9


def seconds(work: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Times a piece of work.

    Args:
        work: What to do.
        repeats: How often, after one time that does not count.
        device: Where it runs; an accelerator is waited for.

    Returns:
        The median in seconds.
    """
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def training_parts(module: Bare, batch: int, dtype: torch.dtype) -> dict[str, tuple[Callable[[], Any], int]]:
    """Cuts the training step into its parts.

    Args:
        module: The training, on its device.
        batch: Faces per step.
        dtype: Precision of the convolutions; float32 for no autocast.

    Returns:
        By name: what to call, and every how many steps it is called in training (0: never).
    """
    h, device = module.hparams, module.device
    adam_g, adam_d = module.configure_optimizers()
    module.path_mean.fill_(1.0)  # as after the first penalty, which only measures it
    rng = step_rng(0, 0, 0, device)
    real = torch.rand(batch, 3, h["resolution"], h["resolution"], device=device, generator=rng) * 2 - 1
    real = real.contiguous(memory_format=torch.channels_last)

    def in_precision(work: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        def run() -> Any:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return work(*args)

        return run

    fake = in_precision(module._view, real.flip(0), Stream.AUGMENT_FAKE, 0)()

    def improve_generator(adam: torch.optim.Optimizer) -> None:
        module._generator_step(adam, [module._fake(batch, 0)[0]], batch)

    path_every = h["path_length_every"] if h["path_length_weight"] else 0
    return {
        "generator": (in_precision(improve_generator, adam_g), 1),
        "discriminator": (in_precision(module._discriminator_step, adam_d, [real], [fake]), 1),
        "r1": (in_precision(module._r1_step, adam_d, [real]), h["r1_every"]),
        "path length": (in_precision(module._path_length_step, adam_g, max(1, batch // 2)), path_every),
        "average": (lambda: module._average(batch), 1),
    }


def convolution_rates(
    channels: tuple[int, ...], batch: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> tuple[float, float]:
    """Measures plain 3x3 convolutions, forward and backward, in the shapes of the networks.

    Args:
        channels: Widths per size 4, 8, …
        batch: Batch size.
        dtype: Precision.
        device: Where.
        repeats: Repetitions per shape.

    Returns:
        GFLOP/s over all shapes together, and at the best shape.
    """
    work, spent, best = 0.0, 0.0, 0.0
    for i, width in enumerate(channels):
        size = 4 * 2**i
        x = torch.randn(batch, width, size, size, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_(True)
        weight = torch.randn(width, width, 3, 3, device=device, dtype=dtype) / (3 * width**0.5)
        weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_(True)
        gradient = torch.ones_like(x)

        def forward_and_backward(x: Tensor = x, weight: Tensor = weight, gradient: Tensor = gradient) -> None:
            torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), gradient)

        gflop = 3 * 2 * 9 * width**2 * size**2 * batch / 1e9  # backward costs two forwards
        duration = seconds(forward_and_backward, repeats, device)
        work, spent, best = work + gflop, spent + duration, max(best, gflop / duration)
    return work / spent, best


def measure(settings: dict[str, Any], batch: int, precision: str, compiled: bool, device: str, repeats: int) -> str:
    """Measures the training of a recipe.

    Args:
        settings: Arguments of `StyleGAN2Training`.
        batch: Faces per step.
        precision: "bf16-mixed" or "32-true".
        compiled: Compile the synthesis, where there is a compiler.
        device: Where.
        repeats: Repetitions per part.

    Returns:
        The report, in Markdown.
    """
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    module = Bare(**{**settings, "init_generator": None, "micro_batches": 1, "export_to": None})
    module = module.to(device).to(memory_format=torch.channels_last)
    module._trainer = SimpleNamespace(world_size=1, global_rank=0, global_step=0)  # type: ignore[assignment]
    parts = training_parts(module, batch, dtype)
    parts = {name: part for name, part in parts.items() if part[1]}

    # Before compilation, which hides operations from the counter.
    gflop = {name: gflops(work) for name, (work, _) in parts.items()}
    compiled = compiled and compile_if_possible(module.generator.synthesis, module.device)

    times = {name: seconds(work, repeats, module.device) for name, (work, _) in parts.items()}
    step = sum(times[name] / every for name, (_, every) in parts.items())
    work_per_step = sum(gflop[name] / every for name, (_, every) in parts.items())
    mixed, best = convolution_rates(module.generator.channels, batch, dtype, module.device, repeats)
    rate = work_per_step / step
    lines = [
        f"Batch {batch}, {precision}, {'compiled' if compiled else 'not compiled'}, {module.device.type}, "
        f"{torch.get_num_threads()} threads",
        "",
        "| part | ms | every | GFLOP an image |",
        "|---|---|---|---|",
        *(f"| {n} | {1e3 * times[n]:.1f} | {every} | {gflop[n] / batch:.3f} |" for n, (_, every) in parts.items()),
        f"| step, on average | {1e3 * step:.1f} | 1 | {work_per_step / batch:.3f} |",
        "",
        f"- {batch / step:.1f} images/s",
        f"- {rate:.1f} GFLOP/s reached",
        f"- {mixed:.1f} GFLOP/s by plain 3x3 convolutions of these shapes, {best:.1f} at the best of them",
        f"- share: {rate / mixed:.0%} of the convolutions, {rate / best:.0%} of the best",
    ]
    return "\n".join(lines)


def main(args: list[str] | None = None) -> None:
    """Prints the report.

    Args:
        args: Arguments in place of those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", default=str(ROOT / "configs" / "stylegan2_64.yaml"), help="a recipe of StyleGAN2Training"
    )
    parser.add_argument("--batch", type=int, help="faces per step (default: the recipe's)")
    parser.add_argument("--precision", choices=["bf16-mixed", "32-true"], help="(default: the recipe's)")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args(args)
    recipe = yaml.safe_load(Path(arguments.config).read_text())
    if recipe["model"]["class_path"] != "training.stylegan2.StyleGAN2Training":
        parser.error(f"Expected a recipe of training.stylegan2.StyleGAN2Training, got {recipe['model']['class_path']}.")
    batch = arguments.batch or recipe["data"]["init_args"]["batch_size"]
    precision = arguments.precision or recipe["trainer"]["precision"]
    torch.set_float32_matmul_precision("high")  # as train.py does
    settings = recipe["model"]["init_args"]
    print(measure(settings, batch, precision, not arguments.no_compile, arguments.device, arguments.repeats))


if __name__ == "__main__":
    main()
