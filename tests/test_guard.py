"""A training that meets NaN stops before it does harm."""

from __future__ import annotations

import pytest
import torch
from small_runs import PixelDistance, Record, train, write_bundle, write_faces

ENCODER = {
    "class_path": "training.encoder.EncoderTraining",
    "init_args": {
        "generator": "old/generator.safetensors", "variant": "propulse",
        "architecture": {"backbone": "test_resnet", "width": 8},
        "sizes_per_batch": 2, "compile": False, "weight_identity": 0.0, "warmup_steps": 1, "val_lr": [8],
    },
}  # fmt: skip


def test_nan_stops_the_run_and_leaves_the_last_checkpoint(tmp_path, monkeypatch) -> None:
    where = "training.encoder"
    write_faces(tmp_path / "faces.zip")
    write_bundle(tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"{where}.LPIPS", PixelDistance)
    monkeypatch.setattr("sys.argv", ["train.py"])
    broken = {"calls": 0}

    def error(*args, **kwargs):  # NaN from the fifth step on
        from data.operator import downscaling_error

        broken["calls"] += torch.is_grad_enabled()
        groups = 2
        return downscaling_error(*args, **kwargs) * (torch.nan if broken["calls"] > 4 * groups else 1.0)

    monkeypatch.setattr(f"{where}.downscaling_error", error)
    options = {"val_check_interval": 100, "check_val_every_n_epoch": None}
    with pytest.raises(FloatingPointError, match=r"at step 4, first in .*last\.ckpt.*learning_rate"):
        train(tmp_path, monkeypatch, Record(metric="downscaling_error_1"), "run", 10, ENCODER, trainer=options)
    kept = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=False)
    assert kept["global_step"] == 4
    assert all(t.isfinite().all() for t in kept["state_dict"].values())
