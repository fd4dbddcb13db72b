"""The benchmark of the encoder beside PULSE, on a tiny bundle."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import write_bundle, write_faces

from benchmarks import amortized
from models.bundle import Bundle, load_bundle


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
