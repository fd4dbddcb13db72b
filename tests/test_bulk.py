"""infer.py by the thousand: archives in and out, several processes, and runs that are cut, on a tiny bundle."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import infer
from data.image_io import read_image


@pytest.fixture
def run(tiny_bundle: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs infer.py with one sample a face and one face a batch, results in tmp_path/out."""

    def call(*arguments: str | Path, out: str = "out") -> int:
        options = ["--bundle", tiny_bundle, "--out", tmp_path / out, "--device", "cpu", "-k", "1", "--batch-size", "1"]
        return infer.main([str(argument) for argument in (*options, *arguments)])

    return call


def write_faces(folder: Path, count: int = 5) -> Path:
    """Writes pictures of 8 px by number."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_zip_gives_what_its_files_give(run: Callable[..., int], tmp_path: Path, capsys) -> None:
    faces = write_faces(tmp_path / "faces")
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for path in faces.iterdir():
            archive.write(path, f"00000/{path.name}")
        archive.writestr("00000/bad.png", b"no picture")
    assert run(faces, out="a") == 0 and run(tmp_path / "faces.zip", out="b") == 1
    assert f"{tmp_path / 'faces.zip'}/00000/bad.png: not a picture" in capsys.readouterr().err
    (tmp_path / "b" / "failed.jsonl").unlink()
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert np.array_equal(read_image(tmp_path / "b" / "00" / "input.png"), read_image(faces / "00.png"))
