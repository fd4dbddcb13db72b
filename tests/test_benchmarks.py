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

import benchmarks.realism
from models.checkpoints import save_generator
from models.generator import Generator

SHAPE = {"resolution": 32, "channels": (8, 6, 6, 4), "z_dim": 8, "w_dim": 8, "mapping_layers": 2}


def pixel_features(faces: Tensor) -> tuple[Tensor, Tensor]:
    """Stands where both networks would."""
    squares = (faces.float() / 255 - 0.5).square()
    return tuple(nn.functional.adaptive_avg_pool2d(squares, n).flatten(1) for n in (2, 1))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Faces of two sets and a generator; the metrics need no weights."""
    rng = np.random.default_rng(0)
    for name in ("train", "val"):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for i in range(30):
                with BytesIO() as buffer:
                    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "png")
                    archive.writestr(f"{i}.png", buffer.getvalue())
    torch.manual_seed(0)
    save_generator(Generator(**SHAPE), tmp_path / "generator.safetensors")
    monkeypatch.setattr(benchmarks.realism, "networks", lambda device: pixel_features)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_realism_table_has_a_floor_and_ceilings(folder, capsys) -> None:
    command = "--generator generator.safetensors --samples 30 --val val.zip --train train.zip --grid grid.png"
    benchmarks.realism.main([*command.split(), "--device", "cpu"])
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header == "| 30 faces against validation faces | fd_vgg11 | kid_vgg11 | fd_edgeface |"
    table = {name.strip(): [float(value) for value in values[:3]] for _, name, *values in (r.split("|") for r in rows)}
    assert list(table) == ["real: training faces", "generator, truncation 1", "bicubic x2", "bicubic x4"]
    for floor, generator, x2, x4 in zip(*table.values(), strict=True):
        assert floor < x2 < x4  # noise loses its variance, the more the smaller it was
        assert generator > floor
    assert Image.open("grid.png").size == (8 * 34 + 2, 6 * 34 + 2)


def test_realism_table_follows_the_seed(folder, capsys) -> None:
    tables = []
    for seed in ("0", "0", "1"):
        command = "--generator generator.safetensors --samples 20 --val val.zip --train train.zip --device cpu --seed"
        benchmarks.realism.main([*command.split(), seed])
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] != tables[2]


def test_realism_at_half_the_size(folder, capsys) -> None:
    command = "--generator generator.safetensors --samples 20 --val val.zip --train train.zip --device cpu"
    tables = []
    for size in ([], ["--size", "16"]):
        benchmarks.realism.main([*command.split(), *size])
        tables.append(capsys.readouterr().out)
    assert tables[0] != tables[1]


def test_realism_refuses_a_single_sample(folder, capsys) -> None:
    with pytest.raises(SystemExit):
        benchmarks.realism.main(["--generator", "generator.safetensors", "--samples", "1"])
    assert "at least 2" in capsys.readouterr().err
