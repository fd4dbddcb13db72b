"""Every pair of infer.py's options, on a tiny bundle: both are followed, or the pair is refused by name."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import infer
from editing.direction import FOLDER, EditDirection, write_direction
from models.bundle import load_bundle

OPTIONS = {
    "k": ["-k", "2"],
    "seed": ["--seed", "3"],
    "fidelity": ["--fidelity", "0.5"],
    "noise": ["--noise-sigma", "10"],
    "precision": ["--precision", "bf16"],
    "batch": ["--batch-size", "1"],
    "paste": ["--paste-back", "--upscale", "2"],
    "downscale": ["--downscale", "8"],
    "search": ["--search", "1"],
    "pulse": ["--search", "1", "--method", "pulse", "--init", "random"],
    "trajectory": ["--search", "1", "--save-trajectory"],
    "edit": ["--edit", "smile=+2"],
    "preserve": ["--edit", "smile=-1", "--edit-preserve-lr"],
    "sweep": ["--edit-sweep", "smile"],
    "save": ["--save", "images,report"],
}
REFUSED = [{"sweep", name} for name in ("search", "pulse", "trajectory")]


@pytest.fixture(scope="module")
def edited_bundle(tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path) -> Path:
    path = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("bundle") / "tiny"))
    bundle = load_bundle(path)
    rng = np.random.default_rng(0)
    normal = rng.normal(size=bundle.generator.w_dim)
    normal /= np.linalg.norm(normal)
    steps = np.tile(0.5 * normal, (bundle.generator.num_ws, 1))
    sha256 = bundle.info["parts"]["generator.safetensors"]
    write_direction(EditDirection("smile", normal, 0.0, steps, sha256), path / FOLDER / "smile.npz")
    return path


@pytest.mark.parametrize("pair", list(itertools.combinations(OPTIONS, 2)), ids="-".join)
def test_pairs(pair: tuple[str, str], edited_bundle: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i in range(2):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((12, 12), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
    command = [str(tmp_path / f"{i}.png") for i in range(2)]
    command += ["--bundle", str(edited_bundle), "-o", str(tmp_path / "out"), "--device", "cpu"]
    command += [word for name in pair for word in OPTIONS[name]]
    if set(pair) in REFUSED:
        with pytest.raises(SystemExit) as stop:
            infer.main(command)
        assert stop.value.code == 2
        return
    assert infer.main(command) == 0
    for name in "01":
        folder = tmp_path / "out" / name
        report = json.loads((folder / "report.json").read_text())
        assert report["k"] == len(report["samples"]) == (2 if "k" in pair else 4)
        assert report["lr_size"] == (8 if "downscale" in pair else 12)
        assert ("search" in report) == bool({"search", "pulse", "trajectory"} & set(pair))
        assert ("edits" in report) == bool({"edit", "preserve"} & set(pair))
        assert (folder / "trajectory.webp").exists() == ("trajectory" in pair)
        assert (folder / "sweep.png").exists() == ("sweep" in pair)
        assert (folder / "grid.png").exists() != ("save" in pair)
        if not {"edit", "fidelity", "noise"} & set(pair):
            assert min(row["lr_psnr"] for row in report["samples"]) > 30
