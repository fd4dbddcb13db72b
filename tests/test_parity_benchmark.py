"""The benchmark of parity: its pure parts, on tiny inputs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import benchmarks.parity
from models.checkpoints import save_generator
from models.generator import Generator


def test_randomise_leaves_nothing_at_its_start() -> None:
    torch.manual_seed(0)
    layer = nn.ModuleDict({"noise": nn.Linear(1, 1, bias=False)})
    network = nn.ModuleDict({"style": nn.Linear(4, 4), "conv": nn.Linear(4, 4), "layer": layer})
    nn.init.zeros_(layer["noise"].weight)
    for part in ("style", "conv"):
        nn.init.zeros_(network[part].bias)
    benchmarks.parity.randomise(network)
    assert layer["noise"].weight.abs().sum() > 0 and network["conv"].bias.abs().sum() > 0
    assert network["style"].bias.std() > 5 * network["conv"].bias.std()  # its biases count a hundredth


@pytest.fixture
def saved(tmp_path) -> tuple[Generator, Path]:
    torch.manual_seed(0)
    generator = Generator(32, channels=(8, 8, 6, 4), z_dim=8, w_dim=8, mapping_layers=2).eval()
    path = tmp_path / "network.safetensors"
    save_generator(generator, path, dtype=torch.float32)
    return generator, path


def drawing(generator: Generator, shift: float):
    return lambda z: generator(z, truncation_psi=benchmarks.parity.TRUNCATION, noise_mode="const") + shift


def test_difference_is_the_largest(saved) -> None:
    generator, path = saved
    assert benchmarks.parity.difference(drawing(generator, 0.0), path, 0)[0] < 1e-5
    apart, value = benchmarks.parity.difference(drawing(generator, 0.25), path, 0)
    assert apart == pytest.approx(0.25, abs=1e-5) and value > 0.25


@pytest.mark.parametrize(("shift", "status"), [(0.0, None), (0.1, "exceed")])
def test_parity_fails_where_pictures_differ(saved, tmp_path, monkeypatch, capsys, shift, status) -> None:
    generator, path = saved
    (tmp_path / "model.py").write_text("")

    def pair(module: ModuleType, case: tuple, target: Path):
        target = target.with_suffix(".safetensors")
        target.write_bytes(path.read_bytes())
        return drawing(generator, shift), target

    monkeypatch.setattr(benchmarks.parity, "rosinality_module", lambda folder: ModuleType("reference"))
    monkeypatch.setattr(benchmarks.parity, "rosinality_pair", pair)
    command = ["--rosinality", str(tmp_path), "--resolutions", "32"]
    if status is None:
        benchmarks.parity.main(command)
    else:
        with pytest.raises(SystemExit, match=status):
            benchmarks.parity.main(command)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[3:5] for row in rows] == [[f" {m} ", f" {d} "] for m in (1, 2) for d in (2, 8)]


@pytest.mark.parametrize(("command", "message"), [([], "Expected a checkout"), (["--nvidia", "."], "training")])
def test_parity_needs_checkouts(command, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        benchmarks.parity.main(command)
    assert message in capsys.readouterr().err
