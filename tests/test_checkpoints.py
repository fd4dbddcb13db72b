"""Checkpoints: complete or not there, the newest readable one is taken, and nothing depends on $TMPDIR."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import PixelDistance, Record, train, write_bundle, write_faces

from training.checkpoints import LAST, PARTIAL, PREVIOUS, DurableIO, newest_checkpoint
from training.run import lock_run

ROOT = Path(__file__).resolve().parents[1]
ENCODER = {
    "class_path": "training.encoder.EncoderTraining",
    "init_args": {
        "generator": "old/generator.safetensors", "variant": "propulse",
        "architecture": {"backbone": "test_resnet", "width": 8},
        "sizes_per_batch": 2, "compile": False, "weight_identity": 0.0, "warmup_steps": 1, "val_lr": [8],
    },
}  # fmt: skip


def save(folder: Path, *steps: int, size: int = 1000) -> None:
    for step in steps:
        state = {"weights": torch.randn(size)}
        DurableIO().save_checkpoint({"step": step, "state_dict": state, "loops": {}}, folder / LAST)


def step_of(path: Path | None) -> int | None:
    return None if path is None else DurableIO().load_checkpoint(path)["step"]


def test_two_checkpoints_are_kept(tmp_path) -> None:
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, 1, 2, 3)
    assert {path.name for path in tmp_path.iterdir()} == {LAST, PREVIOUS}
    assert step_of(newest_checkpoint(tmp_path)) == 3 and step_of(tmp_path / PREVIOUS) == 2


@pytest.mark.parametrize("damage", ["empty", "short", "a byte within", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, damage, recwarn) -> None:
    save(tmp_path, 1, 2)
    last = tmp_path / LAST
    content = bytearray(last.read_bytes())
    if damage == "missing":  # killed between the two renames
        last.rename(tmp_path / PARTIAL)
    else:
        content[len(content) // 2] ^= 1
        last.write_bytes({"empty": b"", "short": content[:-99], "a byte within": content}[damage])
    assert step_of(newest_checkpoint(tmp_path)) == 1
    assert [str(w.message).startswith(f"{last} is damaged") for w in recwarn] == [True] * (damage != "missing")


def test_a_run_does_not_start_from_zero_because_all_checkpoints_are_damaged(tmp_path) -> None:
    save(tmp_path, 1, 2)
    for name in (LAST, PREVIOUS):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged .*previous\.ckpt is damaged .*delete"):
        newest_checkpoint(tmp_path)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path) -> None:
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, as on a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last\.ckpt, got: .*too large; .*stays as it was.*Make room"):
            save(tmp_path, 2, size=1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == [LAST]
    assert step_of(newest_checkpoint(tmp_path)) == 1


def test_a_run_goes_on_exactly_from_the_checkpoint_before_the_damaged_one(tmp_path, monkeypatch) -> None:
    write_faces(tmp_path / "faces.zip")
    write_bundle(tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.encoder.LPIPS", PixelDistance)
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("TMPDIR", str(tmp_path / "not there"))
    first, second = Record(), Record()
    train(tmp_path, monkeypatch, first, "run", 7, ENCODER)
    folder = tmp_path / "run" / "checkpoints"
    assert torch.load(folder / LAST)["global_step"] == 7  # the last step is saved whatever the interval
    (folder / LAST).write_bytes(b"")
    (folder / PARTIAL).write_bytes(b"left by a kill")
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged"):
        train(tmp_path, monkeypatch, second, "run", 7, ENCODER)
    assert second.losses == first.losses[6:]
    assert {path.name for path in folder.iterdir()} == {LAST, PREVIOUS}


def test_one_process_trains_in_a_folder_until_it_is_killed(tmp_path) -> None:
    code = "import sys, pathlib, training.run as r; f = r.lock_run(pathlib.Path(sys.argv[1])); print(); input()"
    other = subprocess.Popen(
        [sys.executable, "-uc", code, tmp_path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "\n"
        with pytest.raises(ValueError, match=f"process {other.pid} on .*logger.init_args.name"):
            lock_run(tmp_path)
    finally:
        other.kill()
        other.wait()
    lock_run(tmp_path).close()
