"""Every recipe in configs/ runs through the real command line: one step and one validation with tiny settings."""

from __future__ import annotations

import json
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning import Callback
from PIL import Image
from small_runs import write_bundle
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from data.labels import ATTRIBUTES
from models.checkpoints import save_generator
from models.generator import Generator
from models.pretrained import weight_folders
from train import main

RECIPES = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
FACES = 6

NARROW = {"widths": [16, 16, 24, 32, 16]}  # of pSp's encoder
TINY = {
    "model.generator": "{folder}/generator.safetensors", "model.sizes_per_batch": 2, "model.compile": False,
    "model.export_to": None,
}  # fmt: skip
LARGE = {"model.loss_size": 32, "model.largest_lr": 32, "data.split": None, "data.num_workers": 0}

# What makes a recipe small; {folder} stands for a temporary folder with faces.zip and generator.safetensors (32 px).
OVERRIDES: dict[str, dict[str, object]] = {
    "stylegan2_64": {
        "model.resolution": 32, "model.channels": [8, 8, 6, 4], "model.z_dim": 8, "model.w_dim": 8,
        "model.mapping_layers": 2, "model.metric_samples": 4, "model.compile": False,
    },
    "stylegan2_128": {
        "model.resolution": 32, "model.channels": [8, 8, 6, 4], "model.z_dim": 8, "model.w_dim": 8,
        "model.mapping_layers": 2, "model.metric_samples": 4, "model.compile": False, "model.freeze_below": 32,
        "model.micro_batches": 2,
        "model.init_generator": "{folder}/generator.safetensors",
    },
    "encoder_64": TINY,
    "encoder_256": {**TINY, **LARGE, "model.val_lr": [8], "model.loss_size": None},
    "encoder_1024": {**TINY, **LARGE, "model.architecture": {"canvas": 32}},
    "propulse_1024": {
        **TINY, **LARGE, "model.architecture": {"canvas": 32, "base": True}, "model.smallest_lr": 8,
        "model.largest_lr": 16, "model.often": [8, 16],
    },
    "psp_64": {**TINY, "model.architecture": NARROW},
    "psp_1024": {
        **TINY, **LARGE, "model.architecture": NARROW, "model.init_backbone": None, "model.often": [8, 16, 32],
    },
    "feedback_64": {
        "model.bundle": "{folder}/bundle", "model.passes": 1, "model.rank": 20, "model.sizes_per_batch": 2,
        "model.compile": False, "model.val_lr": [8], "model.val_passes": 1, "model.export_to": None,
    },
    "feedback_small_64": {
        "model.bundle": "{folder}/fed", "model.passes": 1, "model.sizes_per_batch": 2, "model.compile": False,
        "model.val_lr": [8], "model.val_passes": 1, "model.export_to": None,
    },
    "posterior_64": {
        "model.bundle": "{folder}/bundle", "data.bundle": "{folder}/bundle", "data.count": 16, "data.val_count": 8,
        "data.batch_size": 8, "data.cache": None, "model.coverage_samples": 10, "model.export_to": None,
        "trainer.check_val_every_n_epoch": 1,
    },
    "flow_64": {
        "model.generator": "{folder}/generator.safetensors", "model.hidden": 8, "data.batch_size": 4,
        "data.val_batches": 1,
    },
    **{
        f"attributes_{size}": {
            "model.resolution": 32, "model.backbone": "test_resnet", "model.options": None, "data.num_workers": 0,
            "data.labels": "{folder}/labels.csv",
        }
        for size in (64, 224)
    },
}  # fmt: skip
FACELESS = ("flow_64", "posterior_64")  # recipes that need no faces
# Weights of other people's networks that a recipe's losses need.
LPIPS_AND_IDENTITY = ("squeezenet1_1-b8a52dc0.pth", "mobilefacenet_y1.pt")
WEIGHTS = {
    **dict.fromkeys(
        ("encoder_64", "encoder_256", "encoder_1024", "psp_64", "psp_1024", "propulse_1024"), LPIPS_AND_IDENTITY
    ),
    **dict.fromkeys(("stylegan2_128", "feedback_64", "feedback_small_64"), LPIPS_AND_IDENTITY[:1]),
}


class Counter(Callback):
    """Counts what a run did."""

    counts: dict[str, int] = {}

    def on_train_batch_end(self, *args) -> None:
        self.counts["training"] = self.counts.get("training", 0) + 1

    def on_validation_batch_end(self, *args) -> None:
        self.counts["validation"] = self.counts.get("validation", 0) + 1


class PixelFeatures(nn.Module):
    """Stands in for the network of the Fréchet distance, so that no weights are needed."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with faces and a generator, in which the recipe's relative paths end."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for i in range(FACES):
            with BytesIO() as buffer:
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "png")
                archive.writestr(f"{i}.png", buffer.getvalue())
    rows = [f"{i}.jpg" + ",1" * len(ATTRIBUTES) for i in range(FACES)]
    (tmp_path / "labels.csv").write_text("\n".join([",".join(("file", *ATTRIBUTES)), *rows]))
    save_generator(Generator(32, (8, 8, 6, 4), z_dim=8, w_dim=8, mapping_layers=2), tmp_path / "generator.safetensors")
    write_bundle(tmp_path / "bundle")
    write_bundle(tmp_path / "fed", feedback=1, rank=20)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    metric = FrechetInceptionDistance(feature=PixelFeatures(), reset_real_features=False)
    monkeypatch.setattr("training.stylegan2.frechet_metric", lambda name: ("fd_pixels", metric))
    precision = torch.get_float32_matmul_precision()
    yield tmp_path
    torch.set_float32_matmul_precision(precision)


def test_there_are_recipes_and_all_are_covered() -> None:
    assert RECIPES and {recipe.stem for recipe in RECIPES} == OVERRIDES.keys()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe, folder, monkeypatch) -> None:
    for name in WEIGHTS.get(recipe.stem, ()):
        if not any((place / name).is_file() for place in weight_folders()):
            pytest.skip(f"the recipe's losses need {name}, which is not on this machine")
    monkeypatch.setattr(Counter, "counts", {})
    faces = {
        "data.train": "{folder}/faces.zip", "data.val": "{folder}/faces.zip", "data.resolution": 32,
        "data.batch_size": 4,
    }  # fmt: skip
    arguments = {
        **OVERRIDES[recipe.stem], **({} if recipe.stem in FACELESS else faces),
        "trainer.accelerator": "cpu", "trainer.fast_dev_run": 1,
        "trainer.enable_progress_bar": False, "trainer.enable_model_summary": False,
        "trainer.callbacks+": {"class_path": f"{__name__}.Counter"},
    }  # fmt: skip
    written = {name: v if isinstance(v, str) else json.dumps(v) for name, v in arguments.items()}
    main(["fit", "--config", str(recipe), *(f"--{k}={v.replace('{folder}', str(folder))}" for k, v in written.items())])
    assert Counter.counts == {"training": 1, "validation": 1}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_flat_and_resumes(recipe) -> None:
    settings = yaml.safe_load(recipe.read_text())
    assert settings["ckpt_path"] == "last"  # the same command goes on after an interruption
    # One name moves everything that a run writes: checkpoints and weights follow the logger's folder.
    assert settings["trainer"]["logger"]["init_args"] == {"save_dir": "runs", "name": recipe.stem, "version": ""}
    # Checkpoints and the guard against NaN come with train.py; a second ModelCheckpoint would write beside ours.
    assert "callbacks" not in settings["trainer"] and settings["checkpoint"].keys() == {"every_n_steps"}
    assert Path(settings["model"]["init_args"]["export_to"]).parent == Path()
    assert "/work" not in recipe.read_text() and "shared/" not in recipe.read_text()
