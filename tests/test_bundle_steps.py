"""make bundle: what is given reaches every step, trainings are rehearsed first, and what is done is not done again."""

from __future__ import annotations

import argparse
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import SMALL, D, PixelDistance, tiny_networks, write_faces

import benchmarks.editing
import cli.make_bundle
import editing.__main__
import models.flow
import train
from cli.make_bundle import main, run, steps_of
from data.labels import ATTRIBUTES
from editing.direction import names_in
from models.bundle import load_bundle
from models.checkpoints import save_generator
from models.flow import flow_of

GIVEN = {"generator": "g.pkl", "data": "HQ.zip", "split": "celebahq", "labels": "anno.txt"}


@pytest.fixture
def calls(tmp_path, monkeypatch) -> list[str]:
    """The commands that are called; nothing is."""
    found: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        cli.make_bundle.subprocess,
        "run",
        lambda command: found.append(" ".join(command[1:])) or SimpleNamespace(returncode=int("fails" in found[-1])),
    )
    monkeypatch.setattr(Path, "exists", lambda path, **options: True)  # what the steps would leave behind
    return found


def test_what_is_given_reaches_every_step(calls) -> None:
    assert main(["--resolution", "256", *(f"--{name}={value}" for name, value in GIVEN.items())]) == 0
    rehearsals, steps = calls[:4], calls[4:]
    assert all("fast_dev_run" in call for call in rehearsals) and not any("fast_dev_run" in call for call in steps)
    assert len(steps) == 7
    for call in calls:
        wanted = {
            "amortized": ["--model.generator g.pkl", "--data.train HQ.zip", "--data.val HQ.zip", "celebahq"],
            "attributes": ["--data.train HQ.zip", "--data.val HQ.zip", "celebahq", "--data.labels anno.txt"],
            "benchmarks": ["--data HQ.zip", "--split celebahq"],
        }
        for kind, options in wanted.items():
            if f"configs/{kind}" in call or call.startswith(kind):
                assert all(option in call for option in options), call
    calls.clear()
    assert main(["--resolution", "256", *(f"--{name}={value}" for name, value in GIVEN.items())]) == 0
    assert not calls  # all is done


def test_every_step_is_a_command_that_there_is(monkeypatch) -> None:
    monkeypatch.chdir(Path(train.__file__).parent)
    steps = steps_of(argparse.Namespace(resolution=256, **GIVEN))
    for command in [step.command for step in steps] + [step.rehearsal for step in steps if step.rehearsal]:
        where = command[1] if command[0] == "-m" else command[0]
        assert find_spec(where) if command[0] == "-m" else Path(where).is_file(), command
        assert "--config" not in command or Path(command[command.index("--config") + 1]).is_file()


def test_a_step_that_fails_ends_the_command_and_is_taken_up_again(calls, capsys) -> None:
    assert main(["--generator", "fails.pkl"]) == 1
    assert "rehearsal of amortized_64 ended with status 1" in capsys.readouterr().err and len(calls) == 1


TRAINER = {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "val_check_interval": 2}
FACES = {"data.train": "faces.zip", "data.val": "faces.zip", "data.resolution": 32, "data.batch_size": 4}
CLASSIFIER = {**FACES, "model.resolution": 32, "model.backbone": "test_resnet", "model.options": None}
TINY = {
    "amortized_64": {
        **FACES, "model.architecture": SMALL, "model.weight_identity": 0.0, "model.sizes_per_batch": 2,
        "model.val_lr": [8],
    },
    "flow_64": {"model.hidden": 8, "data.batch_size": 4, "data.val_batches": 1},
    "attributes_64": CLASSIFIER,
    "attributes_64_second": CLASSIFIER,
}  # fmt: skip


@pytest.fixture
def called(tmp_path, monkeypatch) -> list[str]:
    """The steps that were called; they run in this process, with tiny settings."""
    write_faces(tmp_path / "faces.zip")
    signs = np.random.default_rng(0).choice([-1, 1], (20, len(ATTRIBUTES))).tolist()
    rows = [("file", *ATTRIBUTES), *((f"{i:02}.png", *row) for i, row in enumerate(signs))]
    (tmp_path / "labels.csv").write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    save_generator(tiny_networks()[0], tmp_path / "g.safetensors")
    monkeypatch.setattr(cli.make_bundle, "CONFIGS", cli.make_bundle.CONFIGS.resolve())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr("training.amortized.LPIPS", PixelDistance)
    monkeypatch.setattr("losses.perceptual.LPIPS", PixelDistance)
    truth = torch.randn(D, len(ATTRIBUTES), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("editing.hyperplane.score", lambda generator, classifier, w: 20 * (w - w.mean(0)) @ truth)
    found: list[str] = []

    def call(title: str, command: list[str]) -> None:
        found.append(title.rpartition(", ")[2])
        program, arguments = command[0], command[1:]
        if program == "train.py":
            more = {**TINY[command[-1]], **{f"trainer.{key}": value for key, value in TRAINER.items()}}
            written = (f"--{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in more.items())
            train.main([*arguments, *written])
        elif program == "benchmarks/editing.py":
            benchmarks.editing.main([*arguments, *"--generated 4 --real 2 --lr 8 --device cpu".split()])
        elif arguments[0] == "editing":
            assert editing.__main__.main([*arguments[1:], *"smile --samples 10000 --steps 2 --device cpu".split()]) == 0
        else:
            assert models.flow.main(arguments[1:]) == 0

    monkeypatch.setattr(cli.make_bundle, "_call", call)
    return found


def test_the_chain_makes_a_bundle_and_ends_at_once_where_it_is_done(called) -> None:
    """At 32 px, two steps of each training."""
    given = {"generator": "g.safetensors", "data": "faces.zip", "split": None, "labels": "labels.csv"}
    steps = [step._replace(rehearsal=None) for step in steps_of(argparse.Namespace(resolution=64, **given))]
    folder, done = Path("runs/amortized_64/bundle"), Path("runs/done")
    run(steps, done)
    assert called == [step.name for step in steps]
    assert flow_of(load_bundle(folder)).config["w_dim"] == D
    assert names_in(folder / "directions") == ["smile"] and "| smile" in Path("runs/edits_64/table.md").read_text()
    called.clear()
    run(steps, done)
    assert not called
    shutil.rmtree("runs/edits_64")
    run(steps, done)
    assert called == ["edit directions measured"]
