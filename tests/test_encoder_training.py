"""Training pSp and Pro-PULSE: both learn, resume exactly, start from others, and end in a bundle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_runs import NOTES, D, PixelDistance, Record, tiny_networks, write_faces
from small_runs import train as run_small

from models.bundle import load_bundle, save_bundle
from models.checkpoints import load_generator, save_generator
from models.latents import LatentStatistics
from models.propulse import ProPulseEncoder
from training.encoder import EncoderTraining

PSP = {"variant": "psp", "architecture": {"widths": [16, 16, 24, 32, 16]}}
PROPULSE = {"variant": "propulse", "architecture": {"backbone": "test_resnet", "width": 8}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_faces(tmp_path / "faces.zip")
    generator = tiny_networks()[0]
    for block in generator.synthesis.blocks:
        block.torgb.weight.mul_(5)  # there is much to improve
    save_generator(generator, tmp_path / "generator.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.encoder.LPIPS", PixelDistance)
    monkeypatch.setattr("sys.argv", ["train.py"])
    return tmp_path


def train(folder, monkeypatch, record: Record, run: str, steps: int, save_every: int = 2, **model) -> None:
    settings = {
        "generator": str(folder / "generator.safetensors"), "sizes_per_batch": 2, "compile": False,
        "weight_identity": 0.0, "warmup_steps": 1, "val_lr": [8], **model,
    }  # fmt: skip
    network = {"class_path": "training.encoder.EncoderTraining", "init_args": settings}
    often = {"val_check_interval": 2 * save_every, "check_val_every_n_epoch": None, "gradient_clip_val": 1.0}
    run_small(folder, monkeypatch, record, run, steps, network, trainer=often, save_every=save_every)


@pytest.mark.parametrize(
    "model",
    [{**PSP, "optimiser": "ranger", "decay": "none", "warmup_steps": 0, "loss_size": 16, "weight_downscaling": 1.0},
     {**PROPULSE, "weight_partial": 0.5, "weight_side": 1.0}],
    ids=["psp", "propulse"],
)  # fmt: skip
def test_exact_resume_and_bundle(folder, monkeypatch, model) -> None:
    model |= {"min_lr_size": 8, "max_lr_size": 16}
    whole, before, after = Record(), Record(stop_after=3), Record()
    train(folder, monkeypatch, whole, "whole", 4, **model, export_to=str(folder / "bundle"), bundle_info=NOTES)
    with pytest.raises(RuntimeError, match="killed"):
        train(folder, monkeypatch, before, "killed", 4, **model)
    train(folder, monkeypatch, after, "killed", 4, **model)  # goes on from step 2
    assert before.losses == whole.losses[:3] and after.losses == whole.losses[2:]
    ends = [folder / run / "checkpoints" / "last.ckpt" for run in ("whole", "killed")]
    states = [torch.load(path, weights_only=False)["state_dict"] for path in ends]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert {name.split(".")[0] for name in states[0]} == {"encoder", "encoder_ema"}
    bundle = load_bundle(folder / "bundle")
    assert bundle.encoder.config["variant"] == model["variant"] and bundle.lr_sizes == (8, 16)
    assert bundle.encode(torch.zeros(2, 3, 8, 8), k=3).ws.shape == (2, 3, 8, D)


@pytest.mark.parametrize("weight", ["l2", "partial", "side"])
def test_each_loss_improves_what_it_measures(folder, monkeypatch, weight) -> None:
    record = Record(metric=f"loss/{weight}")
    record.on_train_batch_end = lambda trainer, *args: record.losses.append(
        float(trainer.logged_metrics[record.metric])
    )
    weights = dict.fromkeys(("weight_latent", "weight_lpips", "weight_l2"), 0.0) | {f"weight_{weight}": 1.0}
    if weight == "partial":  # it is the first two losses of other codes
        weights["weight_l2"] = 1.0
    model = {**PROPULSE, **weights, "sizes_per_batch": 1, "learning_rate": 2e-3}
    train(folder, monkeypatch, record, "run", 25, save_every=1000, **model)
    assert np.mean(record.losses[-5:]) < 0.8 * np.mean(record.losses[:2])


# --- where it starts ---


def test_an_encoder_to_start_from_keeps_its_weights_and_takes_the_new_statistics(folder) -> None:
    encoder = ProPulseEncoder(32, 8, D, **PROPULSE["architecture"])
    save_bundle(folder / "old", tiny_networks(seed=1)[0], encoder, NOTES)
    start = {"init_encoder": str(folder / "old"), "weight_identity": 0.0}
    module = EncoderTraining(str(folder / "generator.safetensors"), **PROPULSE, **start)
    old, fresh = load_bundle(folder / "old").encoder.state_dict(), LatentStatistics(D)
    fresh.fit(load_generator(folder / "generator.safetensors"))
    for network in (module.encoder, module.encoder_ema):
        state = network.state_dict()
        assert all(torch.equal(state[name], old[name]) for name in old if not name.startswith("latents."))
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(state[f"latents.{name}"], tensor)
            assert not torch.equal(tensor, old[f"latents.{name}"])
    with pytest.raises(ValueError, match="init_encoder"):  # that of another shape
        EncoderTraining(str(folder / "generator.safetensors"), **PSP, **start)


@pytest.mark.parametrize(
    ("options", "words"),
    [({**PSP, "weight_partial": 1.0}, "propulse"), ({**PROPULSE, "init_backbone": "x.pth"}, "'psp'"),
     ({**PSP, "export_to": "bundle"}, "bundle_info")],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(folder, options, words) -> None:
    with pytest.raises(ValueError, match=words):
        EncoderTraining(str(folder / "generator.safetensors"), weight_identity=0.0, **options)
