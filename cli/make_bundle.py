r"""Trains, one after the other, all that a bundle for a generator holds.

    python -m cli.make_bundle                                                      # make bundle
    python -m cli.make_bundle --resolution 256 --generator stylegan2-ffhq-256x256.pkl --data CelebAMask-HQ.zip \
        --split celebahq --labels CelebAMask-HQ-attribute-anno.txt

What is given goes to every step; what is not is that of the recipes. First every training is rehearsed, one step of
each, so that a file that the last one lacks is told now and not in a week. After an interruption the same command goes
on; what is finished is not done again. The bundle is runs/amortized_RESOLUTION/bundle.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.console import print_line, run_command

RUNS, CONFIGS = Path("runs"), Path("configs")


class Step(NamedTuple):
    """One step."""

    name: str  # of the step, and of the folder of what it trains
    command: list[str]  # arguments of Python
    makes: Path  # what it leaves behind
    rehearsal: list[str] | None = None  # arguments that try the same in a minute


def steps_of(args: argparse.Namespace) -> list[Step]:
    """Lists the steps in order."""
    size = args.resolution
    bundle = RUNS / f"amortized_{size}" / "bundle"
    own = _given(args, {"generator": "--model.generator"})
    faces = _given(args, {"data": ("--data.train", "--data.val"), "split": "--data.split"})
    labelled = [*faces, *_given(args, {"labels": "--data.labels"})]
    photos = _given(args, {"data": "--data", "split": "--split"})
    attributes = f"attributes_{64 if size == 64 else 224}.yaml"
    second = ["--seed_everything", "1", "--model.backbone", "regnety_002", "--model.options", "null"]
    second += ["--trainer.max_steps", "7200"] if size == 64 else []
    classifiers = [RUNS / f"attributes_{size}{more}" / "attributes.safetensors" for more in ("", "_second")]
    flow, edits = RUNS / f"flow_{size}" / "flow.safetensors", RUNS / f"edits_{size}"
    generator = ["--model.generator", str(bundle / "generator.safetensors")]
    fit = ["-m", "editing", "fit", "--bundle", str(bundle), "--classifier", str(classifiers[0])]
    measure = ["benchmarks/editing.py", "--bundle", str(bundle), "--classifier", str(classifiers[1]), *photos]
    add_flow = ["-m", "models.flow", "--bundle", str(bundle), "--flow", str(flow)]
    return [
        _training(f"amortized_{size}", f"amortized_{size}.yaml", [*own, *faces], bundle / "bundle.json"),
        _training(f"flow_{size}", "flow_64.yaml", generator, flow, rehearsed=own),
        Step("flow into the bundle", add_flow, bundle / "latents.safetensors"),
        _training(f"attributes_{size}", attributes, labelled, classifiers[0]),
        _training(f"attributes_{size}_second", attributes, [*labelled, *second], classifiers[1]),
        Step("edit directions", fit, bundle / "directions"),
        Step("edit directions measured", [*measure, "--out", str(edits), "--overwrite"], edits / "table.md"),
    ]


def _given(args: argparse.Namespace, options: dict[str, str | tuple[str, ...]]) -> list[str]:
    """Hands on the arguments that were given."""
    found: list[str] = []
    for name, targets in options.items():
        for target in (targets,) if isinstance(targets, str) else targets:
            found += [target, getattr(args, name)] if getattr(args, name) else []
    return found


def _training(name: str, recipe: str, options: list[str], makes: Path, rehearsed: list[str] | None = None) -> Step:
    start = ["train.py", "fit", "--config", str(CONFIGS / recipe)]
    once = ["--trainer.fast_dev_run", "1", "--trainer.enable_progress_bar", "false"]
    command = [*start, *options, "--trainer.logger.init_args.name", name]
    return Step(name, command, makes, [*start, *(options if rehearsed is None else rehearsed), *once])


def run(steps: Sequence[Step], done: Path) -> None:
    """Rehearses what has not begun, then does what is not done and all that follows it; ValueError if a step fails.

    `done` is a file that keeps the commands that have ended well, one a line.
    """
    finished = done.read_text(encoding="utf-8").splitlines() if done.is_file() else []
    missing = (i for i, s in enumerate(steps) if shlex.join(s.command) not in finished or not s.makes.exists())
    left = steps[next(missing, len(steps)) :]  # what follows may hang on it; a training that is finished ends at once
    for step in left:
        if step.rehearsal and not (RUNS / step.name / "checkpoints").is_dir():
            _call(f"rehearsal of {step.name}", step.rehearsal)
    for step in left:
        _call(f"{steps.index(step) + 1} of {len(steps)}, {step.name}", step.command)
        done.parent.mkdir(parents=True, exist_ok=True)
        with done.open("a", encoding="utf-8") as file:
            file.write(shlex.join(step.command) + "\n")


def _call(title: str, command: list[str]) -> None:
    print(f"cli.make_bundle: {title}: python {shlex.join(command)}", flush=True)
    status = subprocess.run([sys.executable, *command]).returncode
    if status:
        raise ValueError(f"{title} ended with status {status}; mend what it says, then give the same command again.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit status is 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--resolution", type=int, default=64, choices=(64, 256, 1024), help="of the generator (%(default)s)")
    add("--generator", metavar="FILE", help="weights (the recipe's)")
    add(
        "--data",
        metavar="PATH",
        help="zip or folder of faces, of which --split has a train and a val part (the recipe's)",
    )
    add("--split", metavar="NAME", help="see data.splits (the recipe's)")
    add("--labels", metavar="FILE", help="attributes of the faces, see data.labels (the recipe's)")
    args = parser.parse_args(arguments)

    def make() -> int:
        run(steps_of(args), RUNS / f"bundle_{args.resolution}.done")
        print_line(f"cli.make_bundle: the bundle is {RUNS / f'amortized_{args.resolution}' / 'bundle'}")
        return 0

    return run_command("cli.make_bundle", make, "the same command continues")


if __name__ == "__main__":
    sys.exit(main())
