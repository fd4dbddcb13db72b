"""A training that meets NaN stops before it does harm."""

from __future__ import annotations

import pkgutil

import pytest
import torch
from small_runs import SMALL, PixelDistance, Record, train, write_bundle, write_faces

SETTINGS = {
    "generator": "old/generator.safetensors", "sizes_per_batch": 2, "weight_identity": 0.0, "warmup_steps": 1,
    "val_lr": [8],
}  # fmt: skip
PROPULSE = {"variant": "propulse", "architecture": {"backbone": "test_resnet", "width": 8}, "compile": False}
RUNS = {  # the training, what gives NaN from the fifth step on, and its calls in a step
    "encoder": ("training.encoder.EncoderTraining", PROPULSE, "training.encoder.downscaling_error", 2),
    "score": (
        "training.amortized.AmortizedTraining",
        {"architecture": SMALL},
        "training.amortized.feature_distance",
        1,
    ),
    "discriminator": (
        "training.amortized.AmortizedTraining",
        {"architecture": SMALL, "weight_adversarial": 1e-9, "discriminator_warmup": 100},
        "training.amortized.FeatureDiscriminator.forward",
        2,
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_nan_stops_the_run_and_leaves_the_last_checkpoint(tmp_path, monkeypatch, run) -> None:
    training, options, source, calls = RUNS[run]
    write_faces(tmp_path / "faces.zip")
    write_bundle(tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"{training.rpartition('.')[0]}.LPIPS", PixelDistance)
    monkeypatch.setattr("sys.argv", ["train.py"])
    function, count = pkgutil.resolve_name(source), 0

    def breaks(*args, **kwargs):
        nonlocal count
        count += torch.is_grad_enabled()
        value = function(*args, **kwargs)
        if count <= 4 * calls:
            return value
        return value * torch.nan if isinstance(value, torch.Tensor) else [part * torch.nan for part in value]

    monkeypatch.setattr(source, breaks)
    network = {"class_path": training, "init_args": {**SETTINGS, **options}}
    seldom = {"val_check_interval": 100, "check_val_every_n_epoch": None}
    first = "discriminator" if run == "discriminator" else "encoder"
    with pytest.raises(FloatingPointError, match=rf"first in {first}.*last\.ckpt.*learning_rate"):
        train(tmp_path, monkeypatch, Record(), "run", 10, network, trainer=seldom)
    kept = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=False)
    assert kept["global_step"] == 4
    assert all(t.isfinite().all() for t in kept["state_dict"].values())
