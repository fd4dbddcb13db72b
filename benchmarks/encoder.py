"""Measures how fast our encoder for 1024 px is beside pSp's, and how fast it trains, on this machine in one run.

The parts that are compared take turns, and the fastest round of each counts. Where others share the machine, compare
the seconds of the processor, with --threads 1: waiting threads spin. All weights are random. GFLOP are those of matrix
products and convolutions, counted, not timed.

- encode: one face of 16 px, best guess, our encoder and pSp's network.
- step: one training step with the same 256 px generator, batch and losses (L2, LPIPS, identity, distance to the mean
  latent): ours; our own step with pSp's encoder in it; and, given a checkout, the step of pSp's own code: its encoder,
  generator, LPIPS (AlexNet), identity network (IR-SE50, on input, target and output) and optimiser. Its two CUDA
  operations are replaced by plain PyTorch ones, for it does not run on a CPU as it is.

Examples:
    python benchmarks/encoder.py                                    # both parts, ours and our pSp
    python benchmarks/encoder.py --psp pixel2style2pixel            # a checkout, for the step of pSp's own code
    python benchmarks/encoder.py --only encode --repeats 10
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import alexnet

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.references import psp_modules
from models.checkpoints import save_generator
from models.encoder import create_encoder
from models.generator import Generator
from training.encoder import EncoderTraining

OURS, VARIANT, THEIRS = "ours", "our step with pSp's encoder", "pSp's own code"


class Bare(EncoderTraining):
    """The training without a trainer: nothing is logged."""

    global_step = 0  # type: ignore[assignment]
    global_rank = 0  # type: ignore[assignment]

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Logs nothing."""

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """Logs nothing."""


def take_turns(work: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """Times pieces of work in turns.

    Args:
        work: What to do, by name.
        repeats: Rounds, after one that does not count.

    Returns:
        The fastest round by name: seconds by the clock, and seconds of the processor.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, piece in work.items():
            start, busy = time.perf_counter(), time.process_time()
            piece()
            times[name].append((time.perf_counter() - start, time.process_time() - busy))
            print(f"  {name}: {times[name][-1][0]:.3f} s", file=sys.stderr, flush=True)
    return {name: (min(t for t, _ in v[1:]), min(t for _, t in v[1:])) for name, v in times.items()}


def gflop(work: Callable[[], Any]) -> float:
    """Counts the matrix products and convolutions of a piece of work, in 1e9 floating-point operations."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


def encode_parts(resolution: int, architecture: dict[str, Any]) -> tuple[dict[str, Callable[[], Any]], dict[str, int]]:
    """Builds the encoders; gives what encodes one face, and the numbers of parameters.

    Args:
        resolution: Size R of the generator's faces in pixels.
        architecture: Further arguments of our encoder.

    Returns:
        Work and parameters by name.
    """
    lr = torch.rand(1, 3, 16, 16) * 2 - 1
    encoders = {
        OURS: create_encoder(resolution, "base", 512, **architecture),
        "pSp": create_encoder(resolution, "psp", 512),
    }
    for encoder in encoders.values():
        encoder.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def encode(name: str) -> Callable[[], Any]:
        def run() -> Tensor:
            with torch.inference_mode():
                return encoders[name](lr)

        return run

    counts = {name: sum(p.numel() for p in encoder.parameters()) for name, encoder in encoders.items()}
    return {name: encode(name) for name in encoders}, counts


def our_step(generator: str, variant: str, batch: int, architecture: dict[str, Any]) -> Callable[[], Any]:
    """Builds one step of our training.

    Args:
        generator: Its file.
        variant: Of the encoder.
        batch: Faces per step.
        architecture: Further arguments of the encoder.

    Returns:
        What takes the step.
    """
    module = Bare(
        generator, variant, architecture, identity_share=1.0, sizes_per_batch=batch, compile=False,
        optimiser="ranger" if variant == "psp" else "adamw", largest_lr=128,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    module._trainer = Namespace(max_steps=1000, world_size=1)  # type: ignore[assignment]
    setting: Any = module.configure_optimizers()
    optimiser = setting["optimizer"]
    faces = torch.randint(0, 256, (batch, 3, module.encoder.resolution, module.encoder.resolution), dtype=torch.uint8)

    def step() -> None:
        optimiser.zero_grad()
        module.training_step(faces, 0).backward()
        optimiser.step()
        module._average()

    return step


def their_step(checkout: Path, resolution: int, batch: int) -> Callable[[], Any]:
    """Builds one step as pSp's coach takes it.

    Args:
        checkout: Of eladrich/pixel2style2pixel.
        resolution: Size of the generator's faces in pixels.
        batch: Faces per step.

    Returns:
        What takes the step.
    """
    theirs = psp_modules(checkout)
    options = Namespace(input_nc=3, n_styles=2 * resolution.bit_length() - 4)
    encoder = theirs["models.encoders.psp_encoders"].GradualStyleEncoder(50, "ir_se", options).train()
    decoder = theirs["models.stylegan2.model"].Generator(resolution, 512, 8).train()
    networks = theirs["criteria.lpips.networks"]
    with mock.patch("torchvision.models.alexnet", lambda *_: alexnet(weights=None)):  # which it would download
        lpips = networks.AlexNet()
    weights = networks.LinLayers(lpips.n_channels_list)
    identity = theirs["models.encoders.model_irse"].Backbone(112, 50, mode="ir_se", drop_ratio=0.6).eval()
    optimiser = theirs["training.ranger"].Ranger(encoder.parameters(), lr=1e-4)
    x, y = torch.rand(2, batch, 3, 256, 256) * 2 - 1
    average = torch.zeros(options.n_styles, 512)
    pool, pool_face = nn.AdaptiveAvgPool2d((256, 256)), nn.AdaptiveAvgPool2d((112, 112))

    def embed(images: Tensor) -> Tensor:
        return identity(pool_face(images[:, :, 35:223, 32:220]))

    def step() -> None:
        optimiser.zero_grad()
        images, codes = decoder([encoder(x) + average], input_is_latent=True, return_latents=True)
        images = pool(images)
        embed(x)  # its logs want the input's identity too
        loss = 0.1 * (1 - (embed(images) * embed(y).detach()).sum(dim=1)).mean() + F.mse_loss(images, y)
        differences = [(a - b) ** 2 for a, b in zip(lpips(images), lpips(y), strict=True)]
        loss = loss + 0.8 * sum(w(d).mean((2, 3)).sum() for w, d in zip(weights, differences, strict=True)) / batch
        loss = loss + 0.005 * (codes - average).norm(2, dim=(1, 2)).mean()
        loss.backward()
        optimiser.step()

    return step


def step_parts(resolution: int, batch: int, architecture: dict[str, Any], psp: str | None) -> dict[str, Any]:
    """Builds the training steps that are compared.

    Args:
        resolution: Size of the generator's faces in pixels.
        batch: Faces per step.
        architecture: Further arguments of our encoder.
        psp: A checkout of pSp's code, or None.

    Returns:
        What takes a step, by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "generator.safetensors")
        save_generator(Generator(resolution, mapping_layers=1), path)  # z is not in the step
        parts = {OURS: our_step(path, "base", batch, architecture), VARIANT: our_step(path, "psp", batch, {})}
    return parts | ({THEIRS: their_step(Path(psp).resolve(), resolution, batch)} if psp else {})


def report(title: str, times: dict[str, tuple[float, float]], unit: float, bar: str) -> list[str]:
    """Writes a table of times with their ratios to ours, in Markdown."""
    ours = times[OURS]
    rows = [
        f"| {name} | {t:.3f} | {unit / t:.2f} | {t / ours[0]:.1f} | {busy:.3f} | {busy / ours[1]:.1f} |"
        for name, (t, busy) in times.items()
    ]
    head = ["| | s | per second | times ours | processor s | times ours |", "|---|---|---|---|---|---|"]
    return [f"{title}; {bar}", "", *head, *rows, ""]


def main(args: list[str] | None = None) -> None:
    """Prints the report.

    Args:
        args: Arguments in place of those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--psp", help="a checkout of eladrich/pixel2style2pixel")
    parser.add_argument("--only", choices=["encode", "step"])
    parser.add_argument("--resolution", type=int, default=1024, help="of the generator to encode for (default 1024)")
    parser.add_argument("--canvas", type=int, help="of our encoder (default: its own)")
    parser.add_argument("--step-resolution", type=int, default=256, help="of the training step (default 256)")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(args)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    architecture = {} if arguments.canvas is None else {"canvas": arguments.canvas}
    print(f"{arguments.threads} threads, torch {torch.__version__}, float32\n", flush=True)
    if arguments.only != "step":
        work, counts = encode_parts(arguments.resolution, architecture)
        sizes = ", ".join(f"{n} {count / 1e6:.1f} M ({gflop(work[n]):.1f} GFLOP)" for n, count in counts.items())
        title = f"Encoding one face for {arguments.resolution} px. Parameters: {sizes}"
        print(
            "\n".join(report(title, take_turns(work, arguments.repeats), 1, "aims: 40 M or less, 5 times")), flush=True
        )
    if arguments.only != "encode":
        parts = step_parts(arguments.step_resolution, arguments.batch, architecture, arguments.psp)
        title = f"One training step, {arguments.step_resolution} px generator, batch {arguments.batch}"
        times = take_turns(parts, arguments.repeats)
        print("\n".join(report(title, times, arguments.batch, "images per second; aim: 3 times")))


if __name__ == "__main__":
    main()
