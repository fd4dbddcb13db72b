"""Measures every method on the same faces in one run, one table out.

Examples:
    python evaluate.py                                            # 200 validation faces, 16 and 8 px, default bundle
    python evaluate.py --k 11                                     # NTIRE's diversity score of ten draws
    python evaluate.py --faces 2000 --k 2 --networks vgg11        # fd_vgg11 and KID (1000 faces or more)
    python evaluate.py --faces 2000 --k 2 --networks inception    # FID
    python evaluate.py --data generated                           # dispersion on the generator's own faces
    python evaluate.py --methods all --keep --bundle runs/mine    # again after a training: searches are not repeated
    python evaluate.py --degradation clean noise25 jpeg --methods pulse amortized --out results/robust
    python evaluate.py --bundle runs/mine --bundle psp=runs/psp/bundle --data my_faces.zip --split my_lists --part test
    python evaluate.py --group-by celeba128_labels.csv.gz:Male --attributes runs/attributes_64/attributes.safetensors
    python evaluate.py --folders faces/ their_samples/ --lr 16    # other people's results
    torchrun --nproc-per-node 4 evaluate.py --methods all --faces 2000     # four processes share the faces

Every face is downscaled by the project's operator, degraded as --degradation says, and rounded to 8 bit; each method
gets that picture and nothing else, and assumes plain bicubic downscaling. Samples are measured as they would be
written: clamped to [-1, 1] and rounded to 8 bit. Sample 1 is the point estimate, the others are draws. Every method is
offered back-projection as its last step: its second row. docs/results.md defines the columns.

It writes `table.md`, `results.json` (two runs of one command differ in its key "timing" alone) and one
`faces_<LR>.png` per condition into --out. These pictures show faces from the data: mind its licence before they are
passed on. What is measured is kept batch by batch in --out/cache: the same command continues after an interruption,
and removes the cache in the end, unless --keep is given.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.console import WrongOption, blame, print_error, print_line, run_command
from data.contents import find_data
from data.faces import Faces
from data.files import check_replaceable, check_writable, locked, owned_file
from evaluation.cache import Cache, Processes
from evaluation.folders import measure_folders
from evaluation.groups import by_group, read_grouping
from evaluation.methods import Method, make_amortized, make_method, recipe_hash
from evaluation.metrics import MetricSuite
from evaluation.options import parse
from evaluation.runner import Outcome, Runner
from evaluation.table import table
from evaluation.truth import GENERATED, Condition, GeneratedFaces, TruthSet
from models.bundle import Bundle, load_bundle
from models.checkpoints import sha256_of
from models.device import use_deterministic_kernels

OPERATOR = "separable bicubic, a = -0.5, antialiased (4·factor taps, PULSE's offsets, reflected borders); LR in 8 bit"

OF_METHODS = ("bundle", "other_bundles", "search")  # what only some methods depend on, see `recipe_hash`


def compare(
    runner: Runner, methods: Mapping[str, Method], conditions: Sequence[Condition]
) -> Iterator[tuple[Condition, dict[str, Outcome]]]:
    """Runs all methods in one condition after the other.

    Yields:
        Each condition with the outcomes by row; nothing in processes other than the first.
    """
    own = runner.processes
    total = len(conditions) * len(methods) * len(runner.truth) // own.count
    with tqdm(total=total, unit="face", disable=True if own.rank else None) as progress:
        for condition in conditions:
            for name, method in methods.items():
                progress.set_description(f"{name}, {condition.title}")
                runner.run(name, method, condition, progress)
            own.wait()
            if own.rank == 0:
                rows = {row: method for name, method in methods.items() for row in runner.rows_of(name)}
                yield condition, {row: runner.outcome(row, method, condition) for row, method in rows.items()}
            own.wait()


def save(
    results: Mapping[str, Any], out: Path, pictures: Mapping[str, Image.Image] | None = None, overwrite: bool = False
) -> None:
    """Writes the table, the results, and pictures by file name into the folder `out`; see `data.files.owned_file`."""
    document = json.dumps(json_ready(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    writers: dict[str, Callable[[Path], object]] = {
        "table.md": lambda path: path.write_bytes(table(results).encode("utf-8", "backslashreplace")),
        "results.json": lambda path: path.write_bytes(document.encode("utf-8", "backslashreplace")),
    }
    for name, picture in (pictures or {}).items():
        writers[name] = lambda path, picture=picture: picture.save(path, format="PNG")  # type: ignore[misc]
    for name, write in writers.items():
        with owned_file(out / name, overwrite, _job(results.get("command", ""))) as partial:
            write(partial)


def json_ready(value: Any) -> Any:
    """Replaces inf and NaN, which JSON cannot hold, by words in nested dicts."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        Exit status: 0; 2 if an option cannot be followed; 1 with a message when something is missing, does not fit or
        fails, or faces could not be read; 130 after Ctrl-C. Conditions that were finished before are in --out.
    """
    args = parse(argv, __doc__)
    command = shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)])
    return run_command("evaluate.py", lambda: _evaluate(args, command), f"the same command continues in {args.out}")


def _evaluate(args: argparse.Namespace, command: str) -> int:
    with blame("--out"):
        _check_out(args, command)
    if args.folders:
        results: dict[str, Any] | None = _run_folders(args, command)
    else:
        with _alone(args.out):
            results = _run(args, command)
    if results is None:  # another process tells
        return 0
    for line in results["unreadable"]:
        print_error(f"evaluate.py: {line}")
    for line in table(results).splitlines():
        print_line(line)
    return 1 if results["unreadable"] else 0


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Lets one call at a time measure into a folder; the processes that torchrun started are one."""
    with ExitStack() as stack:
        if os.environ.get("RANK", "0") == "0":
            (out / "cache").mkdir(exist_ok=True)
            try:
                stack.enter_context(locked(out / "cache", wait=False))
            except BlockingIOError:
                raise WrongOption(f"--out: another call measures into {out}; wait for it, or name another") from None
        yield


def _run(args: argparse.Namespace, command: str) -> dict[str, Any] | None:
    """Measures, writes after every condition, and returns the results; None in processes other than the first."""
    use_deterministic_kernels()
    with blame("--bundle"):
        bundle = load_bundle(args.bundle, args.device)
        others = {name: load_bundle(path, args.device) for name, path in args.others.items()}
    _check_sizes(args, [bundle, *others.values()])
    with blame("--data, --split"):
        truth = _read_truth(args, bundle)
    with blame("--group-by"):
        groupings = [read_grouping(_find_table(where), truth.faces.names) for where in args.group_by]
    runner, facts = _make_runner(args, bundle, others, truth, _make_suite(args))
    methods = {name: make_method(name, bundle, args.search) for name in args.methods}
    methods |= {name: make_amortized(other) for name, other in others.items()}
    results = {"command": command, "made_by": f"bundle {bundle.name} ({bundle.hash[:12]})", **facts}
    results |= {"unreadable": list(truth.problems), "conditions": {}, "results": {}, "groups": {}}
    results["timing"] = {"seconds_per_face": {}, "device": args.device.type, "threads": torch.get_num_threads()}
    conditions = [Condition(size, degradation) for degradation in args.degradation for size in args.lr]
    for condition, outcomes in compare(runner, methods, conditions):
        key = condition.name
        results["conditions"][key] = condition.title
        results["results"][key] = {row: outcome.means for row, outcome in outcomes.items()}
        results["timing"]["seconds_per_face"][key] = {row: outcome.seconds for row, outcome in outcomes.items()}
        for grouping in groupings:
            own = {row: by_group(grouping, outcome.faces) for row, outcome in outcomes.items()}
            results["groups"].setdefault(grouping.column, {})[key] = own
        picture = runner.figure(condition, {row: outcome.shown for row, outcome in outcomes.items()})
        save(results, args.out, {f"faces_{key}.png": picture}, args.overwrite)
    runner.processes.leave()
    if runner.processes.rank:
        return None
    if not args.keep:
        runner.cache.clear()
    return results


def _run_folders(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures pictures in folders, writes and returns the results."""
    truth, samples = args.folders
    with blame("--folders"):
        find_data(truth)
        if not Path(samples).is_dir():
            raise ValueError(f"expected a folder of samples, found none at {samples}")
    suite = _make_suite(args)
    part = {"limit": args.faces, "split": args.split, "part": args.part}
    found = measure_folders(truth, samples, suite, args.lr[0] if args.lr else None, **part)
    key, name = str(found.pop("lr_size")), Path(samples).name
    results = {
        "command": command,
        "made_by": f"samples in {name}",
        "data": find_data(truth).name,
        "seed": "–",
        "conditions": {key: f"{key} px"},
        "results": {key: {name: found.pop("means")}},
        "networks": {network: network in suite.networks for network in args.networks},
        "lpips": args.lpips,
        "unreadable": [],
        "timing": {"seconds_per_face": {}},
        **found,
    }
    save(results, args.out, overwrite=args.overwrite)
    return results


def _read_truth(args: argparse.Namespace, bundle: Bundle) -> TruthSet:
    """Reads the faces that are measured against."""
    if args.data == GENERATED:
        return TruthSet.read(GeneratedFaces(bundle, args.faces, args.seed))
    return TruthSet.read(Faces(args.data, bundle.resolution, limit=args.faces, split=args.split, part=args.part))


def _make_suite(args: argparse.Namespace) -> MetricSuite:
    """Loads the networks that measure."""
    attributes, pristine = None, None
    if args.attributes:
        from models.attributes import load_attributes  # late: only those who ask for it need it

        with blame("--attributes"):
            attributes = load_attributes(args.attributes, args.device)
    if args.niqe:
        from evaluation.niqe import Pristine

        with blame("--niqe"):
            pristine = Pristine.load(args.niqe)
    return MetricSuite(args.device, args.networks, attributes, pristine, args.lpips)


def _make_runner(
    args: argparse.Namespace, bundle: Bundle, others: Mapping[str, Bundle], truth: TruthSet, suite: MetricSuite
) -> tuple[Runner, dict[str, Any]]:
    """Makes the runner, whose cache knows what the figures depend on, and says what that is."""
    facts = _circumstances(args, bundle, others, truth, suite)
    cache = Cache(args.out, {key: fact for key, fact in facts.items() if key not in OF_METHODS})
    recipes = {name: recipe_hash(name, bundle, args.search) for name in args.methods}
    recipes |= {name: recipe_hash(name, other, args.search) for name, other in others.items()}
    return Runner(truth, suite, cache, Processes.join(), args.k, args.seed, recipes, bundle, args.projection), facts


def _find_table(where: str) -> str:
    """Finds the table of "FILE:COLUMN" where data sets lie."""
    file, separator, column = where.rpartition(":")
    return f"{find_data(file)}{separator}{column}" if file else where


def _job(command: str) -> str:
    """Names what results are made of: the same command continues."""
    return " ".join(word for word in command.split() if word != "--overwrite")


def _check_out(args: argparse.Namespace, command: str) -> None:
    """Makes sure that results can be written, now and not after an hour of measuring."""
    out, sizes = args.out, args.lr or ()
    conditions = [Condition(size, degradation).name for degradation in args.degradation for size in sizes]
    for name in ("table.md", "results.json", *(f"faces_{key}.png" for key in conditions if not args.folders)):
        check_replaceable(out / name, args.overwrite, _job(command))
    check_writable(out)


def _check_sizes(args: argparse.Namespace, bundles: Sequence[Bundle]) -> None:
    """Makes sure that all bundles take the LR sizes, and have faces of one size."""
    for bundle in bundles:
        smallest, largest = bundle.lr_sizes
        if min(args.lr) < smallest or max(args.lr) > largest:
            raise WrongOption(f"Expected --lr from {smallest} to {largest} px for {bundle.name!r}, got {args.lr}.")
        if bundle.resolution != bundles[0].resolution:
            raise WrongOption(
                f"--bundle: expected bundles of one resolution, {bundles[0].name!r} has {bundles[0].resolution} px and "
                f"{bundle.name!r} {bundle.resolution} px; compare them in runs of their own."
            )


def _circumstances(
    args: argparse.Namespace, bundle: Bundle, others: Mapping[str, Bundle], truth: TruthSet, suite: MetricSuite
) -> dict[str, Any]:
    """Says on what the figures depend."""
    return {
        "bundle": {"name": bundle.name, "hash": bundle.hash},
        "other_bundles": {name: {"name": other.name, "hash": other.hash} for name, other in others.items()},
        "search": args.search,
        "data": args.data if args.data == GENERATED else find_data(args.data).name,
        "split": [Path(args.split).name, args.part] if args.split else None,
        "data_hash": truth.hash,
        "resolution": bundle.resolution,
        "faces": len(truth),
        "k": args.k,
        "seed": args.seed,
        "operator": OPERATOR,
        "networks": {name: name in suite.networks for name in args.networks},
        "lpips": args.lpips,
        "attributes": sha256_of(args.attributes) if args.attributes else None,
        "niqe": sha256_of(args.niqe) if args.niqe else None,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }


if __name__ == "__main__":
    sys.exit(main())
