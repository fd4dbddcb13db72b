"""The referee: all methods on the same faces in one run, one table out.

Examples:
    python evaluate.py                                            # 200 validation faces, 16 and 8 px, default bundle
    python evaluate.py --faces 2000 --lr 16 --out results/full    # with the Fréchet distance (1000 faces or more)
    python evaluate.py --bundle runs/mine --data my_faces.zip --k 8

Every face is downscaled by the project's operator and rounded to 8 bit; each method gets that picture and nothing
else. Its pictures are measured as they would be written: clamped to [-1, 1] and rounded to 8 bit. It writes `table.md`,
`results.json` (two runs of one command differ in its key "timing" alone) and one `faces_<LR>.png` per LR size into
--out. These pictures show faces from the data: mind its licence before they are passed on.

Table and results grow by each LR size as it is finished. The method "mean" gives everybody the generator's face at its
mean latent: it looks sharp and explains nothing, the floor for LPIPS at small LR sizes.

The best guess is a method's first candidate. What the columns say:
    PSNR, SSIM, LPIPS, identity    the best guess beside the truth; LPIPS on SqueezeNet, identity as the cosine of
                                   MobileFaceNet embeddings
    LPIPS / bicubic                mean LPIPS over that of bicubic interpolation at the same LR size
    error, within                  downscaling error of the best guess, and share of faces where it is at most 1e-3
    diversity                      mean pairwise LPIPS among the candidates that count: those whose downscaling error
                                   is at most twice the best guess's; a face where fewer than two count adds 0
    count                          share of all candidates, best guess included, that count
    fd_vgg11 or fid                Fréchet distance between best guesses and truths; fd_vgg11 is seen by no loss
    seconds                        median time for one face, one candidate, batch 1, without start-up
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.faces import Faces
from data.operator import EPSILON
from data.reading import MIN_SIDE, to_uint8
from data.report import complete_file
from models.bundle import DEFAULT_BUNDLE, Bundle, load_bundle
from models.determinism import use_deterministic_kernels
from models.device import choose_device
from referee.figure import figure
from referee.judge import FRECHET_FACES, SHOWN_FACES, Outcome, Referee, batches
from referee.measures import low_resolution
from referee.methods import METHODS, TITLES

OPERATOR = "separable bicubic, a = -0.5, antialiased (4·factor taps, PULSE's offsets, reflected borders); LR in 8 bit"

# Title of the column, name of the measure, format.
COLUMNS = (
    ("PSNR", "psnr", ".2f"),
    ("SSIM", "ssim", ".3f"),
    ("LPIPS", "lpips", ".4f"),
    ("LPIPS / bicubic", "lpips_over_bicubic", ".3f"),
    ("identity", "identity", ".3f"),
    ("error", "error", ".2e"),
    ("within", "within", ".1%"),
    ("diversity", "diversity", ".4f"),
    ("count", "count", ".1%"),
)


def table(results: Mapping[str, Any]) -> str:
    """Writes the Markdown table of the contents of results.json.

    Args:
        results: What `main` collects.

    Returns:
        Lines of text; "–" where a measure does not apply, "n/a" where its network is missing.
    """
    columns = list(COLUMNS)
    if results["faces"] >= FRECHET_FACES:
        columns.append((results["networks"]["frechet"] or "Fréchet", "frechet", ".4f"))
    missing = {name for name, network in results["networks"].items() if network is None}
    lines = [
        f"{results['faces']} faces of {results['data']}, {results['resolution']} px, from LR sizes "
        f"{', '.join(map(str, results['lr_sizes']))} px, k = {results['k']}, seed {results['seed']}, "
        f"bundle {results['bundle']['name']} ({results['bundle']['hash'][:12]})",
        "",
        "| LR | method | " + " | ".join(title for title, _, _ in columns) + " | seconds |",
        "|---|---|" + "---:|" * (len(columns) + 1),
    ]
    for lr, methods in results["results"].items():
        for method, means in methods.items():
            cells = [
                "n/a" if name in missing else "–" if means.get(name) is None else format(float(means[name]), style)
                for _, name, style in columns
            ]
            seconds = results["timing"]["seconds_per_face"][lr][method]
            lines.append(f"| {lr} px | {TITLES.get(method, method)} | {' | '.join(cells)} | {seconds:.4f} |")
    return "\n".join(lines) + "\n"


def compare(
    bundle: Bundle, referee: Referee, args: argparse.Namespace
) -> Iterator[tuple[int, dict[str, dict[str, float | None]], dict[str, float], Image.Image]]:
    """Lets all methods run at one LR size after the other.

    Args:
        bundle: What the methods are made of.
        referee: Measures them.
        args: The command line.

    Yields:
        The LR size; measures, and seconds per face, by method; the figure.
    """
    truth = next(batches(referee.faces, SHOWN_FACES, referee.device))
    total = len(args.lr) * len(args.methods) * len(referee.faces)
    with tqdm(total=total, unit="face", disable=None) as progress:
        for size in args.lr:
            outcomes: dict[str, Outcome] = {}
            seconds: dict[str, float] = {}
            for name in args.methods:
                progress.set_description(f"{name}, {size} px")
                method = METHODS[name](bundle)
                outcomes[name] = referee.judge(method, size, args.k, args.seed, progress)
                seconds[name] = referee.seconds(method, size)
            baseline = outcomes["bicubic"].means["lpips"] if "bicubic" in outcomes else None
            for outcome in outcomes.values():
                lpips = outcome.means["lpips"]
                outcome.means["lpips_over_bicubic"] = lpips / baseline if lpips is not None and baseline else None
            lr = to_uint8(low_resolution(truth, size))
            shown = {TITLES.get(name, name): outcome.shown for name, outcome in outcomes.items()}
            means = {name: outcome.means for name, outcome in outcomes.items()}
            yield size, means, seconds, figure(truth.cpu(), lr.cpu(), shown)


def json_ready(value: Any) -> Any:
    """Replaces inf, which JSON cannot hold, by "inf" in nested dicts."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def save(results: Mapping[str, Any], picture: Image.Image, size: int, out: Path) -> None:
    """Writes the table, the results and the figure of an LR size into the folder `out`."""
    document = json.dumps(json_ready(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    writers: dict[str, Callable[[Path], object]] = {
        "table.md": lambda path: path.write_text(table(results), encoding="utf-8"),
        "results.json": lambda path: path.write_text(document, encoding="utf-8"),
        f"faces_{size}.png": lambda path: picture.save(path, format="PNG"),
    }
    for name, write in writers.items():
        with complete_file(out / name) as partial:
            write(partial)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; ends the program with status 2 if an option cannot be followed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--bundle", default=str(DEFAULT_BUNDLE), help="folder of the bundle to measure (default: bundles/celeba64)")
    add("--data", default="celeba128_val.zip", help="zip or folder of square faces (%(default)s)")
    add("--faces", type=int, default=200, help="use the first so many in sorted order (%(default)s)")
    add("--lr", type=int, nargs="+", default=[16, 8], metavar="PX", help="LR sizes (16 8)")
    add("--k", type=int, default=4, help="candidates per face (%(default)s)")
    add("--methods", nargs="+", choices=METHODS, default=["bicubic", "mean", "ours"], help="which to compare (all)")
    add("--seed", type=int, default=0, help="seed of the candidates (%(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 …, mps; auto takes CUDA if it is there (%(default)s)")
    add("--out", default="results", help="folder for what is written (%(default)s)")
    args = parser.parse_args(argv)
    for name, least in (("faces", 1), ("k", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"argument --{name}: expected at least {least}, got {getattr(args, name)}")
    if min(args.lr) < MIN_SIDE:
        parser.error(f"argument --lr: expected at least {MIN_SIDE} px, got {min(args.lr)}")
    for name in ("bundle", "data", "out"):
        if not getattr(args, name):  # as from an unset variable; Path("") would be the current folder
            parser.error(f"argument --{name}: expected a path, got an empty name")
        setattr(args, name, Path(getattr(args, name)))
    args.lr, args.methods = list(dict.fromkeys(args.lr)), list(dict.fromkeys(args.methods))
    try:
        args.device = choose_device(args.device)
    except ValueError as error:
        parser.error(f"argument --device: {error}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments in place of those of the process.

    Returns:
        Exit status: 0; 1 with a message when something is missing, does not fit or fails; 130 after Ctrl-C. LR sizes
        that were finished before are in --out.
    """
    args = parse(argv)
    command = shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        text = _run(args, command)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"evaluate.py: {error or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"evaluate.py: interrupted; the LR sizes that were finished are in {args.out}", file=sys.stderr)
        return 130
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _run(args: argparse.Namespace, command: str) -> str:
    """Measures, writes after every LR size, and returns the table."""
    use_deterministic_kernels()
    _check_out(args.out)
    bundle = load_bundle(args.bundle, args.device)
    smallest, largest = bundle.lr_sizes
    if min(args.lr) < smallest or max(args.lr) > largest:
        raise ValueError(f"Expected --lr from {smallest} to {largest} px for {bundle.name!r}, got {args.lr}.")
    referee = Referee(Faces(args.data, bundle.resolution, limit=args.faces), args.device)
    timing = {"seconds_per_face": {}, "device": args.device.type, "threads": torch.get_num_threads()}
    results = {"command": command, **_circumstances(bundle, referee, args), "results": {}, "timing": timing}
    for size, means, seconds, picture in compare(bundle, referee, args):
        results["results"][str(size)] = means
        results["timing"]["seconds_per_face"][str(size)] = seconds
        save(results, picture, size, args.out)
    return table(results)


def _check_out(out: Path) -> None:
    """Makes sure that results can be written, now and not after an hour of measuring."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out: expected a folder to write into, got {out} ({error}); name another one.") from error


def _circumstances(bundle: Bundle, referee: Referee, args: argparse.Namespace) -> dict[str, Any]:
    """Says on what the figures depend."""
    return {
        "bundle": {"name": bundle.name, "hash": bundle.hash},
        "data": referee.faces.source.name,
        "resolution": bundle.resolution,
        "faces": len(referee.faces),
        "lr_sizes": args.lr,
        "k": args.k,
        "seed": args.seed,
        "operator": OPERATOR,
        "epsilon": EPSILON,
        "networks": referee.networks,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }


if __name__ == "__main__":
    sys.exit(main())
