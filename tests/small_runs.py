"""What the tests of trainings share: small runs through the real command line, that stop and go on like real ones."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from lightning import Callback, Trainer
from PIL import Image
from torch import Tensor, nn

from models.bundle import save_bundle
from models.encoder import Encoder
from models.generator import Generator
from models.layers import Frozen
from train import main

NOTES = {"name": "tiny", "licence": "none", "training_data": "none"}


class PixelDistance(Frozen):
    """Stands in for LPIPS, whose weights a fresh clone lacks: the mean squared difference of coarse pixels."""

    def __init__(self, net: str = "squeeze") -> None:
        super().__init__()
        self.freeze()

    def activations(self, images: Tensor) -> list[Tensor]:
        return [F.avg_pool2d(images, 4)] * 7

    def normalized(self, activations: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (activations[0],)

    def features(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.normalized(self.activations(images))

    def distance(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        return (a[0] - b[0]).square().mean(dim=(1, 2, 3))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.distance(self.features(a), self.features(b))


class PixelFeatures(nn.Module):
    """Stands in for the network of the Fréchet distance: means of coarse pixels."""

    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)


class Record(Callback):
    """Keeps every batch's loss, and may stop the run like a kill would.

    Args:
        stop_after: The step after which the run is killed.
        metric: Name of what is logged, for modules that return no loss.
    """

    def __init__(self, stop_after: int | None = None, metric: str = "loss") -> None:
        self.losses: list[float] = []
        self.metric = metric
        self.stop_after = stop_after

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.losses.append(float(outputs["loss"] if outputs else trainer.logged_metrics[self.metric]))
        if trainer.global_step == self.stop_after:
            raise RuntimeError("killed")


def write_faces(path: Path, count: int = 20, grain: int = 4, seed: int = 0) -> None:
    """Writes a zip with pictures of 32 px, enlarged from `grain` px of noise."""
    rng = np.random.default_rng(seed)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            with BytesIO() as buffer:
                smooth = rng.integers(0, 256, (grain, grain, 3), np.uint8)
                Image.fromarray(smooth).resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "png")
                archive.writestr(f"{i:02}.png", buffer.getvalue())


CHANNELS, D = (16, 16, 8, 8), 16
SMALL = {"backbone": "test_resnet", "width": 8, "hidden": 16, "head_rank": 8, "rank": 5}  # of `Encoder`


def tiny_networks(seed: int = 0, **architecture: object) -> tuple[Generator, Encoder]:
    """Makes a generator of 32 px and its encoder; their weights are random, but of the scale of trained ones."""
    torch.manual_seed(seed)
    generator = Generator(32, CHANNELS, z_dim=D, w_dim=D, mapping_layers=2).eval().requires_grad_(False)
    for block in generator.synthesis.blocks:
        block.torgb.weight.mul_(0.2)  # faces within [-1, 1]
    encoder = Encoder(32, generator.num_ws, D, CHANNELS, **{**SMALL, **architecture}).eval().requires_grad_(False)
    encoder.latents.fit(generator, 500)
    for name, parameter in encoder.named_parameters():
        if name.startswith(("details", "sampler")) and name.endswith("out.weight"):  # near zero before training
            torch.nn.init.normal_(parameter, std=0.1)
    return generator, encoder


def write_bundle(path: Path, seed: int = 0, **architecture: object) -> None:
    """Writes a bundle of `tiny_networks`."""
    save_bundle(path, *tiny_networks(seed, **architecture), NOTES)


def train(
    folder: Path,
    monkeypatch,
    record: Record,
    run: str,
    steps: int,
    model: dict[str, object],
    data: dict[str, object] | None = None,
    trainer: dict[str, object] | None = None,
    save_every: int = 2,
) -> None:
    """Runs the command line on a small recipe.

    Args:
        folder: Holds faces.zip; gets the run's folder.
        monkeypatch: Pytest's.
        record: Sees every batch.
        run: Names the run; the same name goes on with it.
        steps: Of the run.
        model: `class_path` and `init_args`.
        data: The same; the pictures of faces.zip if None.
        trainer: In place of the trainer's settings here.
        save_every: Steps between checkpoints.
    """
    faces = {
        "class_path": "data.datamodule.FaceData",
        "init_args": {
            "train": str(folder / "faces.zip"), "val": str(folder / "faces.zip"), "resolution": 32,
            "batch_size": 4, "val_limit": 4,
        },
    }  # fmt: skip
    recipe = {
        "model": model,
        "data": data or faces,
        "trainer": {
            "accelerator": "cpu", "max_steps": steps, "max_epochs": -1, "enable_progress_bar": False,
            "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 0,
            "default_root_dir": str(folder / run),
            **(trainer or {"val_check_interval": 2 * save_every, "check_val_every_n_epoch": None}),
        },
        "checkpoint": {"every_n_steps": save_every},
        "ckpt_path": "last",
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    original = Trainer.fit

    @functools.wraps(original)  # the command line reads the signature
    def fit(trainer, *args, **kwargs):
        trainer.callbacks.insert(0, record)
        return original(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("lightning.Trainer.fit", fit)
        main(["fit", "--config", str(folder / "recipe.yaml")])
