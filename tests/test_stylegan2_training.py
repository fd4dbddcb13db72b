"""The training of the prior through the real command line: it runs, resumes exactly, and its switches switch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback
from small_runs import PixelFeatures, write_faces
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from models import load_generator
from train import main
from training.stylegan2 import StyleGAN2Training

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "stylegan2_64.yaml"
FACES, BATCH, STEPS = 24, 4, 14  # six batches an epoch: the run ends in its third epoch
METRIC = "fd_pixels"


class Killed(Exception):
    """What the machine does to a run."""


class Recorder(Callback):
    """Writes down what every step logged, and the generator; stops hard before step `kill_at`."""

    def __init__(self, kill_at: int = -1) -> None:
        self.kill_at = kill_at
        self.steps: dict[int, dict[str, float]] = {}
        self.generators: dict[int, Tensor] = {}
        self.old_blocks: dict[int, Tensor] = {}
        self.new_blocks: dict[int, Tensor] = {}
        self.learning_rates: dict[int, list[float]] = {}
        self.final: dict[str, Tensor] = {}
        Recorder.last = self

    last: Recorder

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if trainer.global_step == self.kill_at:
            raise Killed

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
        logged.pop("images_per_second", None)
        self.steps[trainer.global_step] = {**logged, "batch": batch.double().mean().item()}
        self.generators[trainer.global_step] = flat(module.generator)
        old = [module.generator.mapping, *module.generator.synthesis.blocks[:-1]]
        self.old_blocks[trainer.global_step] = torch.cat([flat(network) for network in old])
        self.new_blocks[trainer.global_step] = flat(module.generator.synthesis.blocks[-1])
        self.learning_rates[trainer.global_step] = [
            group["lr"] for adam in trainer.optimizers for group in adam.param_groups
        ]

    def on_validation_end(self, trainer, module) -> None:
        self.distance = trainer.callback_metrics[METRIC].item()

    def on_train_end(self, trainer, module) -> None:
        self.final = {name: value.clone() for name, value in module.state_dict().items()}


def flat(network: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """A zip of random pictures."""
    path = tmp_path_factory.mktemp("faces") / "faces.zip"
    write_faces(path, FACES, grain=32)
    return path


def pixel_metric(name: str = "auto") -> tuple[str, FrechetInceptionDistance]:
    return METRIC, FrechetInceptionDistance(feature=PixelFeatures(), reset_real_features=False)


def run(
    faces: Path, folder: Path, *overrides: str, kill_at: int = -1, save_every: int = 100, command: str = "fit"
) -> Recorder:
    """Trains tiny networks by the real recipe in `folder`; all paths of the recipe are relative to it."""
    recorder = {"class_path": f"{__name__}.Recorder", "init_args": {"kill_at": kill_at}}
    metric = {"class_path": "evaluation.frechet.FrechetDistance", "init_args": {"samples": 16}}
    arguments = {
        "model.resolution": 32, "model.channels": [8, 8, 8, 6], "model.z_dim": 16, "model.w_dim": 16,
        "model.mapping_layers": 2, "model.compile": False, "model.path_length_every": 4,
        "model.r1_every": 3, "model.augment_target": -2.0, "model.decay_steps": 8,
        "model.export_to": str(folder / "generator.safetensors"),
        "data.train": str(faces), "data.val": str(faces), "data.resolution": 32, "data.batch_size": BATCH,
        "trainer.accelerator": "cpu", "trainer.max_steps": STEPS, "trainer.val_check_interval": 4,
        "trainer.log_every_n_steps": 1, "trainer.enable_progress_bar": False, "trainer.enable_model_summary": False,
        "trainer.callbacks": [metric, recorder], "checkpoint.every_n_steps": save_every,
    }  # fmt: skip
    precision = torch.get_float32_matmul_precision()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("evaluation.frechet.frechet_metric", pixel_metric)
        patch.setattr("sys.argv", ["train.py"])
        written = {name: v if isinstance(v, str) else json.dumps(v) for name, v in arguments.items()}
        try:
            main([command, "--config", str(RECIPE), *(f"--{name}={v}" for name, v in written.items()), *overrides])
        finally:
            torch.set_float32_matmul_precision(precision)
    return Recorder.last


@pytest.fixture(scope="module")
def uninterrupted(faces, tmp_path_factory) -> tuple[Recorder, Path]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run(faces, folder), folder


# --- the recipe runs ---


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_recipe_runs_through_one_step_and_one_validation(faces, tmp_path, precision) -> None:
    recorder = run(faces, tmp_path, "--trainer.fast_dev_run=1", f"--trainer.precision={precision}")
    assert list(recorder.steps) == [1]
    assert np.isfinite(list(recorder.steps[1].values())).all()
    assert {"loss/generator", "loss/discriminator", "loss/r1", "path_length"} <= recorder.steps[1].keys()


def test_every_face_is_seen_once_an_epoch_in_a_new_order(uninterrupted) -> None:
    means = [uninterrupted[0].steps[step]["batch"] for step in range(1, 13)]
    assert np.mean(means[:6]) == pytest.approx(np.mean(means[6:]), abs=1e-9)  # the same faces in both epochs
    assert means[:6] != means[6:]


# --- exact resume ---


@pytest.mark.parametrize(
    ("saved_at", "killed_at", "workers"),
    [
        pytest.param(2, 3, 0, id="middle of the first epoch"),
        pytest.param(4, 5, 0, id="at a validation"),
        pytest.param(6, 7, 0, id="end of an epoch"),
        pytest.param(6, 6, 0, id="end of an epoch, before the next begins"),
        pytest.param(6, 7, 1, id="end of an epoch, with a worker"),
        pytest.param(9, 11, 0, id="middle of the second epoch"),
        pytest.param(9, 11, 1, id="middle of the second epoch, with a worker"),
        pytest.param(12, 13, 0, id="end of the second epoch, at a validation"),
    ],
)
def test_killed_run_goes_on_exactly(faces, tmp_path, uninterrupted, saved_at, killed_at, workers) -> None:
    options = (f"--data.num_workers={workers}",)
    with pytest.raises(Killed):
        run(faces, tmp_path, *options, kill_at=killed_at, save_every=saved_at)
    assert max(Recorder.last.steps) == killed_at
    resumed = run(faces, tmp_path, *options, save_every=saved_at)

    expected = uninterrupted[0]
    assert list(resumed.steps) == list(range(saved_at + 1, STEPS + 1))
    for step, logged in resumed.steps.items():
        wanted = {name: value for name, value in expected.steps[step].items() if name in logged}
        assert {"loss/generator", "loss/discriminator", "augment/p", "images_seen", "batch"} <= logged.keys()
        assert logged == wanted, f"step {step}"
    assert resumed.learning_rates[STEPS] == expected.learning_rates[STEPS]
    assert resumed.final.keys() == expected.final.keys()
    for name, tensor in expected.final.items():
        assert torch.equal(resumed.final[name], tensor), name


# --- switches ---


def test_generator_stays_while_the_discriminator_warms_up(faces, tmp_path) -> None:
    recorder = run(faces, tmp_path, "--model.warmup_steps=4", "--trainer.max_steps=6", "--trainer.limit_val_batches=0")
    weights = recorder.generators
    assert all(torch.equal(weights[step], weights[1]) for step in (2, 3, 4))
    assert not torch.equal(weights[5], weights[4])
    assert not torch.equal(weights[6], weights[5])
    assert "loss/generator" not in recorder.steps[4] and "loss/generator" in recorder.steps[5]
    assert list(recorder.steps) == list(range(1, 7))  # frozen steps count as steps
    discriminator = [recorder.steps[step]["loss/discriminator"] for step in range(1, 5)]
    assert len(set(discriminator)) == 4


def test_old_blocks_stay_and_then_learn_at_a_smaller_rate(faces, tmp_path) -> None:
    recorder = run(
        faces, tmp_path, "--model.freeze_below=32", "--model.freeze_steps=3", "--model.rate_below=0.125",
        "--trainer.max_steps=5", "--trainer.limit_val_batches=0", "--model.decay_steps=0",
    )  # fmt: skip
    old, new = recorder.old_blocks, recorder.new_blocks
    assert torch.equal(old[1], old[3]) and not torch.equal(new[1], new[3])
    assert not torch.equal(old[4], old[3]) and not torch.equal(old[5], old[4])
    new_rate, old_rate, *_ = recorder.learning_rates[5]
    assert old_rate == new_rate / 8
    assert "path_length" not in recorder.steps[1] and "path_length" in recorder.steps[5]


def test_learning_rate_falls_linearly_to_almost_zero(uninterrupted) -> None:
    rates = np.array([uninterrupted[0].learning_rates[step] for step in range(1, STEPS + 1)])  # (steps, networks)
    factors = rates / rates[0]
    expected = np.minimum(1.0, (STEPS - np.arange(STEPS)) / 8)
    np.testing.assert_allclose(factors, np.stack([expected, expected], axis=1), rtol=1e-6)
    assert rates[0, 0] == pytest.approx(1e-3 * 4 / 5) and rates[0, 1] == pytest.approx(2e-3 * 3 / 4)  # lazy


def test_learning_rate_stays_without_decay(faces, tmp_path) -> None:
    recorder = run(
        faces, tmp_path, "--model.decay_steps=0", "--trainer.max_steps=3", "--model.path_length_weight=0",
        "--trainer.limit_val_batches=0",
    )  # fmt: skip
    rates = list(recorder.learning_rates.values())
    assert rates[0] == rates[1] == rates[2]
    assert rates[0][0] == 1e-3  # no lazy regulariser on the generator
    # without its weight no path length is measured
    assert not any("path_length" in name for logged in recorder.steps.values() for name in logged)
    assert recorder.final["path_mean"] == 0


def test_path_length_is_measured_when_it_is_switched_on(uninterrupted) -> None:
    recorder, _ = uninterrupted
    assert recorder.steps[1]["path_length"] > 0 and "loss/path_length" not in recorder.steps[1]
    assert recorder.steps[5]["loss/path_length"] > 0
    assert recorder.final["path_mean"] > 0


# --- results ---


def test_exported_generator_is_the_average(faces, tmp_path) -> None:
    recorder = run(faces, tmp_path, "--trainer.max_steps=4")
    exported = load_generator(tmp_path / "generator.safetensors")
    assert exported.config == {
        "resolution": 32, "channels": [8, 8, 8, 6], "z_dim": 16, "w_dim": 16, "mapping_layers": 2,
        "conv_clamp": None,
    }  # fmt: skip
    for name, tensor in exported.state_dict().items():
        torch.testing.assert_close(tensor, recorder.final[f"generator_ema.{name}"].half().float(), rtol=0, atol=0)
    weight = "synthesis.b4.conv1.weight"
    assert not torch.equal(recorder.final[f"generator_ema.{weight}"], recorder.final[f"generator.{weight}"])
    assert torch.equal(recorder.final["generator_ema.mapping.w_avg"], recorder.final["generator.mapping.w_avg"])
    short = load_generator(tmp_path / "generator_short.safetensors").state_dict()[weight]
    torch.testing.assert_close(short, recorder.final[f"generator_ema_short.{weight}"].half().float(), rtol=0, atol=0)


def test_validation_alone_measures_the_last_checkpoint(faces, tmp_path) -> None:
    trained = run(faces, tmp_path, "--trainer.max_steps=4", save_every=4)
    assert trained.distance > 0
    assert run(faces, tmp_path, command="validate").distance == trained.distance


@pytest.mark.parametrize("logger", ["lightning.pytorch.loggers.CSVLogger", None])
def test_samples_are_drawn_only_where_a_logger_takes_pictures(faces, tmp_path, logger) -> None:
    settings = json.dumps(logger and {"class_path": logger, "init_args": {"save_dir": "logs"}})
    recorder = run(faces, tmp_path, "--trainer.max_steps=4", f"--trainer.logger={settings}")
    assert recorder.distance > 0


def test_training_starts_from_given_weights(uninterrupted) -> None:
    _, folder = uninterrupted
    path = folder / "generator.safetensors"
    module = StyleGAN2Training(32, (8, 8, 8, 6), 16, 16, 2, init_generator=str(path))
    for name, tensor in load_generator(path).state_dict().items():
        assert torch.equal(module.generator.state_dict()[name], tensor)
        assert torch.equal(module.generator_ema.state_dict()[name], tensor)
    with pytest.raises(ValueError, match="channels"):
        StyleGAN2Training(32, (8, 8, 8, 8), 16, 16, 2, init_generator=str(path))
