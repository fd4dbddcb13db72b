"""make bundle: what is given reaches every step, trainings are rehearsed first, and what is done is not done again."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_runs import SMALL, PixelDistance, tiny_networks, write_faces

import models.flow
import train
import training.bundle
from models.bundle import load_bundle
from models.checkpoints import save_generator
from models.flow import flow_of
from training.bundle import main, run, steps_of

GIVEN = {"generator": "g.pkl", "data": "HQ.zip", "split": "celebahq", "labels": "anno.txt"}


@pytest.fixture
def calls(tmp_path, monkeypatch) -> list[str]:
    """The commands that are called; nothing is."""
    found: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        training.bundle.subprocess,
        "run",
        lambda command: found.append(" ".join(command[1:])) or SimpleNamespace(returncode=int("fails" in found[-1])),
    )
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


def test_the_chain_makes_a_bundle_with_a_flow(tmp_path, monkeypatch) -> None:
    """At 32 px, two steps of each training."""
    write_faces(tmp_path / "train.zip")
    save_generator(tiny_networks()[0], tmp_path / "g.safetensors")
    configs = training.bundle.CONFIGS.resolve()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setattr("training.amortized.LPIPS", PixelDistance)
    monkeypatch.setattr(training.bundle, "CONFIGS", configs)
    tiny = {
        "amortized_64": {
            "model.architecture": SMALL, "model.weight_identity": 0.0, "model.sizes_per_batch": 2, "model.val_lr": [8],
            "data.train": "train.zip", "data.val": "train.zip", "data.resolution": 32, "data.batch_size": 4,
            "data.val_limit": 4,
        },
        "flow_64": {"model.hidden": 8, "data.batch_size": 4, "data.val_batches": 1},
    }  # fmt: skip
    trainer = {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "val_check_interval": 2}

    def call(title: str, command: list[str]) -> None:
        if command[0] == "train.py":
            name = command[-1]
            more = {**tiny[name], **{f"trainer.{key}": value for key, value in trainer.items()}}
            written = (f"--{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in more.items())
            train.main([*command[1:], *written])
        else:
            assert models.flow.main(command[2:]) == 0

    monkeypatch.setattr(training.bundle, "_call", call)
    steps = steps_of(argparse.Namespace(resolution=64, generator="g.safetensors", data=None, split=None, labels=None))
    run([step._replace(rehearsal=None) for step in steps[:3]], tmp_path / "done")
    assert flow_of(load_bundle("runs/amortized_64/bundle")).config["w_dim"] == 16
