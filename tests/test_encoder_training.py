"""Training the encoder: it learns, it resumes exactly, and what only measures stays as it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_runs import NOTES, PixelDistance, Record, write_faces
from small_runs import train as run_small

from models.bundle import load_bundle, save_bundle
from models.checkpoints import load_generator, save_generator
from models.encoder import create_encoder
from models.generator import Generator
from models.latents import LatentStatistics
from training.encoder import EncoderTraining


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_faces(tmp_path / "faces.zip")
    torch.manual_seed(1)
    save_generator(Generator(32, (8, 8, 6, 4), z_dim=8, w_dim=8, mapping_layers=2), tmp_path / "generator.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.encoder.LPIPS", PixelDistance)
    monkeypatch.setattr("sys.argv", ["train.py"])
    return tmp_path


def train(folder, monkeypatch, record: Record, run: str, steps: int, save_every: int = 2, **model) -> None:
    settings = {
        "generator": str(folder / "generator.safetensors"), "sizes_per_batch": 2, "compile": False,
        "weight_identity": 0.0, "weight_downscaling": 1.0, "warmup_steps": 1, "val_lr": [8], **model,
    }  # fmt: skip
    network = {"class_path": "training.encoder.EncoderTraining", "init_args": settings}
    often = {"val_check_interval": 2 * save_every, "check_val_every_n_epoch": None, "gradient_clip_val": 1.0}
    run_small(folder, monkeypatch, record, run, steps, network, trainer=often, save_every=save_every)


def test_exact_resume_and_bundle(folder, monkeypatch):
    whole, before, after = Record(), Record(stop_after=7), Record()
    export = {"export_to": str(folder / "bundle"), "bundle_info": NOTES}
    train(folder, monkeypatch, whole, "whole", 10, **export)
    with pytest.raises(RuntimeError, match="killed"):
        train(folder, monkeypatch, before, "killed", 10)
    train(folder, monkeypatch, after, "killed", 10)  # goes on from step 6
    assert before.losses == whole.losses[:7]
    assert after.losses == whole.losses[6:]
    bundle = load_bundle(folder / "bundle")
    images, ws = bundle.upsample(torch.zeros(2, 3, 8, 8), k=3, rng=np.random.default_rng(0))
    assert images.shape == (2, 3, 3, 32, 32) and ws.shape == (2, 3, 8, 8)
    state = torch.load(folder / "whole" / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    assert {name.split(".")[0] for name in state} == {"encoder", "encoder_ema"}


def test_it_learns(folder, monkeypatch):
    record = Record()
    train(folder, monkeypatch, record, "run", 30, save_every=100, learning_rate=2e-3, often=[8], often_share=1.0)
    # Against the start, not the first ten: the loss rises before it falls. Without learning it ends at 0.99.
    assert np.mean(record.losses[-10:]) < 0.8 * record.losses[0]


def small_bundle(path, resolution: int = 32) -> None:
    """Writes a bundle of another generator, its encoder's weights at random."""
    torch.manual_seed(2)
    channels = (8, 8, 6, 4, 4)[: resolution.bit_length() - 2]
    generator = Generator(resolution, channels, z_dim=8, w_dim=8, mapping_layers=2)
    encoder = create_encoder(resolution, "base", 8)
    encoder.latents.fit(generator, 1000)
    save_bundle(path, generator, encoder, NOTES)


def test_an_encoder_to_start_from_keeps_its_weights_and_takes_the_new_statistics(folder) -> None:
    small_bundle(folder / "old")
    module = EncoderTraining(str(folder / "generator.safetensors"), init_encoder=str(folder / "old"), weight_identity=0)
    old, fresh = load_bundle(folder / "old").encoder.state_dict(), LatentStatistics(8)
    fresh.fit(load_generator(folder / "generator.safetensors"))
    for encoder in (module.encoder, module.encoder_ema):
        state = encoder.state_dict()
        assert all(torch.equal(state[name], old[name]) for name in old if not name.startswith("latents."))
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(state[f"latents.{name}"], tensor)
            assert not torch.equal(tensor, old[f"latents.{name}"])


def test_an_encoder_of_another_shape_is_refused(folder) -> None:
    small_bundle(folder / "old", 64)
    with pytest.raises(ValueError, match="init_encoder"):
        EncoderTraining(str(folder / "generator.safetensors"), init_encoder=str(folder / "old"), weight_identity=0)
