"""Whole runs of the encoder's training: killed ones go on exactly, and two processes do what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback
from small_runs import NOTES, SMALL, D, PixelDistance, Record, train, write_bundle, write_faces

from models.bundle import load_bundle
from training.amortized import AmortizedTraining

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {
    "generator": "old/generator.safetensors", "architecture": SMALL, "sizes_per_batch": 2, "weight_identity": 0.0,
    "warmup_steps": 1, "discriminator_warmup": 1, "val_lr": [8],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_faces(tmp_path / "faces.zip")
    write_bundle(tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.amortized.LPIPS", PixelDistance)
    monkeypatch.setattr("sys.argv", ["train.py"])
    return tmp_path


def test_exact_resume_and_bundle(folder, monkeypatch) -> None:
    def run(record: Record, name: str, **more) -> None:
        settings = {**SETTINGS, "degraded_prob": 0.5, "loss_size": 16, **more}
        model = {"class_path": "training.amortized.AmortizedTraining", "init_args": settings}
        train(folder, monkeypatch, record, name, 6, model, save_every=2)

    whole, before, after = Record(), Record(stop_after=3), Record()
    run(whole, "whole", export_to=str(folder / "bundle"), bundle_info=NOTES)
    with pytest.raises(RuntimeError, match="killed"):
        run(before, "killed")
    run(after, "killed")  # goes on from step 2
    assert before.losses == whole.losses[:3] and after.losses == whole.losses[2:]

    ends = [torch.load(folder / name / "checkpoints" / "last.ckpt", weights_only=False) for name in ("whole", "killed")]
    states = [end["state_dict"] for end in ends]
    assert {name.split(".")[0] for name in states[0]} == {"encoder", "encoder_ema", "discriminator"}
    torch.testing.assert_close(*states, rtol=0, atol=0)
    torch.testing.assert_close(*([adam["state"] for adam in end["optimizer_states"]] for end in ends), rtol=0, atol=0)
    assert states[0]["encoder.lacking"] != 0.01 and states[0]["discriminator.scales"].min() < 1  # both are measured

    bundle = load_bundle(folder / "bundle")
    encoding = bundle.encode(torch.zeros(2, 3, 8, 8), k=3)
    assert encoding.ws.shape == (2, 3, 8, D) and bundle.generate(encoding).shape == (2, 3, 3, 32, 32)
    torch.testing.assert_close(bundle.encoder.lacking, states[0]["encoder_ema.lacking"], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("data", "trainer", "words"), [(16, {}, "one resolution"), (32, {"precision": "16-mixed"}, "bf16-mixed")]
)
def test_what_it_cannot_follow_is_refused(folder, data, trainer, words) -> None:
    module = AmortizedTraining(**SETTINGS)
    module._trainer = type("Trainer", (), {"precision": "32-true", **trainer})
    module._trainer.datamodule = type("Data", (), {"hparams": {"resolution": data}})
    with pytest.raises(ValueError, match=words):
        module.setup("fit")


# --- two processes ---


class Descent(AmortizedTraining):
    """Plain descent, since Adam makes much of the last bits of a gradient."""

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(network.parameters(), 0.05) for network in (self.encoder, self.discriminator)]


class Keep(Callback):
    """Keeps what every process ends with."""

    def on_train_end(self, trainer, module) -> None:
        torch.save(module.state_dict(), f"{trainer.default_root_dir}-{trainer.global_rank}.pt")


def child() -> None:
    """Trains in a process of its own, which forks the two: nothing here has used a thread before."""
    import training.amortized
    from train import main

    torch.set_num_threads(1)
    training.amortized.LPIPS = PixelDistance
    for name in ("two", "one", "parts"):
        main(["fit", "--config", f"{name}.yaml"])


def test_two_processes_and_micro_batches_are_one_process_with_the_whole_batch(folder) -> None:
    """BatchNorm excepted, whose statistics are those of a micro-batch; an encoder that is trained on holds its own."""
    write_faces(folder / "faces.zip", 8)  # one batch
    settings = {**SETTINGS, "init_encoder": "old", "learning_rate": 0.05, "degraded_prob": 0.5, "sizes_per_batch": 4}
    faces = {"train": "faces.zip", "val": "faces.zip", "resolution": 32, "val_limit": 4}
    for name, devices, parts in (("one", 1, 1), ("two", 2, 1), ("parts", 1, 4)):
        recipe = {
            "model": {
                "class_path": "test_amortized_runs.Descent",
                "init_args": {**settings, "micro_batches": parts, "export_to": "bundle", "bundle_info": NOTES},
            },
            "data": {"class_path": "data.datamodule.FaceData", "init_args": {**faces, "batch_size": 8 // devices}},
            "trainer": {
                "accelerator": "cpu", "devices": devices, "strategy": "ddp_fork" if devices > 1 else "auto",
                "max_steps": 4, "max_epochs": -1, "enable_progress_bar": False, "enable_model_summary": False,
                "logger": False, "num_sanity_val_steps": 0, "val_check_interval": 1, "check_val_every_n_epoch": 2,
                "default_root_dir": name, "callbacks": {"class_path": "test_amortized_runs.Keep", "init_args": {}},
            },
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import test_amortized_runs as t; t.child()"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    alone, first, second, parts = (torch.load(folder / f"{name}.pt") for name in ("one-0", "two-0", "two-1", "parts-0"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts, alone, rtol=1e-4, atol=1e-5)
    start = load_bundle(folder / "old").encoder.state_dict()
    moved = max(float((alone[f"encoder.{name}"] - tensor).abs().max()) for name, tensor in start.items())
    assert moved > 1e-3
    codes = [load_bundle(folder / name / "bundle").encode(torch.zeros(1, 3, 8, 8)).ws for name in ("one", "two")]
    torch.testing.assert_close(*codes, rtol=1e-3, atol=1e-3)
