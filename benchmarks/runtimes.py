"""Measures onnxruntime against torch: encoding and drawing in one process, and starting both programs from nothing.

The two take turns, so that their ratio holds even where the times do not. A turn is a rest, so that none works beside
threads of the other, a call that wakes its own threads again, and the call that is timed. A start runs the whole
command on one face, after one start that is not counted, which brings the files into the system's cache.

    python -m export.onnx --out exported
    python benchmarks/runtimes.py --model exported
    python benchmarks/runtimes.py --model exported --batches 1 --rounds 5 --starts 0
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from export.session import load_models  # noqa: E402
from models.bundle import DEFAULT_BUNDLE, load_bundle  # noqa: E402

LR_SIZE = 16
# OpenMP's threads, which torch uses, wait busily for several ms after each call (4 to 7 ms of processor time measured),
# on a core that onnxruntime would have to itself in a program without torch.
REST = 0.03  # seconds
# A process starts with the peak of the one that it was forked from, so that a small one has to start what is measured.
LAUNCHER = """
import subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
try:
    import resource
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes there, kilobytes elsewhere
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / unit)
except ImportError:  # Windows
    print("nan")
sys.exit(status)
"""


def take_turns(calls: Sequence[Callable[[], object]], rounds: int, wake: bool = False) -> list[float]:
    """Times calls in turns, each after a rest.

    Args:
        calls: What to time.
        rounds: How often, after one round that is not counted.
        wake: Call each once more before it is timed.

    Returns:
        The median of each, in seconds.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds + 1):
        for call, times in zip(calls, seconds, strict=True):
            time.sleep(REST)
            if wake:
                call()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in seconds]


def compare_networks(bundle_path: str, model: str, batches: Sequence[int], threads: int, rounds: int) -> None:
    """Prints the times of encoding and drawing, per batch, and their ratio."""
    torch.set_num_threads(threads)
    bundle, models = load_bundle(bundle_path), load_models(model, threads)
    rng = np.random.default_rng(0)
    for batch in batches:
        lr = rng.uniform(-1, 1, (batch, 3, LR_SIZE, LR_SIZE)).astype(np.float32)
        ws = models.encode(lr)[:, 0]  # (B, L, D)
        lr_tensor, ws_tensor = torch.from_numpy(lr), torch.from_numpy(ws)
        for name, ours, theirs in (
            ("encode", lambda x=lr_tensor: bundle.encode(x), lambda x=lr: models.encode(x)),
            ("generate", lambda x=ws_tensor: bundle.generate(x), lambda x=ws: models.generate(x)),
        ):
            eager, exported = take_turns([ours, theirs], rounds, wake=True)
            print(f"| {name}, batch {batch} | {_ms(eager)} | {_ms(exported)} | {eager / exported:.2f} |", flush=True)


def compare_starts(bundle_path: str, model: str, threads: int, starts: int) -> None:
    """Prints how long each program takes from its start to the files of one face, and its peak memory."""
    with tempfile.TemporaryDirectory() as holder:
        face = Path(holder) / "face.png"
        pixels = np.random.default_rng(0).integers(0, 256, (LR_SIZE, LR_SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(face)
        common = [str(face), "--k", "1", "--out", str(Path(holder) / "out"), "--overwrite"]
        bundle, exported = Path(bundle_path).resolve(), Path(model).resolve()
        commands = [
            [sys.executable, "infer.py", *common, "--bundle", str(bundle), "--device", "cpu"],
            [sys.executable, "-m", "export.run", *common, "--model", str(exported), "--threads", str(threads)],
        ]
        eager, without = take_turns(
            [lambda: run_once(commands[0], threads), lambda: run_once(commands[1], threads)], starts
        )
        peaks = [float(run_once([sys.executable, "-c", LAUNCHER, *command], threads)) for command in commands]
    print(f"| start to one face | {_ms(eager)} | {_ms(without)} | {eager / without:.2f} |")
    print(f"| peak memory | {peaks[0]:.0f} MB | {peaks[1]:.0f} MB | {peaks[0] / peaks[1]:.2f} |")


def run_once(command: Sequence[str], threads: int) -> str:
    """Runs a command to its end.

    Args:
        command: The program and its arguments, in the repository's root.
        threads: Of torch; onnxruntime takes its own option.

    Returns:
        What it printed.

    Raises:
        RuntimeError: If the command fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")
    return done.stdout


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: Command line without the program's name; that of the process if None.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--bundle", default=str(DEFAULT_BUNDLE), help="what was exported (default: bundles/celeba64)")
    parser.add_argument("--model", required=True, help="folder that export.onnx wrote")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20, help="of encoding and drawing (default: 20)")
    parser.add_argument("--starts", type=int, default=3, help="of each program, 0 for none (default: 3)")
    args = parser.parse_args(arguments)
    print(f"| {args.threads} threads | torch | onnxruntime | ratio |\n|---|---|---|---|", flush=True)
    compare_networks(args.bundle, args.model, args.batches, args.threads, args.rounds)
    if args.starts:
        compare_starts(args.bundle, args.model, args.threads, args.starts)


if __name__ == "__main__":
    main()
