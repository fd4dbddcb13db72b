"""Every recipe in configs/ runs through the real command line: one step and one validation with tiny settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback
from small_runs import CHANNELS, SMALL, D, PixelDistance, PixelFeatures, tiny_networks, write_bundle, write_faces
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from data.labels import ATTRIBUTES
from losses.perceptual import SqueezeNetFeatures
from models.checkpoints import save_generator
from models.layers import Frozen
from train import main

RECIPES = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))
FACES = 6

NETWORK = {"model.resolution": 32, "model.channels": list(CHANNELS), "model.z_dim": D, "model.w_dim": D}
GAN = {**NETWORK, "model.mapping_layers": 2, "model.compile": False}
ENCODER = {"model.generator": "{folder}/generator.safetensors", "model.sizes_per_batch": 2, "model.export_to": None}
AMORTIZED = {**ENCODER, "model.architecture": SMALL, "model.max_lr_size": 31, "model.val_lr": [8]}
SUPERVISED = {**ENCODER, "model.compile": False}
PSP = {**SUPERVISED, "model.architecture": {"widths": [16, 16, 24, 32, 16]}}
SPLIT = {"data.split": None, "data.num_workers": 0}
LARGE = {**SPLIT, "model.loss_size": 32, "model.max_lr_size": 32}

# What makes a recipe small; {folder} stands for a temporary folder with faces.zip and generator.safetensors (32 px).
OVERRIDES: dict[str, dict[str, object]] = {
    "stylegan2_64": GAN,
    "stylegan2_128": {
        **GAN, "model.freeze_below": 32, "model.micro_batches": 2,
        "model.init_generator": "{folder}/generator.safetensors", "model.reconstruction_bundle": "{folder}/bundle",
    },
    "amortized_64": AMORTIZED,
    "amortized_256": {**AMORTIZED, **SPLIT},
    "amortized_1024": {**AMORTIZED, **SPLIT, "model.loss_size": 16},
    "propulse_1024": {
        **SUPERVISED, **LARGE, "model.architecture": {"backbone": "test_resnet", "width": 8}, "model.min_lr_size": 8,
        "model.max_lr_size": 16, "model.oversample_sizes": [8, 16],
    },
    "psp_64": PSP,
    "psp_1024": {
        **PSP, **LARGE, "model.init_backbone": None, "model.oversample_sizes": [8, 16, 32], "model.lpips": "squeeze",
        "model.identity": "mobilefacenet",
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
FACELESS = ("flow_64",)  # recipes that need no faces


class Counter(Callback):
    """Counts what a run did."""

    counts: dict[str, int] = {}

    def on_train_batch_end(self, *args) -> None:
        self.counts["training"] = self.counts.get("training", 0) + 1

    def on_validation_batch_end(self, *args) -> None:
        self.counts["validation"] = self.counts.get("validation", 0) + 1


class PixelPerson(Frozen):
    """Stands in for the face embedding."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.normalize(nn.functional.adaptive_avg_pool2d(images, 2).flatten(1), dim=1)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with faces and a generator, in which a recipe's relative paths end; no weights are needed."""
    write_faces(tmp_path / "faces.zip", FACES)
    rows = [f"{i:02}.jpg" + ",1" * len(ATTRIBUTES) for i in range(FACES)]
    (tmp_path / "labels.csv").write_text("\n".join([",".join(("file", *ATTRIBUTES)), *rows]))
    save_generator(tiny_networks()[0], tmp_path / "generator.safetensors")
    write_bundle(tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py"])
    metric = FrechetInceptionDistance(feature=PixelFeatures(), reset_real_features=False)
    monkeypatch.setattr("evaluation.frechet.frechet_metric", lambda name: ("fd_pixels", metric))
    monkeypatch.setattr("training.reconstruction.LPIPS", PixelDistance)
    for module in ("training.amortized", "training.encoder"):
        monkeypatch.setattr(f"{module}.LPIPS", PixelDistance)
        monkeypatch.setattr(f"{module}.load_face_embedder", lambda name: PixelPerson())
    precision = torch.get_float32_matmul_precision()
    yield tmp_path
    torch.set_float32_matmul_precision(precision)


def test_there_are_recipes_and_all_are_covered() -> None:
    assert RECIPES and {recipe.stem for recipe in RECIPES} == OVERRIDES.keys()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe, folder, monkeypatch) -> None:
    if recipe.stem == "stylegan2_128":
        try:
            SqueezeNetFeatures()
        except FileNotFoundError as error:
            pytest.skip(str(error))
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
    callbacks = {callback["class_path"] for callback in settings["trainer"].get("callbacks", [])}
    assert callbacks <= {"evaluation.frechet.FrechetDistance"} and settings["checkpoint"].keys() == {"every_n_steps"}
    assert Path(settings["model"]["init_args"]["export_to"]).parent == Path()
    assert "/work" not in recipe.read_text() and "shared/" not in recipe.read_text()
