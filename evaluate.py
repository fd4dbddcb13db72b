"""The referee: all methods on the same faces in one run, one table out.

Examples:
    python evaluate.py                                            # 200 validation faces, 16 and 8 px, default bundle
    python evaluate.py --methods all                              # every method of the field: PULSE takes its time
    python evaluate.py --faces 2000 --lr 16 --out results/full    # with the Fréchet distance (1000 faces or more)
    python evaluate.py --methods all --keep --bundle runs/mine    # again after a training: searches are not repeated
    python evaluate.py --degradation clean noise25 jpeg --methods pulse ours refined --out results/robust
    python evaluate.py --bundle runs/mine --bundle pSp=runs/psp/bundle --data my_faces.zip --k 8
    python evaluate.py --group-by celeba128_labels.csv.gz:Male --attributes runs/attributes_64/attributes.safetensors
    torchrun --nproc-per-node 4 evaluate.py --methods all --faces 2000     # four processes share the faces

Every face is downscaled by the project's operator, degraded as --degradation says, and rounded to 8 bit; each method
gets that picture and nothing else, and assumes plain bicubic downscaling. Its pictures are measured as they would be
written: clamped to [-1, 1] and rounded to 8 bit. It writes `table.md`, `results.json` (two runs of one command differ
in its key "timing" alone) and one `faces_<LR>.png` per setting into --out. These pictures show faces from the data:
mind its licence before they are passed on.

Table and results grow by each setting as it is finished. What is measured is kept batch by batch in --out/partial: the
same command goes on after an interruption, and takes the folder away in the end, unless --keep says no. Under torchrun
every process takes its share of the batches; on several machines, --out has to be a folder that all of them see.

The methods: bicubic and nearest neighbour; mean, the generator's face at its mean latent, the same for everybody,
which looks sharp and explains nothing; adam, 200 steps in W+ from the mean without any prior; pulse, mm-pulse, rls and
brgm as published, of which mm-pulse gives k candidates and the others one; ours, the encoder's candidates, encoder, the
same without learned feedback (--passes 0 of infer.py), and refined, ours after --refine steps. --bundle
NAME=DIR adds the encoder of another bundle.

The best guess is a method's first candidate. What the columns say:
    PSNR, SSIM, LPIPS, identity    the best guess beside the truth; LPIPS on SqueezeNet, identity as the cosine of
                                   MobileFaceNet embeddings
    LPIPS / bicubic                mean LPIPS over that of bicubic interpolation in the same setting
    error; error, clean            downscaling error of the best guess against the picture that the method saw, and
                                   against the one without degradation: to match the noise is no virtue
    within; within, all            share of best guesses, and of all candidates, with an error of at most 1e-3
    diversity; count               mean pairwise LPIPS among the candidates that count, those whose error is at most
                                   twice the best guess's, 0 for a face where fewer than two count; share that counts
    diversity, 2ε; count, 2ε       the same for candidates whose error is at most 2e-3, whatever the method
    NIQE                           of the best guess, from 256 px on and with --niqe
    fd_vgg11 or fid; …, sample     Fréchet distance between best guesses and truths, and between one random candidate of
                                   each face (the second) and truths; fd_vgg11 is seen by no loss
    passes                         generator passes per candidate (forward 1, backward 2, forward-mode derivative 2)
    seconds                        median time for one face, one candidate, batch 1, without start-up
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.faces import Faces, find_data
from data.operator import EPSILON
from data.report import complete_file
from models.bundle import Bundle, load_bundle
from models.determinism import use_deterministic_kernels
from models.weights import sha256_of
from referee.cells import Processes, Store
from referee.contest import FRECHET_FACES, Contest, Outcome, Setting
from referee.groups import Grouping, by_group, read_grouping
from referee.judge import Referee
from referee.methods import TITLES, Method, made_of, make_encoder, make_method
from referee.options import parse
from referee.table import table

OPERATOR = "separable bicubic, a = -0.5, antialiased (4·factor taps, PULSE's offsets, reflected borders); LR in 8 bit"

OF_METHODS = ("bundle", "other_bundles", "refine")  # what only some methods depend on, see `referee.methods.made_of`


@dataclass(frozen=True)
class Round:
    """What was found in one setting.

    Attributes:
        setting: The setting.
        outcomes: By method.
        figure: The first faces.
    """

    setting: Setting
    outcomes: dict[str, Outcome]
    figure: Image.Image


def compare(contest: Contest, methods: Mapping[str, Method], settings: Sequence[Setting]) -> Iterator[Round | None]:
    """Lets all methods run in one setting after the other.

    Args:
        contest: Where they run.
        methods: By name.
        settings: What they see.

    Yields:
        One round per setting; None in processes other than the first.
    """
    own = contest.processes
    with tqdm(
        total=len(settings) * len(methods) * len(contest.faces) // own.count,
        unit="face",
        disable=True if own.rank else None,
    ) as progress:
        for setting in settings:
            for name, method in methods.items():
                progress.set_description(f"{name}, {setting.title}")
                contest.run(name, method, setting, progress)
            own.wait()
            if own.rank == 0:
                outcomes = {name: contest.outcome(name, method, setting) for name, method in methods.items()}
                _relate_lpips(outcomes)
                shown = {TITLES.get(name, name): outcome.shown for name, outcome in outcomes.items()}
                yield Round(setting, outcomes, contest.figure(setting, shown))
            else:
                yield None
            own.wait()


def _relate_lpips(outcomes: Mapping[str, Outcome]) -> None:
    """Adds LPIPS over that of bicubic interpolation."""
    baseline = outcomes["bicubic"].means["lpips"] if "bicubic" in outcomes else None
    for outcome in outcomes.values():
        outcome.means["lpips_over_bicubic"] = outcome.means["lpips"] / baseline if baseline else None


def json_ready(value: Any) -> Any:
    """Replaces inf, which JSON cannot hold, by "inf" in nested dicts."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def save(results: Mapping[str, Any], picture: Image.Image, setting: str, out: Path) -> None:
    """Writes the table, the results and the figure of a setting into the folder `out`."""
    document = json.dumps(json_ready(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    writers: dict[str, Callable[[Path], object]] = {
        "table.md": lambda path: path.write_text(table(results), encoding="utf-8"),
        "results.json": lambda path: path.write_text(document, encoding="utf-8"),
        f"faces_{setting}.png": lambda path: picture.save(path, format="PNG"),
    }
    for name, write in writers.items():
        with complete_file(out / name) as partial:
            write(partial)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments in place of those of the process.

    Returns:
        Exit status: 0; 1 with a message when something is missing, does not fit or fails, or faces could not be read;
        130 after Ctrl-C. Settings that were finished before are in --out.
    """
    args = parse(argv, __doc__)
    command = shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)])
    try:
        results = _run(args, command)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"evaluate.py: {error or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"evaluate.py: interrupted; the same command goes on, what is finished is in {args.out}", file=sys.stderr)
        return 130
    if results is None:  # another process tells
        return 0
    for line in results["unreadable"]:
        print(f"evaluate.py: {line}", file=sys.stderr)
    try:
        print(table(results), end="", flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1 if results["unreadable"] else 0


def _run(args: argparse.Namespace, command: str) -> dict[str, Any] | None:
    """Measures, writes after every setting, and returns the results; None in processes other than the first."""
    use_deterministic_kernels()
    _check_out(args.out)
    bundle = load_bundle(args.bundle, args.device)
    others = {name: load_bundle(path, args.device) for name, path in args.others.items()}
    _check_sizes(args, [bundle, *others.values()])
    faces = Faces(args.data, bundle.resolution, limit=args.faces)
    groupings = [read_grouping(_find_table(where), faces.names) for where in args.group_by]
    methods = {name: make_method(name, bundle, args.refine) for name in args.methods}
    methods |= {name: make_encoder(other) for name, other in others.items()}
    referee = _make_referee(args, faces)
    settings = [Setting(size, degradation) for degradation in args.degradation for size in args.lr]
    facts = _circumstances(args, bundle, others, referee, faces)
    processes = Processes.join()
    ingredients = {name: made_of(name, bundle, args.refine) for name in args.methods}
    ingredients |= {name: made_of(name, other, args.refine) for name, other in others.items()}
    shared = {key: fact for key, fact in facts.items() if key not in OF_METHODS}
    contest = Contest(faces, referee, Store(args.out, shared), processes, args.k, args.seed, ingredients)
    results = {"command": command, **facts, "settings": {}, "titles": _titles(args), "unreadable": []}
    results |= {"results": {}, "groups": {}}
    results["timing"] = {"seconds_per_face": {}, "device": args.device.type, "threads": torch.get_num_threads()}
    for found in compare(contest, methods, settings):
        if found is not None:
            _add(results, found, groupings, contest)
            save(results, found.figure, found.setting.name, args.out)
    processes.leave()
    if processes.rank:
        return None
    if not args.keep:
        contest.store.clear()
    return results


def _add(results: dict[str, Any], found: Round, groupings: Sequence[Grouping], contest: Contest) -> None:
    """Adds a round to the results."""
    key = found.setting.name
    results["settings"][key] = found.setting.title
    results["unreadable"] = contest.problems
    results["results"][key] = {name: outcome.means for name, outcome in found.outcomes.items()}
    results["timing"]["seconds_per_face"][key] = {name: outcome.seconds for name, outcome in found.outcomes.items()}
    for grouping in groupings:
        own = {name: by_group(grouping, outcome.faces, EPSILON) for name, outcome in found.outcomes.items()}
        results["groups"].setdefault(grouping.column, {})[key] = own


def _titles(args: argparse.Namespace) -> dict[str, str]:
    """Names the methods in tables."""
    return {**{name: TITLES.get(name, name) for name in args.methods}, "refined": f"ours + {args.refine} steps"}


def _make_referee(args: argparse.Namespace, faces: Faces) -> Referee:
    """Loads the networks that measure."""
    attributes, pristine = None, None
    if args.attributes:
        from models.attributes import load_attributes  # late: only those who ask for it need it

        attributes = load_attributes(args.attributes, args.device)
    if args.niqe:
        from referee.niqe import Pristine

        pristine = Pristine.load(args.niqe)
    return Referee(faces.resolution, args.device, len(faces) >= FRECHET_FACES, attributes, pristine)


def _find_table(where: str) -> str:
    """Finds the table of "FILE:COLUMN" where data sets lie."""
    file, separator, column = where.rpartition(":")
    return f"{find_data(file)}{separator}{column}" if file else where


def _check_out(out: Path) -> None:
    """Makes sure that results can be written, now and not after an hour of measuring."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out: expected a folder to write into, got {out} ({error}); name another one.") from error


def _check_sizes(args: argparse.Namespace, bundles: Sequence[Bundle]) -> None:
    """Makes sure that all bundles take the LR sizes, and draw faces of one size."""
    for bundle in bundles:
        smallest, largest = bundle.lr_sizes
        if min(args.lr) < smallest or max(args.lr) > largest:
            raise ValueError(f"Expected --lr from {smallest} to {largest} px for {bundle.name!r}, got {args.lr}.")
        if bundle.resolution != bundles[0].resolution:
            raise ValueError(
                f"Expected bundles of one resolution, {bundles[0].name!r} draws {bundles[0].resolution} px and "
                f"{bundle.name!r} {bundle.resolution} px; compare them in runs of their own."
            )


def _circumstances(
    args: argparse.Namespace, bundle: Bundle, others: Mapping[str, Bundle], referee: Referee, faces: Faces
) -> dict[str, Any]:
    """Says on what the figures depend."""
    return {
        "bundle": {"name": bundle.name, "hash": bundle.hash},
        "other_bundles": {name: {"name": other.name, "hash": other.hash} for name, other in others.items()},
        "data": faces.source.name,
        "names": hashlib.sha256("\n".join(faces.names).encode()).hexdigest(),
        "resolution": bundle.resolution,
        "faces": len(faces),
        "k": args.k,
        "seed": args.seed,
        "refine": args.refine,
        "operator": OPERATOR,
        "epsilon": EPSILON,
        "networks": referee.networks,
        "frechet_wanted": len(faces) >= FRECHET_FACES,
        "attributes": sha256_of(args.attributes) if args.attributes else None,
        "niqe": sha256_of(args.niqe) if args.niqe else None,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }


if __name__ == "__main__":
    sys.exit(main())
