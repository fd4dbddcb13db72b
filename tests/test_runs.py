"""A run knows what it is made of: it goes on with the same or says what differs, and it exports over nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from small_runs import NOTES, SMALL, PixelDistance, write_bundle, write_faces

import train as command
from data.faces import Faces
from models.bundle import load_bundle
from training.checkpoints import LAST, read_checkpoint
from training.run import RunRefused

MODEL = {
    "generator": "old/generator.safetensors", "architecture": SMALL, "sizes_per_batch": 2, "weight_identity": 0.0,
    "warmup_steps": 1, "val_lr": [8], "bundle_info": NOTES, "export_to": "bundle",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_faces(tmp_path / "faces.zip")
    write_faces(tmp_path / "others.zip", count=19)
    write_bundle(tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.amortized.LPIPS", PixelDistance)
    monkeypatch.setattr("sys.argv", ["train.py"])
    return tmp_path


def fit(steps: int, *options: str) -> None:
    recipe = {
        "model": {"class_path": "training.amortized.AmortizedTraining", "init_args": MODEL},
        "data": {
            "class_path": "data.datamodule.FaceData",
            "init_args": {"train": "faces.zip", "val": "faces.zip", "resolution": 32, "batch_size": 4, "val_limit": 4},
        },
        "trainer": {
            "accelerator": "cpu", "max_epochs": -1, "enable_progress_bar": False, "enable_model_summary": False,
            "logger": False, "num_sanity_val_steps": 0, "default_root_dir": "run", "val_check_interval": 100,
            "check_val_every_n_epoch": None,
        },
        "ckpt_path": "last",
    }  # fmt: skip
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    command.main(["fit", "--config", "recipe.yaml", f"--trainer.max_steps={steps}", *options])


REFUSED = {
    "--data.train=others.zip": "the pictures of --data.train are others",
    "--data.batch_size=5": "data.batch_size is 5 and was 4",
    "--seed_everything=7": "data.seed is 7 and was 0",
    "--trainer.accumulate_grad_batches=2": "accumulate_grad_batches is 2 and was 1",
    "--model.weight_lpips=3": "model.weight_lpips is 3",
    "--model.architecture.width=16": "model.architecture",
}
ACCEPTED = ["--model.learning_rate=0.01", "--trainer.precision=32-true", "--data.num_workers=1"]


def test_a_run_goes_on_with_what_it_began_with(folder: Path) -> None:
    fit(1)
    for option, words in REFUSED.items():
        if "accumulate" not in option:  # which this training refuses by itself
            with pytest.raises(RunRefused, match=f"{words}.*accept_changes"):
                fit(2, option)
    fit(2, *ACCEPTED)
    fit(3, "--data.batch_size=5", "--checkpoint.accept_changes=true")
    checkpoint = read_checkpoint(folder / "run" / "checkpoints" / LAST)
    assert checkpoint["global_step"] == 3 and load_bundle(folder / "run" / "bundle")
    assert checkpoint["run"]["data.train"] == f'"{Faces("faces.zip", 32).fingerprint()}"'


@pytest.mark.parametrize("name", ["bundle", "run/bundle", "run/config.yaml"])
@pytest.mark.parametrize("kind", ["file", "folder", "bundle"])
def test_it_writes_over_nothing(folder: Path, name: str, kind: str) -> None:
    target = folder / name
    target.parent.mkdir(exist_ok=True)
    if kind == "bundle":
        write_bundle(target)
    elif kind == "folder":
        target.mkdir()
    else:
        target.write_bytes(b"precious")
    before = {path: path.read_bytes() for path in [target, *target.rglob("*")] if path.is_file()}
    with pytest.raises(RunRefused, match=f"{target.name}.*(exists|is not of a training)"):
        fit(1, *([] if "run" in name else [f"--model.export_to={target}"]))
    assert target.exists() and all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize("content", [b"precious", {"a": 1}, "other people's"])
def test_other_files_are_no_checkpoints(tmp_path: Path, content: object) -> None:
    path = tmp_path / LAST
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        torch.save(content, path)
    else:
        save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(RunRefused, match=f"{LAST}: expected a checkpoint of a training"):
        read_checkpoint(path)


def test_a_worker_that_dies_ends_the_run_and_leaves_the_checkpoint(folder: Path, monkeypatch) -> None:
    decode = Faces._decode

    def dies(faces: Faces, index: int) -> torch.Tensor:
        if (folder / "die").exists() and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(faces, index)

    monkeypatch.setattr(Faces, "_decode", dies)
    options = "--data.num_workers=1", "--data.cache_gib=0"
    fit(1, *options)
    (folder / "die").touch()
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        fit(3, *options)
    assert read_checkpoint(folder / "run" / "checkpoints" / LAST)["global_step"] == 1
    (folder / "die").unlink()
    fit(3, *options)
    assert read_checkpoint(folder / "run" / "checkpoints" / LAST)["global_step"] == 3
