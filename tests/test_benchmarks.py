"""The benchmarks run on tiny inputs, and their numbers mean what they say."""

from __future__ import annotations

import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

import benchmarks.prior
from models.checkpoints import save_generator
from models.generator import Generator

SHAPE = {"resolution": 32, "channels": (8, 6, 6, 4), "z_dim": 8, "w_dim": 8, "mapping_layers": 2}


class PixelFeatures(nn.Module):
    num_features = 12

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d((images.float() / 255 - 0.5).square(), 2).flatten(1)


def pixel_metric(name: str) -> tuple[str, FrechetInceptionDistance]:
    return "fd_pixels", FrechetInceptionDistance(feature=PixelFeatures(), reset_real_features=False)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Faces of two sets and a generator; the metric needs no weights."""
    rng = np.random.default_rng(0)
    for name in ("train", "val"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for i in range(30):
                with BytesIO() as buffer:
                    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "png")
                    archive.writestr(f"{i}.png", buffer.getvalue())
    torch.manual_seed(0)
    save_generator(Generator(**SHAPE), tmp_path / "generator.safetensors")
    monkeypatch.setattr(benchmarks.prior, "frechet_metric", pixel_metric)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_prior_table_has_a_floor_and_ceilings(folder, capsys) -> None:
    command = "--generator generator.safetensors --samples 30 --val val.zip --train train.zip --grid grid.png"
    benchmarks.prior.main([*command.split(), "--device", "cpu"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header == "| 30 faces against validation faces | fd_pixels |"
    distances = {row.split("|")[1].strip(): float(row.split("|")[2]) for row in rows}
    floor, generator, x4, x8 = distances.values()
    assert list(distances) == ["real: training faces", "generator, truncation 1", "bicubic x4", "bicubic x8"]
    assert 0 <= floor < x4 < x8  # noise loses its variance, the more the smaller it was
    assert generator > floor
    assert Image.open("grid.png").size == (8 * 34 + 2, 6 * 34 + 2)


def test_prior_table_follows_the_seed(folder, capsys) -> None:
    tables = []
    for seed in ("0", "0", "1"):
        command = "--generator generator.safetensors --samples 20 --val val.zip --train train.zip --device cpu --seed"
        benchmarks.prior.main([*command.split(), seed])
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] != tables[2]


def test_prior_refuses_a_single_sample(folder, capsys) -> None:
    with pytest.raises(SystemExit):
        benchmarks.prior.main(["--generator", "generator.safetensors", "--samples", "1"])
    assert "at least 2" in capsys.readouterr().err
