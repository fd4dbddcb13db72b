"""A step of each training by Lightning is the same on two processes that torchrun started, and in micro-batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback
from small_runs import NOTES, PixelDistance, write_bundle, write_faces
from torch import nn

from data.labels import ATTRIBUTES

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH = 3, 8


class Ends(Callback):
    """Writes down gradients and weights of every process. Batch normalisation, which sees one batch, is kept still."""

    def __init__(self) -> None:
        self.gradients = []

    def on_train_batch_start(self, trainer, module, *args) -> None:
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()

    def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
        used = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(used).clone())

    def on_train_end(self, trainer, module) -> None:
        ends = {"gradients": self.gradients, "weights": [p for p in module.parameters() if p.requires_grad]}
        torch.save(ends, f"{trainer.default_root_dir}/rank{trainer.global_rank}.pt")


def child() -> None:
    """Trains, in a process of its own."""
    import training.encoder
    from train import main

    training.encoder.LPIPS = PixelDistance
    for recipe in sys.argv[1:]:
        main(["fit", "--config", recipe])


FACES = {"train": "faces.zip", "val": "faces.zip", "resolution": 32, "val_limit": 4}
MODELS = {
    "encoder": {
        "class_path": "training.encoder.EncoderTraining",
        "init_args": {
            "generator": "old/generator.safetensors", "variant": "propulse",
            "architecture": {"backbone": "test_resnet", "width": 8}, "checkpointed": 1,
            "sizes_per_batch": 4, "compile": False, "weight_identity": 0.0, "warmup_steps": 1, "val_lr": [8],
            "export_to": "bundle", "bundle_info": NOTES,
        },
    },
    "flow": {
        "class_path": "training.flow.FlowTraining",
        "init_args": {"generator": "old/generator.safetensors", "blocks": 2, "hidden": 8, "export_to": "flow"},
    },
    "attributes": {
        "class_path": "training.attributes.AttributeTraining",
        "init_args": {"resolution": 32, "backbone": "test_resnet", "warmup_steps": 1, "export_to": "attributes"},
    },
}  # fmt: skip
DATA = {
    "encoder": {"class_path": "data.datamodule.FaceData", "init_args": FACES},
    "flow": {"class_path": "data.datamodule.Steps", "init_args": {"val_batches": 2}},
    "attributes": {"class_path": "data.labels.LabelledFaceData", "init_args": {**FACES, "labels": "labels.csv"}},
}
WAYS = {"one": (1, 1), "parts": (1, 4), "two": (2, 1)}  # processes and micro-batches


def write_recipe(folder: Path, training: str, way: str) -> str:
    (processes, micro_batches), name, data = WAYS[way], f"{training}-{way}", DATA[training]
    batch = {"batch_size": BATCH // processes // micro_batches}
    recipe = {
        "model": MODELS[training],
        "data": {**data, "init_args": {**data["init_args"], **batch}},
        "trainer": {
            "accelerator": "cpu", "devices": "auto", "sync_batchnorm": True, "max_steps": STEPS, "max_epochs": -1,
            "accumulate_grad_batches": micro_batches, "enable_progress_bar": False, "enable_model_summary": False,
            "logger": False, "num_sanity_val_steps": 0, "val_check_interval": 2 * micro_batches,
            "check_val_every_n_epoch": None, "default_root_dir": name,
            "callbacks": [{"class_path": "test_distributed.Ends", "init_args": {}}],
        },
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path.name


def train(folder: Path, launcher: list[str], *recipes: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(ROOT / "tests" / "test_distributed.py"), *recipes]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    write_faces(folder / "faces.zip")
    write_bundle(folder / "old")
    rows = (f"{i:02}.png,{','.join('10'[(i + j) % 3 > 0] for j in range(len(ATTRIBUTES)))}" for i in range(20))
    (folder / "labels.csv").write_text("\n".join([",".join(("file", *ATTRIBUTES)), *rows]))
    for launcher, ways in (([], ("one", "parts")), (TORCHRUN, ("two",))):
        done = train(folder, launcher, *(write_recipe(folder, name, way) for name in MODELS for way in ways))
        assert done.returncode == 0, done.stderr[:6000]
    return folder


@pytest.mark.parametrize("training", MODELS)
@pytest.mark.parametrize("way", ["parts", "two"])
def test_step_is_the_same(folder, training, way) -> None:
    expected = torch.load(folder / f"{training}-one" / "rank0.pt")
    found = [torch.load(folder / f"{training}-{way}" / f"rank{rank}.pt") for rank in range(WAYS[way][0])]
    for own in found:
        # Adam makes much of the last bits of a gradient, so only the first one is the same.
        for step, (a, b) in enumerate(zip(own["gradients"], expected["gradients"], strict=True)):
            assert (a - b).norm() <= (0.1 if step else 1e-3) * b.norm()
        assert all(map(torch.equal, own["weights"], found[0]["weights"]))
    assert len(expected["gradients"]) == STEPS and expected["gradients"][0].norm() > 0
    assert (folder / f"{training}-{way}" / MODELS[training]["init_args"]["export_to"]).exists()


def test_a_recipe_for_one_device_is_refused_by_name(folder) -> None:
    recipe = yaml.safe_load((folder / "encoder-two.yaml").read_text())
    recipe["trainer"]["devices"] = 1
    (folder / "wrong.yaml").write_text(yaml.safe_dump(recipe))
    done = train(folder, TORCHRUN, "wrong.yaml")
    assert done.returncode != 0 and "trainer.devices 2, as torchrun started so many" in done.stderr


if __name__ == "__main__":
    child()
