"""The benchmarks of the encoder beside PULSE and beside style mixing, on a tiny bundle."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import PixelDistance, write_bundle, write_faces

from benchmarks import amortized, diversity
from models.bundle import Bundle, load_bundle
from models.posterior import make_posterior


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    write_bundle(tmp_path / "bundle")
    write_faces(tmp_path / "faces.zip")
    return load_bundle(tmp_path / "bundle")


def test_every_number_of_passes_is_a_row(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = f"--bundle {tmp_path / 'bundle'} --data {tmp_path / 'faces.zip'} --faces 2 --lr 8 --steps 2 --passes 0"
    amortized.main([*command.split(), "--refine", "1", "--k", "3"])
    rows = [row.split("|") for row in capsys.readouterr().out.splitlines()[2:]]
    assert [row[1].split(",")[:2] for row in rows] == [
        [" PULSE", " 2 steps "], [" ours", " 0 passes of feedback "], [" ours", " refined"],
    ]  # fmt: skip
    assert all(float(row[2]) > 0 and float(row[3]) > 0 for row in rows)


def test_diversity_grows_with_the_spread(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    torch.manual_seed(0)
    bundle.encoder.posterior = make_posterior("gaussian", bundle.encoder.context_dim, bundle.encoder.w_dim).eval()
    bundle.encoder.spread.fill_(0.5)
    monkeypatch.setattr(diversity, "load_bundle", lambda path: replace(bundle))
    monkeypatch.setattr(diversity, "LPIPS", PixelDistance)
    faces = str(tmp_path / "faces.zip")
    diversity.main(["--data", faces, "--train", faces, "--faces", "2", "--k", "3", "--lr", "8"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("|")[2].strip() for row in rows[2:]] == ["distribution", "style mixing"]
    for row in rows[2:]:
        distances = [float(found) for found in re.findall(r"([\d.]+) \(", row)]
        assert len(distances) == len(diversity.FACTORS) and 0 < distances[0] < distances[-1]
