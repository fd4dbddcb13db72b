"""Training the feedback and the distribution of a bundle's encoder: they learn, resume exactly, touch nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_runs import PixelDistance, Record, train, write_bundle, write_faces

from models.adapted import additions
from models.bundle import load_bundle
from training.feedback import FeedbackTraining
from training.posterior import PosteriorTraining

FEEDBACK = "training.feedback.FeedbackTraining"
POSTERIOR = "training.posterior.PosteriorTraining"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_faces(tmp_path / "faces.zip")
    write_bundle(tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.feedback.LPIPS", PixelDistance)
    monkeypatch.setattr("sys.argv", ["train.py"])
    return tmp_path


def train_feedback(folder, monkeypatch, record: Record, run: str, steps: int, save_every: int = 4, **model) -> None:
    settings = {
        "bundle": str(folder / "old"), "passes": 2, "rank": 20, "sizes_per_batch": 2, "compile": False,
        "warmup_steps": 1, "val_lr": [8], "val_passes": 1, "learning_rate": 3e-4, **model,
    }  # fmt: skip
    often = {"val_check_interval": 2, "check_val_every_n_epoch": None}
    network = {"class_path": FEEDBACK, "init_args": settings}
    train(folder, monkeypatch, record, run, steps, network, trainer=often, save_every=save_every)


def train_posterior(folder, monkeypatch, record: Record, run: str, steps: int, **model) -> None:
    settings = {
        "bundle": str(folder / "old"), "warmup_steps": 1, "coverage_samples": 10, "photos": str(folder / "faces.zip"),
        **model,
    }  # fmt: skip
    pairs = {"bundle": str(folder / "old"), "count": 64, "val_count": 8, "batch_size": 16, "cache": "pairs.safetensors"}
    data = {"class_path": "training.pairs.PairData", "init_args": pairs}
    epochs = {"check_val_every_n_epoch": 1}
    network = {"class_path": POSTERIOR, "init_args": settings}
    train(folder, monkeypatch, record, run, steps, network, data, epochs, save_every=2)


def test_feedback_resumes_exactly_and_makes_a_bundle(folder, monkeypatch):
    metric = "downscaling_error_2"
    whole, before, after = Record(metric=metric), Record(10, metric), Record(metric=metric)
    means = {"weight_means": 10.0}  # run along, so that a resumed training needs them
    train_feedback(folder, monkeypatch, whole, "whole", 16, export_to=str(folder / "new"), export_passes=2, **means)
    with pytest.raises(RuntimeError, match="killed"):
        train_feedback(folder, monkeypatch, before, "killed", 16, **means)
    train_feedback(folder, monkeypatch, after, "killed", 16, **means)  # goes on from step 8, which is batch 4
    assert before.losses == whole.losses[:5]
    assert after.losses == whole.losses[4:]
    old, new = load_bundle(folder / "old"), load_bundle(folder / "new")
    state = new.encoder.state_dict()
    for name, tensor in old.encoder.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert new.encoder.config["feedback"] == 2 and new.encoder.latents.directions.any()
    assert new.encode(torch.zeros(1, 3, 8, 8), 2).isfinite().all()


def test_feedback_calibrates_the_candidates_of_a_posterior_anew(folder, monkeypatch):
    train_posterior(folder, monkeypatch, Record(), "fit", 4, export_to=str(folder / "fitted"))
    old = load_bundle(folder / "fitted").encoder
    monkeypatch.setattr("training.feedback.calibrate_spread", lambda encoder, *_, **__: encoder.spread.fill_(0.25))
    settings = {"bundle": str(folder / "fitted"), "export_to": str(folder / "new")}
    train_feedback(folder, monkeypatch, Record(metric="downscaling_error_2"), "run", 4, **settings)
    new = load_bundle(folder / "new").encoder
    assert new.config["posterior"] == old.config["posterior"] and new.config["feedback"]
    assert (new.spread == 0.25).all() and not (old.spread == 0.25).any()
    for name, tensor in old.posterior.state_dict().items():
        torch.testing.assert_close(new.posterior.state_dict()[name], tensor)


def test_additions_for_small_faces_leave_all_else_as_it_is(folder, monkeypatch):
    """They resume exactly, their means included; × 4 and larger faces get the codes that they got before."""
    metric = "downscaling_error_2"
    train_feedback(folder, monkeypatch, Record(metric=metric), "first", 4, export_to=str(folder / "fed"))
    settings = {
        "bundle": str(folder / "fed"), "small_rank": 2, "largest_lr": 6, "weight_means": 10.0, "weight_parts": 10.0,
        "candidates_lpips": 0.5, "learning_rate": 1e-2,
    }  # fmt: skip
    whole, before, after = Record(metric=metric), Record(10, metric), Record(metric=metric)
    train_feedback(folder, monkeypatch, whole, "whole", 16, export_to=str(folder / "new"), **settings)
    with pytest.raises(RuntimeError, match="killed"):
        train_feedback(folder, monkeypatch, before, "killed", 16, **settings)
    train_feedback(folder, monkeypatch, after, "killed", 16, **settings)
    assert before.losses == whole.losses[:5] and after.losses == whole.losses[4:]
    old, new = load_bundle(folder / "fed"), load_bundle(folder / "new")
    assert new.encoder.config == {**old.encoder.config, "feedback_small_rank": 2}
    state = new.encoder.state_dict()
    for name, tensor in old.encoder.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for size, same in ((16, True), (8, True), (4, False)):
        lr = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
        images, ws = torch.zeros(2, 3, 32, 32), old.encoder(lr)[:, 0]
        assert torch.equal(new.encoder.correct(lr, images, ws), old.encoder.correct(lr, images, ws)) == same


def test_additions_need_feedback_to_add_to(folder):
    with pytest.raises(ValueError, match="one without feedback"):
        FeedbackTraining(str(folder / "old"), small_rank=2)
    write_bundle(folder / "fed", feedback=1, rank=5, feedback_small_rank=3)
    with pytest.raises(ValueError, match="some of rank 3"):
        FeedbackTraining(str(folder / "fed"), small_rank=2)


def test_a_network_that_is_trained_on_drops_its_additions(folder):
    write_bundle(folder / "fed", feedback=1, rank=5, feedback_small_rank=3)
    before, made = load_bundle(folder / "fed").encoder, FeedbackTraining(str(folder / "fed"), export_passes=1)
    assert made.encoder.config == {n: v for n, v in before.config.items() if n != "feedback_small_rank"}
    assert not additions(made.encoder.feedback) and additions(before.feedback)
    lr, images = torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 32, 32)
    codes = before(lr)[:, 0]
    assert torch.equal(made.encoder.correct(lr, images, codes), before.correct(lr, images, codes))


def test_additions_leave_the_spread_of_larger_faces(folder, monkeypatch):
    def calibrate(encoder, *_, below):
        encoder.spread[encoder.spread_sizes < below] = 0.25

    write_bundle(folder / "fed", feedback=1, rank=5, posterior="gaussian")
    monkeypatch.setattr("training.feedback.calibrate_spread", calibrate)
    settings = {"bundle": str(folder / "fed"), "export_to": str(folder / "new"), "small_rank": 2, "largest_lr": 6}
    train_feedback(folder, monkeypatch, Record(metric="downscaling_error_2"), "run", 4, **settings)
    old, new = load_bundle(folder / "fed").encoder, load_bundle(folder / "new").encoder
    assert new.spread_sizes.tolist() == [4, 8, 16, 32]
    assert (new.spread[0] == 0.25).all() and torch.equal(new.spread[1:], old.spread[1:])


def test_feedback_learns(folder, monkeypatch):
    """The faces' errors after the second pass fall below those that the encoder starts with."""
    record = Record(metric="downscaling_error_2")
    train_feedback(folder, monkeypatch, record, "run", 120, 1000, often=[8], often_share=1.0, learning_rate=2e-3)
    assert np.mean(record.losses[-5:]) < 0.8 * np.mean(record.losses[:2])


def test_feedback_refuses_to_go_on_with_another_bundle(folder, monkeypatch):
    train_feedback(folder, monkeypatch, Record(metric="downscaling_error_2"), "run", 4)
    write_bundle(folder / "old", canvas=32)
    info = (folder / "old" / "bundle.json").read_text().replace('"licence": "l"', '"licence": "m"')
    (folder / "old" / "bundle.json").write_text(info)
    with pytest.raises(ValueError, match="has changed"):
        train_feedback(folder, monkeypatch, Record(metric="downscaling_error_2"), "run", 8)


def test_a_posterior_is_fitted_without_the_bottleneck_of_the_one_before(folder):
    write_bundle(folder / "narrow", posterior="gaussian", context_rank=3)
    made = PosteriorTraining(str(folder / "narrow"), kind="flow")
    assert isinstance(made.posterior.network.first, torch.nn.Linear)
    assert "context_rank" not in made._encoder[0].config


@pytest.mark.parametrize("kind", ["gaussian", "flow"])
def test_the_posterior_resumes_exactly_and_makes_a_bundle(folder, monkeypatch, kind):
    whole, before, after = Record(), Record(stop_after=6), Record()
    train_posterior(folder, monkeypatch, whole, "whole", 10, kind=kind, export_to=str(folder / "new"))
    with pytest.raises(RuntimeError, match="killed"):
        train_posterior(folder, monkeypatch, before, "killed", 10, kind=kind)
    train_posterior(folder, monkeypatch, after, "killed", 10, kind=kind)  # goes on from step 4
    assert after.losses == whole.losses[4:]
    new = load_bundle(folder / "new")
    assert new.encoder.config["posterior"] == kind
    lr = torch.zeros(1, 3, 8, 8)
    assert torch.equal(new.encode(lr), load_bundle(folder / "old").encode(lr))
    assert new.encode(lr, 3, np.random.default_rng(0)).shape == (1, 3, 8, 8)


def test_pairs_are_kept_and_made_anew_for_another_bundle(folder):
    from training.pairs import PairData

    def pairs(**settings):
        data = PairData(str(folder / "old"), 8, 4, cache=str(folder / "pairs.safetensors"), **settings)
        data.setup("fit")
        return data.pairs["train"]

    first, again, other = pairs(), pairs(), pairs(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.u, other.u)
    assert first.context.shape[0] == 8 and first.u.shape == (8, 8) and (first.size >= 4).all()
