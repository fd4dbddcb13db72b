"""benchmarks/editing.py: its figures against their definitions, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.figures import matrix_picture
from data.labels import ATTRIBUTES
from data.operator import Downscale, back_project
from editing.direction import EditDirection, write_direction
from models.attributes import AttributeClassifier, save_attributes
from models.bundle import load_bundle
from models.checkpoints import sha256_of

ROOT = Path(__file__).resolve().parents[1]
D = 16
_spec = importlib.util.spec_from_file_location("benchmark_of_editing", ROOT / "benchmarks" / "editing.py")
bench = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = bench  # dataclasses look their module up
_spec.loader.exec_module(bench)


@pytest.fixture(scope="module")
def folder(tiny_bundle, tmp_path_factory) -> Path:
    path = Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("bundles") / "tiny"))
    owner = sha256_of(path / "generator.safetensors")
    for i, name in enumerate(("smile", "young")):
        normal = np.random.default_rng(i).standard_normal(D)
        normal /= np.linalg.norm(normal)
        direction = EditDirection(name, normal, 0.0, np.tile(normal, (8, 1)), owner)
        write_direction(direction, path / "directions" / f"{name}.npz")
    classifier = AttributeClassifier(ATTRIBUTES, 32, "test_resnet")
    classifier.rates[ATTRIBUTES.index("Young")] = 0.8
    save_attributes(classifier, path / "second.safetensors")
    with zipfile.ZipFile(path / "photos.zip", "w") as archive:
        for i in range(3):
            with BytesIO() as buffer:
                Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "png")
                archive.writestr(f"{i}.png", buffer.getvalue())
    return path


def test_figures_are_means_over_faces_that_keep_their_correction(folder) -> None:
    bundle, classifier = load_bundle(folder), bench.load_attributes(folder / "second.safetensors")
    lr = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    encoding, steps = bundle.encode(lr), np.ones((8, D)) / 4
    found = bench.Bench(bundle, classifier, None, encoding, lr).measure("smile", steps)
    with torch.inference_mode():
        before = bundle.generate(encoding)[:, 0]
        after = bundle.generate(encoding._replace(ws=encoding.ws + 0.5))[:, 0]
        images = [back_project(before, lr), back_project(after, lr + Downscale(8)(after - before))]
        scores = [classifier.balanced(classifier(((x + 1) * 127.5).round() / 127.5 - 1)).sigmoid() for x in images]
    assert np.allclose(found["changes"], (scores[1] - scores[0]).mean(0).numpy(), atol=1e-4)
    assert found["identity"] is None and found["strength"] == 2
    assert found["target"] == found["changes"][ATTRIBUTES.index("Smiling")]
    assert found["ratio"] == pytest.approx(found["leakage"] / found["target"]) or found["target"] <= 0
    assert abs(found["largest"][1]) == max(abs(found["changes"][ATTRIBUTES.index(n)]) for n in ATTRIBUTES
                                           if n != "Smiling" and n not in found["synonyms"])  # fmt: skip


def test_it_writes_tables_and_the_matrix(folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "load_mobilefacenet", lambda: (_ for _ in ()).throw(FileNotFoundError("no weights")))
    arguments = ["--bundle", folder, "--classifier", folder / "second.safetensors", "--data", folder / "photos.zip"]
    arguments += ["--generated", 4, "--real", 2, "--lr", 8, "--device", "cpu"]
    for out in ("a", "b"):
        bench.main([str(argument) for argument in (*arguments, "--out", tmp_path / out)])
    assert "| young -2 |" in capsys.readouterr().out
    for name in ("edits.json", "table.md", "matrix.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    results = json.loads((tmp_path / "a" / "edits.json").read_text())["results"]
    assert list(results) == ["2 photos, 8 px", "4 generated faces"] and len(results) == 2
    assert len(results["4 generated faces"]["raw"]["smile"]["changes"]) == 40


def test_the_classifier_of_the_directions_may_not_judge(folder, tmp_path) -> None:
    path = folder / "directions" / "smile.npz"
    kept = path.read_bytes()
    loaded = bench.read_directions(folder / "directions", ["smile"], None)["smile"]
    loaded.about["classifier_sha256"] = sha256_of(folder / "second.safetensors")
    write_direction(loaded, path, overwrite=True)
    try:
        with pytest.raises(SystemExit):
            bench.main(["--bundle", str(folder), "--classifier", str(folder / "second.safetensors")])
    finally:
        path.write_bytes(kept)


def test_the_matrix_is_blue_below_and_red_above() -> None:
    picture = matrix_picture([("one", [[0.0, 0.5], [-0.5, 1.0]])], ["a", "b"], ["x", "y"])
    cells = [picture.getpixel((picture.width - 8 - 34 * (2 - x) + 30, picture.height - 8 - 34 * (2 - y) + 2))
             for y in range(2) for x in range(2)]  # fmt: skip
    assert cells[0] == (255, 255, 255) and cells[1][0] > cells[1][2] and cells[2][0] < cells[2][2]
