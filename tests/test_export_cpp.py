"""The example in C++ draws what export.run draws; needs a release of onnxruntime, named in $ORT.

ORT=path/to/onnxruntime python -m pytest tests/test_export_cpp.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import export.run
from export.onnx import export_bundle
from models.bundle import load_bundle, save_bundle
from models.encoder import Encoder
from models.generator import Generator

ROOT = Path(__file__).resolve().parents[1]
ORT = os.environ.get("ORT", "")
COMPILER = shutil.which("g++") or shutil.which("clang++")

pytestmark = [
    pytest.mark.skipif(
        not ORT, reason="needs onnxruntime's headers and library: a folder with include/ and lib/ in $ORT"
    ),
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler"),
]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "feedback"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    generator = Generator(32, channels=(16, 16, 8, 8), z_dim=32, w_dim=32, mapping_layers=2).eval()
    settings = {"feedback": 3, "posterior": "gaussian"} if request.param else {}
    encoder = Encoder(32, generator.num_ws, 32, backbone="test_resnet", width=8, canvas=32, **settings).eval()
    encoder.latents.fit(generator, samples=500)
    if encoder.feedback is not None:
        torch.nn.init.normal_(encoder.feedback.out.weight, std=1e-2)
    path = tmp_path_factory.mktemp("cpp")
    notes = {"name": "tiny", "licence": "none", "training_data": "noise", "lr_sizes": [4, 32]}
    save_bundle(path / "bundle", generator, encoder, notes)
    export_bundle(load_bundle(path / "bundle"), path / "exported")
    return path / "exported"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "upsample"
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-isystem", f"{ORT}/include"]
    links = ["-L", f"{ORT}/lib", "-lonnxruntime", f"-Wl,-rpath,{ORT}/lib", "-o", str(path)]
    subprocess.run([str(COMPILER), *options, str(ROOT / "export" / "upsample.cpp"), *links], check=True)
    return path


@pytest.mark.parametrize("size", [4, 13, 32])
def test_same_pixels(size: int, exported: Path, program: Path, tmp_path: Path) -> None:
    face = Image.fromarray(np.random.default_rng(size).integers(0, 256, (size, size, 3), dtype=np.uint8))
    for name in ("face.png", "face.ppm"):
        face.save(tmp_path / name)
    subprocess.run([str(program), str(exported), str(tmp_path / "face.ppm"), str(tmp_path / "best.ppm")], check=True)
    command = [str(tmp_path / "face.png"), "--model", str(exported), "--out", str(tmp_path / "out"), "--k", "1"]
    assert export.run.main(command) == 0
    drawn, wanted = (np.array(Image.open(tmp_path / name)).astype(int) for name in ("best.ppm", "out/face/1.png"))
    assert drawn.shape == (32, 32, 3) and np.abs(drawn - wanted).max() <= 1


@pytest.mark.parametrize("content", [b"P6\n4 5\n255\n", b"P6\n4 4\n255\nabc", b"P3\n4 4\n255\n", b""])
def test_bad_pictures(content: bytes, exported: Path, program: Path, tmp_path: Path) -> None:
    (tmp_path / "face.ppm").write_bytes(content)
    command = [str(program), str(exported), str(tmp_path / "face.ppm"), str(tmp_path / "best.ppm")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "face.ppm: e" in done.stderr and not (tmp_path / "best.ppm").exists()
