"""The benchmarks run on tiny inputs, and their numbers mean what they say."""

from __future__ import annotations

import re
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

import benchmarks.prior
import benchmarks.training
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


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_report(tmp_path, capsys, precision) -> None:
    recipe = {
        "model": {
            "class_path": "training.stylegan2.StyleGAN2Training",
            "init_args": {**SHAPE, "channels": [8, 6, 6, 4]},
        },
        "data": {"init_args": {"batch_size": 4}},
        "trainer": {"precision": precision},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    before = torch.get_float32_matmul_precision()
    try:
        command = f"--config {tmp_path / 'tiny.yaml'} --no-compile --repeats 1 --device cpu"
        benchmarks.training.main(command.split())
    finally:
        torch.set_float32_matmul_precision(before)
    report = capsys.readouterr().out
    assert report.startswith(f"Batch 4, {precision}, not compiled")
    table = re.findall(r"^\| ([^|\n]+?) \| ([\d.]+) \| (\d+) \| ([\d.]+) \|$", report, re.MULTILINE)
    parts = {name: (float(ms), int(every), float(gflop)) for name, ms, every, gflop in table}
    assert list(parts) == ["generator", "discriminator", "r1", "path length", "average", "step, on average"]
    ms, _, _ = parts.pop("step, on average")
    assert ms == pytest.approx(sum(part[0] / part[1] for part in parts.values()), abs=0.3)
    assert float(re.search(r"([\d.]+) images/s", report)[1]) == pytest.approx(4e3 / ms, rel=0.02)
    assert parts["discriminator"][2] > 0 and parts["generator"][2] > 0 and parts["average"][2] == 0
    assert parts["r1"][2] > parts["discriminator"][2] / 2  # one forward, and backward twice


def test_training_refuses_other_recipes(tmp_path, capsys) -> None:
    (tmp_path / "other.yaml").write_text("model: {class_path: training.encoder.EncoderTraining}")
    with pytest.raises(SystemExit):
        benchmarks.training.main(["--config", str(tmp_path / "other.yaml")])
    assert "StyleGAN2Training" in capsys.readouterr().err


def test_operations_are_counted_forward_and_backward() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    weight = torch.randn(5, 3, 3, 3, requires_grad=True)
    forward = 2 * 2 * 5 * 64 * 3 * 9

    def work() -> None:
        nn.functional.conv2d(x, weight, padding=1).sum().backward()

    assert benchmarks.training.gflops(work) == pytest.approx(3 * forward / 1e9)


def test_rate_of_convolutions_is_work_over_time(monkeypatch) -> None:
    monkeypatch.setattr(benchmarks.training, "seconds", lambda work, repeats, device: 1.0)
    mixed, best = benchmarks.training.convolution_rates((4, 2), 3, torch.float32, torch.device("cpu"), 1)
    first, second = 3 * 2 * 9 * 4 * 4 * 16 * 3 / 1e9, 3 * 2 * 9 * 2 * 2 * 64 * 3 / 1e9
    assert mixed == pytest.approx((first + second) / 2) and best == pytest.approx(max(first, second))
