"""The generator's step is one and the same on one process, on two, and in parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback
from small_runs import CHANNELS, D, PixelDistance, write_bundle, write_faces
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH = 5, 8
RESUMED_AT = 3


class Ends(Callback):
    """Writes down what every process logged and ends with."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def setup(self, trainer, module, stage) -> None:
        self.start = {name: tensor.clone() for name, tensor in module.state_dict().items()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.steps.append({name: value for name, value in logged.items() if name != "images_per_second"})

    def on_train_end(self, trainer, module) -> None:
        state = {"start": self.start, "state": module.state_dict(), "steps": self.steps, "step": trainer.global_step}
        torch.save(state, f"{trainer.default_root_dir}/rank{trainer.global_rank}.pt")


class TinyFeatures(torch.nn.Module):
    """In place of SqueezeNet."""

    widths = (3, 3, 3)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.nn.functional.avg_pool2d(images, size) for size in (2, 4, 8))


def child() -> None:
    """Trains, in a process of its own: nothing here has used a thread before."""
    import training.reconstruction
    import training.stylegan2
    from train import main

    torch.set_num_threads(1)
    training.stylegan2.SqueezeNetFeatures = TinyFeatures
    training.reconstruction.LPIPS = PixelDistance
    for recipe in sys.argv[1:]:
        main(["fit", "--config", recipe])


def write_recipe(folder: Path, name: str, processes: int = 1, parts: int = 1, steps: int = STEPS) -> str:
    checkpoint = {"dirpath": f"{name}/checkpoints", "every_n_train_steps": RESUMED_AT, "save_last": True}
    recipe = {
        "model": {
            "class_path": "training.stylegan2.StyleGAN2Training",
            "init_args": {
                "resolution": 32, "channels": list(CHANNELS), "z_dim": D, "w_dim": D, "mapping_layers": 2,
                "path_length_every": 2, "r1_every": 3, "augment_target": -2.0, "feature_weight": 0.5,
                "reconstruction_weight": 1.0, "reconstruction_bundle": "bundle", "reconstruction_share": 0.5,
                "reconstruction_steps": 1,
                "micro_batches": parts, "compile": False,
            },
        },
        "data": {
            "class_path": "data.datamodule.FaceData",
            "init_args": {
                "train": "faces.zip", "val": "faces.zip", "resolution": 32, "batch_size": BATCH // processes,
            },
        },
        "trainer": {
            "accelerator": "cpu", "devices": processes, "strategy": "ddp_fork" if processes > 1 else "auto",
            "max_steps": steps, "max_epochs": -1, "enable_progress_bar": False, "enable_model_summary": False,
            "logger": False, "num_sanity_val_steps": 0, "limit_val_batches": 0, "log_every_n_steps": 1,
            "default_root_dir": name,
            "callbacks": [
                {"class_path": "test_stylegan2_distributed.Ends", "init_args": {}},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint},
            ],
        },
        "ckpt_path": "last",
    }  # fmt: skip
    path = folder / f"{name}_{steps}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    (folder / name).mkdir(exist_ok=True)
    return path.name


def train(folder: Path, *recipes: str) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "import test_stylegan2_distributed as t; t.child()", *recipes]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    write_faces(folder / "faces.zip")
    write_bundle(folder / "bundle")
    train(folder, write_recipe(folder, "one"))
    return folder


@pytest.mark.parametrize(("name", "processes", "parts"), [("parts", 1, 2), ("two", 2, 1), ("two_resumed", 2, 1)])
def test_step_is_the_same(folder, name, processes, parts) -> None:
    if name == "two_resumed":
        train(folder, write_recipe(folder, name, processes, parts, RESUMED_AT))
    train(folder, write_recipe(folder, name, processes, parts))
    expected = torch.load(folder / "one" / "rank0.pt")
    got = [torch.load(folder / name / f"rank{rank}.pt") for rank in range(processes)]
    # At first the generator learns from reconstructions alone.
    assert ["loss/generator" in logged for logged in expected["steps"]] == [False] + [True] * (STEPS - 1)
    for found in got:
        assert found["step"] == STEPS
        for mine, theirs in zip(found["steps"], expected["steps"][-len(found["steps"]) :], strict=True):
            assert {"loss/discriminator_features", "reconstruction/lpips", "augment/p"} <= mine.keys()
            # Adam makes much of the last bits of a gradient.
            assert mine == pytest.approx({key: theirs[key] for key in mine}, rel=3e-3, abs=3e-4)
        for key, tensor in expected["state"].items():
            moved = (tensor - expected["start"][key]).double().norm()
            assert (found["state"][key] - tensor).double().norm() <= 0.05 * moved, key
            assert torch.equal(found["state"][key], got[0]["state"][key]), key
    if name == "two_resumed":
        straight = torch.load(folder / "two" / "rank0.pt")["state"]
        assert all(torch.equal(got[0]["state"][key], tensor) for key, tensor in straight.items())
