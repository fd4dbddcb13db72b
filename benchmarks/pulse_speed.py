"""Search steps per second against the original PULSE loop, with the same generator, start and number of rows.

The loop, its losses and its optimiser are those of a checkout of adamian98/pulse; nothing of it is part of this
project. What is hard-coded there (CUDA, 18 styles of 512 numbers, 1024 px) is replaced in its text as it is read, its
generator by ours: synthesized by our own code, which is fast for the original as well, and with --nvidia also by
NVIDIA's, which gives the same faces from the same weights and is what the field uses. All take turns, so that their
ratios hold even where the times do not, and search the same samples; ours in batches that fit the processor's caches,
in bfloat16 where --precision says so, and does not stop at a tolerance here, where it would save the rest of the steps.

Examples:
    git clone https://github.com/adamian98/pulse
    git clone https://github.com/NVlabs/stylegan2-ada-pytorch
    python benchmarks/pulse_speed.py --pulse pulse --nvidia stylegan2-ada-pytorch
    python benchmarks/pulse_speed.py --pulse pulse --batches 1 64 --steps 20 --device cuda
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.references import nvidia_networks
from data.operator import Downscale
from models.bundle import DEFAULT_BUNDLE, PRECISIONS, Bundle, load_bundle
from models.generator import SynthesisNetwork
from search.pulse import PulseSettings, pulse, pulse_noise
from search.samples import batch_size
from search.sphere import GaussianMap

Synthesis = Callable[..., Tensor]  # ws (N, L, D), noise: maps (N, 1, H, W) of all layers -> images (N, 3, R, R)
LOSS = "100*L2+0.05*GEOCROSS"
TOLERANCE = 1e-3  # how far two images of one face may be apart, as in benchmarks/parity.py
FILES = ("bicubic.py", "loss.py", "SphericalOptimizer.py", "PULSE.py")


def adapted(text: str, styles: int, width: int, resolution: int, device: str) -> str:
    """Replaces the sizes and the device that the original code takes for granted.

    Args:
        text: A file of the original.
        styles: Number of styles L, in place of 18.
        width: Numbers D per style, in place of 512; the weight 512 of GEOCROSS stays.
        resolution: Size R in px, in place of 1024.
        device: In place of CUDA.

    Returns:
        The text to run.
    """
    text = re.sub(r"\b18\b", str(styles), text)
    text = re.sub(r"\b512\b(?!\)\.mean)", str(width), text)
    text = re.sub(r"\b1024\b", str(resolution), text)
    text = re.sub(r"""(['"])cuda\1""", f"'{device}'", text)
    text = text.replace("torch.cuda.manual_seed(seed)", "pass")
    cuda = device.startswith("cuda")
    return text if cuda else text.replace("cuda=True", "cuda=False").replace(".cuda()", "")


def nvidia_synthesis(folder: Path, ours: SynthesisNetwork) -> Synthesis:
    """Makes NVIDIA's code synthesize with our weights, whose names and values are those that it gives them.

    Args:
        folder: A checkout of NVlabs/stylegan2-ada-pytorch.
        ours: The weights.

    Returns:
        What synthesizes.

    Raises:
        ValueError: If the two do not give the same.
    """
    widths = {block.layers[-1].resolution: block.layers[-1].weight.shape[0] for block in ours.blocks}
    size = max(widths)
    shape = {"channel_base": widths[size] * size, "channel_max": max(widths.values())}
    networks = nvidia_networks(folder.resolve())
    theirs = networks.SynthesisNetwork(ours.w_dim, size, 3, **shape).eval().requires_grad_(False)
    theirs.load_state_dict(ours.state_dict(), strict=False)  # what it has beyond are filters, which are constants
    theirs.to(ours.layers[0].weight.device)
    layers = [m for m in theirs.modules() if hasattr(m, "noise_const")]

    def synthesize(ws: Tensor, noise: Sequence[Tensor]) -> Tensor:
        for layer, given in zip(layers, noise, strict=True):
            layer.noise_const = given
        # The faster of its two ways here: the fused one makes a group of every row.
        return theirs(ws, noise_mode="const", force_fp32=True, fused_modconv=False)

    with torch.no_grad():
        ws = torch.randn(2, ours.num_ws, ours.w_dim, generator=torch.Generator().manual_seed(0)).to(layers[0].weight)
        noise = ours.make_noise(2)
        apart = float((synthesize(ws, noise) - ours(ws, noise=noise)).abs().max())
    if apart > TOLERANCE:
        raise ValueError(f"{folder} gives other faces from the same weights: they are {apart:.1e} apart.")
    return synthesize


def load_original(folder: Path, bundle: Bundle, synthesize: Synthesis) -> nn.Module:
    """Makes the original's search with our generator.

    Args:
        folder: A checkout of adamian98/pulse.
        bundle: The statistics of the generator.
        synthesize: What it synthesizes with.

    Returns:
        Its `PULSE` module.
    """
    sizes = bundle.generator.num_ws, bundle.generator.w_dim, bundle.resolution, str(bundle.device)
    modules: dict[str, ModuleType] = {"stylegan": ModuleType("stylegan"), "drive": ModuleType("drive")}
    modules["stylegan"].__dict__.update(G_synthesis=None, G_mapping=None)  # what would be downloaded
    modules["drive"].__dict__.update(open_url=None)
    with mock.patch.dict(sys.modules, modules):
        for name in FILES:
            module = ModuleType(Path(name).stem)
            sys.modules[module.__name__] = modules[module.__name__] = module
            code = adapted((folder / name).read_text(encoding="utf-8"), *sizes)
            exec(compile(code, str(folder / name), "exec"), module.__dict__)
    original: Any = modules["PULSE"].PULSE.__new__(modules["PULSE"].PULSE)
    nn.Module.__init__(original)
    statistics_of_v = GaussianMap.of(bundle.encoder.latents)
    original.gaussian_fit = {"mean": statistics_of_v.mean, "std": statistics_of_v.std}
    original.lrelu, original.verbose = nn.LeakyReLU(0.2), False
    original.last_map = str(bundle.generator.num_ws - 1)  # which it keeps at zero
    # Its maps have sizes 4, 4, 8, 8, …; ours 4, 8, 8, …
    original.synthesis = lambda ws, noise: synthesize(ws, noise=noise[1:])
    return original


def run_original(original: nn.Module, lr: Tensor, steps: int) -> None:
    """Runs the original loop on LR pictures (N, 3, s, s) in [-1, 1], with its own settings."""
    settings = {
        "seed": 1, "loss_str": LOSS, "eps": 2e-3, "noise_type": "trainable", "num_trainable_noise_layers": 5,
        "tile_latent": False, "bad_noise_layers": original.last_map, "opt_name": "adam",
        "learning_rate": 0.4, "steps": steps, "lr_schedule": "linear1cycledrop", "save_intermediate": False,
    }  # fmt: skip
    with mock.patch("builtins.print"):  # "Could not find a face …"
        list(original((lr + 1) / 2, **settings))


def run_ours(bundle: Bundle, lr: Tensor, steps: int) -> None:
    """Runs our loop with the same settings on the same pictures."""
    rngs = [np.random.default_rng((0, j)) for j in range(len(lr))]
    shape = (bundle.generator.num_ws, bundle.generator.w_dim)
    start = torch.from_numpy(np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs])).to(lr)
    # One step fewer: after the last one, ours evaluates the face once more.
    settings = PulseSettings(steps=steps - 1, epsilon=1e-9)
    noise = pulse_noise(bundle.generator.synthesis, rngs, settings.noise)
    to_w, operator = GaussianMap.of(bundle.encoder.latents), Downscale(lr.shape[-1])
    search = pulse(bundle.search_synthesis, to_w, operator, start, noise, settings)
    search.run(lr, settings.steps, settings.epsilon, batch_size=batch_size(bundle))


def seconds(call: Callable[[], None], device: torch.device) -> float:
    """Times one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(searches: dict[str, Callable[[], None]], device: torch.device, rounds: int) -> dict[str, float]:
    """Times searches in turns.

    Args:
        searches: By name.
        device: Where they run.
        rounds: How often, after one that is not counted.

    Returns:
        The median seconds of each.
    """
    times = [{name: seconds(search, device) for name, search in searches.items()} for _ in range(rounds + 1)][1:]
    return {name: statistics.median(t[name] for t in times) for name in searches}


def main(args: list[str] | None = None) -> None:
    """Prints the table in Markdown.

    Args:
        args: Arguments in place of those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pulse", type=Path, required=True, help="a checkout of adamian98/pulse")
    parser.add_argument("--nvidia", type=Path, help="a checkout of NVlabs/stylegan2-ada-pytorch, to compare as well")
    parser.add_argument("--bundle", default=str(DEFAULT_BUNDLE))
    parser.add_argument("--lr", type=int, default=16, help="LR size in px (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="samples at once (default: 1 64)")
    parser.add_argument("--steps", type=int, default=20, help="of each search (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of ours (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(args)
    if not (arguments.pulse / "PULSE.py").is_file():
        parser.error(f"--pulse: expected a checkout with PULSE.py in it, found none in {arguments.pulse}")
    bundle = load_bundle(arguments.bundle, arguments.device, arguments.precision)
    networks: dict[str, Synthesis] = {"the original, our synthesis": bundle.generator.synthesis.requires_grad_(False)}
    if arguments.nvidia:
        networks["the original, NVIDIA's synthesis"] = nvidia_synthesis(arguments.nvidia, bundle.generator.synthesis)
    originals = {name: load_original(arguments.pulse, bundle, how) for name, how in networks.items()}
    circumstances = f"{arguments.steps} steps, {arguments.lr} px, {arguments.device}, {torch.get_num_threads()} threads"
    print(f"{circumstances}, ours {arguments.precision}\n")
    print("| samples | search | steps/s | ours is faster by |\n|---|---|---|---|")
    rng = np.random.default_rng(0)
    for batch in arguments.batches:
        z = torch.from_numpy(rng.standard_normal((batch, bundle.generator.z_dim), dtype=np.float32)).to(bundle.device)
        with torch.no_grad():
            lr = Downscale(arguments.lr)(bundle.generator(z, truncation_psi=0.7).clamp(-1, 1))
        searches: dict[str, Callable[[], None]] = {
            name: partial(run_original, original, lr, arguments.steps) for name, original in originals.items()
        }
        searches["ours"] = partial(run_ours, bundle, lr, arguments.steps)
        taken = compare(searches, bundle.device, arguments.rounds)
        for name, time_taken in taken.items():
            speed, ratio = batch * arguments.steps / time_taken, time_taken / taken["ours"]
            print(f"| {batch} | {name} | {speed:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
