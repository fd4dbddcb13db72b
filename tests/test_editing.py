"""Edits of samples: what is carried over, the options, the picture of a sweep."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cli.edit_options import add_edit_options, check_edit_options, read_edit_plan, write_sweep
from data.operator import Downscale, back_project, lift
from editing.apply import edited_target
from editing.direction import SWEEP, EditDirection, EditPlan, write_direction
from models.bundle import Bundle

OWNER = "a" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, (name, owner) in enumerate({"smile": OWNER, "bangs": OWNER, "foreign": "f" * 64}.items()):
        normal = np.eye(16)[i]
        direction = EditDirection(name, normal, 0.0, np.tile(2 * normal, (8, 1)), owner)
        write_direction(direction, tmp_path / f"{name}.npz")
    return tmp_path


def read(folder: Path, *options: str) -> EditPlan:
    parser = argparse.ArgumentParser()
    add_edit_options(parser)
    args = parser.parse_args(options)
    check_edit_options(args)
    return read_edit_plan(args, folder, OWNER)


# ---------------------------------------------------------------- what is carried over


def faces(bundle: Bundle) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lr = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.4 - 0.2
    encoding = bundle.encode(lr)
    before, after = (bundle.generate(encoding._replace(ws=encoding.ws + e))[:, 0] * 0.3 for e in (0.0, 0.5))
    return lr, before, after


def test_an_edit_keeps_the_correction_of_the_unedited_sample(bundle: Bundle) -> None:
    lr, before, after = faces(bundle)
    edited = back_project(after, edited_target(lr, before, after))
    assert torch.allclose(edited, after + lift(lr - Downscale(8)(before), 32), atol=1e-5)  # nothing is clamped here
    change = Downscale(8)(edited) - Downscale(8)(back_project(before, lr))
    assert torch.allclose(change, Downscale(8)(after - before), atol=1e-4) and change.abs().max() > 1e-3


def test_an_edit_of_nothing_changes_nothing(bundle: Bundle) -> None:
    lr, before, _ = faces(bundle)
    large = 4 * before  # clamped
    assert torch.equal(back_project(large, edited_target(lr, large, large)), back_project(large, lr))


def test_preserving_the_lr_takes_out_what_shows(bundle: Bundle) -> None:
    lr, _, after = faces(bundle)
    assert torch.allclose(Downscale(8)(back_project(after, lr)), lr, atol=1e-4)


# ---------------------------------------------------------------- the options


def test_options_are_read(folder: Path) -> None:
    plan = read(folder, "--edit", "smile=+2", "--edit", "bangs=-1", "--edit-sweep", "bangs", "--edit-preserve-lr")
    assert [(d.name, strength) for d, strength in plan.edits] == [("smile", 2.0), ("bangs", -1.0)]
    assert plan.sweep.name == "bangs" and plan.preserve_lr
    assert np.allclose(plan.offset(8, 16)[3, :3], [4, -2, 0])
    notes = plan.summarize()
    assert [(e["name"], e["strength"], e["sha256"]) for e in notes["edits"]] == [
        (d.name, s, d.sha256) for d, s in plan.edits
    ]
    assert notes["edit_sweep"]["name"] == "bangs" and read(folder) == EditPlan() and EditPlan().summarize() == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--edit", "frown=1"), "there are: bangs, foreign, smile"),
        (("--edit", "foreign=1"), "another generator"),
        (("--edit-sweep", "foreign"), "another generator"),
        (("--edit", "smile"), "NAME=STRENGTH"),
        (("--edit", "smile=999"), "100"),
        (("--edit-preserve-lr",), "expected an --edit"),
    ],
)
def test_what_cannot_be_edited_is_refused(options: tuple[str, ...], words: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=words):
        read(folder, *options)


def test_a_sweep_shows_five_strengths(folder: Path, tmp_path: Path) -> None:
    write_sweep(read(folder, "--edit-sweep", "smile"), np.zeros((2, 5, 3, 32, 32), np.float32), tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as picture:
        assert len(SWEEP) == 5 and picture.size == (5 * (160 + 8) + 8, 2 * (160 + 8 + 20) + 8)
