"""Training on two processes: each sees faces of its own, both have the same weights, and the first saves the bundle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from lightning import Callback
from small_runs import NOTES, PixelDistance, write_bundle, write_faces

from models.bundle import load_bundle

ROOT = Path(__file__).resolve().parents[1]


class Compare(Callback):
    """Writes down what every process ends with."""

    def on_train_end(self, trainer, module) -> None:
        own = [float(sum(p.double().abs().sum() for p in module.encoder.parameters())), float(self.loss)]
        found = [None] * trainer.world_size
        torch.distributed.all_gather_object(found, own)
        if trainer.global_rank == 0:
            Path("ends.json").write_text(json.dumps(found))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.loss = outputs["loss"]


def child() -> None:
    """Trains, in one of the processes that torchrun starts."""
    import training.encoder
    from train import main

    training.encoder.LPIPS = PixelDistance
    main(["fit", "--config", "recipe.yaml"])


def test_two_processes_train_one_encoder(tmp_path) -> None:
    write_faces(tmp_path / "faces.zip")
    write_bundle(tmp_path / "old")
    recipe = {
        "model": {
            "class_path": "training.encoder.EncoderTraining",
            "init_args": {
                "generator": "old/generator.safetensors", "architecture": {"backbone": "test_resnet", "width": 8},
                "sizes_per_batch": 2, "compile": False, "weight_identity": 0.0, "warmup_steps": 1, "val_lr": [8],
                "export_to": "bundle", "bundle_info": NOTES,
            },
        },
        "data": {
            "class_path": "data.datamodule.FaceData",
            "init_args": {
                "train": "faces.zip", "val": "faces.zip", "resolution": 32, "batch_size": 4, "val_limit": 4,
            },
        },
        "trainer": {
            "accelerator": "cpu", "devices": "auto", "sync_batchnorm": True, "max_steps": 3, "max_epochs": -1,
            "enable_progress_bar": False, "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 0,
            "val_check_interval": 2, "check_val_every_n_epoch": None,
            "callbacks": [{"class_path": "test_encoder_distributed.Compare", "init_args": {}}],
        },
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, str(ROOT / "tests" / "test_encoder_distributed.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:6000]
    (weights, loss), (other_weights, other_loss) = json.loads((tmp_path / "ends.json").read_text())
    assert weights == other_weights and loss != other_loss
    assert load_bundle(tmp_path / "bundle").encode(torch.zeros(1, 3, 8, 8)).isfinite().all()


if __name__ == "__main__":
    child()
