"""Search steps per second against the original PULSE loop, with the same generator, start and number of rows.

The loop, its losses and its optimiser are those of a checkout of adamian98/pulse; nothing of it is part of this
project. What is hard-coded there (CUDA, 18 styles of 512 numbers, 1024 px) is replaced in its text as it is read, its
generator by ours. The two take turns, so that their ratio holds even where the times do not. Both search the same rows;
ours takes them in parts that fit the processor's caches, in bfloat16 where --precision says so, and does not stop at a
tolerance here, where it would save the rest of the steps.

Examples:
    git clone https://github.com/adamian98/pulse
    python benchmarks/pulse_speed.py --pulse pulse
    python benchmarks/pulse_speed.py --pulse pulse --batches 1 64 --steps 20 --device cuda
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.operator import Downscale
from models.bundle import DEFAULT_BUNDLE, PRECISIONS, Bundle, load_bundle
from search.candidates import rows_at_once
from search.pulse import PulseSettings, pulse, pulse_noise
from search.sphere import GaussianMap

LOSS = "100*L2+0.05*GEOCROSS"
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


def load_original(folder: Path, bundle: Bundle) -> nn.Module:
    """Makes the original's search with our generator.

    Args:
        folder: A checkout of adamian98/pulse.
        bundle: The generator and its statistics.

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
    synthesis = bundle.generator.synthesis.requires_grad_(False)  # as its own is
    # Its maps have sizes 4, 4, 8, 8, …; ours 4, 8, 8, …
    original.synthesis = lambda ws, noise: synthesis(ws, noise=[noise[i + 1] for i in range(synthesis.num_layers)])
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
    # One step fewer: after the last one, ours draws and measures the face once more.
    settings = PulseSettings(steps=steps - 1, epsilon=1e-9)
    noise = pulse_noise(bundle.generator.synthesis, rngs, settings.noise)
    to_w = GaussianMap.of(bundle.encoder.latents)
    at_once = rows_at_once(bundle)
    pulse(bundle.search_synthesis, to_w, Downscale(lr.shape[-1]), lr, start, noise, settings, at_once=at_once)


def seconds(call: Callable[[], None], device: torch.device) -> float:
    """Times one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(original: nn.Module, bundle: Bundle, lr: Tensor, steps: int, rounds: int) -> tuple[float, float]:
    """Times both in turns.

    Args:
        original: From `load_original`.
        bundle: Ours.
        lr: LR pictures (N, 3, s, s).
        steps: Of each search.
        rounds: How often, after one that is not counted.

    Returns:
        Median seconds of the original and of ours.
    """
    calls = (lambda: run_original(original, lr, steps), lambda: run_ours(bundle, lr, steps))
    times = [[seconds(call, bundle.device) for call in calls] for _ in range(rounds + 1)][1:]
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def main(args: list[str] | None = None) -> None:
    """Prints the table in Markdown.

    Args:
        args: Arguments in place of those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pulse", type=Path, required=True, help="a checkout of adamian98/pulse")
    parser.add_argument("--bundle", default=str(DEFAULT_BUNDLE))
    parser.add_argument("--lr", type=int, default=16, help="LR size in px (default: %(default)s)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64], help="rows; 64 are 16 faces x 4 candidates")
    parser.add_argument("--steps", type=int, default=20, help="of each search (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="of ours (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(args)
    if not (arguments.pulse / "PULSE.py").is_file():
        parser.error(f"--pulse: expected a checkout with PULSE.py in it, found none in {arguments.pulse}")
    bundle = load_bundle(arguments.bundle, arguments.device, arguments.precision)
    original = load_original(arguments.pulse, bundle)
    circumstances = f"{arguments.steps} steps, {arguments.lr} px, {arguments.device}, {torch.get_num_threads()} threads"
    print(f"{circumstances}, ours {arguments.precision}\n")
    print("| rows | original, steps/s | ours, steps/s | ratio |\n|---|---|---|---|")
    rng = np.random.default_rng(0)
    for batch in arguments.batches:
        z = torch.from_numpy(rng.standard_normal((batch, bundle.generator.z_dim), dtype=np.float32)).to(bundle.device)
        with torch.no_grad():
            lr = Downscale(arguments.lr)(bundle.generator(z, truncation_psi=0.7).clamp(-1, 1))
        theirs, ours = compare(original, bundle, lr, arguments.steps, arguments.rounds)
        work = batch * arguments.steps
        print(f"| {batch} | {work / theirs:.2f} | {work / ours:.2f} | {theirs / ours:.2f} |", flush=True)


if __name__ == "__main__":
    main()
