"""benchmarks/editing.py: its figures against their definitions, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.labels import ATTRIBUTES
from data.pictures import matrix_picture
from editing.boundary import Boundary, write_boundary
from models.attributes import AttributeClassifier, save_attributes
from models.bundle import load_bundle, save_bundle
from models.checkpoints import sha256_of
from models.encoder import Encoder
from models.generator import Generator

ROOT = Path(__file__).resolve().parents[1]
D = 16
_spec = importlib.util.spec_from_file_location("benchmark_of_editing", ROOT / "benchmarks" / "editing.py")
bench = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = bench  # dataclasses look their module up
_spec.loader.exec_module(bench)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    generator = Generator(32, channels=(8, 8, 8, 8), z_dim=D, w_dim=D, mapping_layers=2).eval()
    encoder = Encoder(32, generator.num_ws, D, backbone="test_resnet", width=8).eval()
    encoder.latents.fit(generator, samples=500)
    path = tmp_path_factory.mktemp("bundles") / "tiny"
    save_bundle(path, generator, encoder, {"name": "tiny", "licence": "none", "training_data": "none"})
    owner = sha256_of(path / "generator.safetensors")
    for i, name in enumerate(("smile", "young")):
        normal = np.random.default_rng(i).standard_normal(D)
        normal /= np.linalg.norm(normal)
        write_boundary(Boundary(name, normal, 0.0, normal, (0, 4), owner), path / "boundaries" / f"{name}.npz")
    classifier = AttributeClassifier(ATTRIBUTES, 32, "test_resnet")
    classifier.rates[ATTRIBUTES.index("Young")] = 0.8
    save_attributes(classifier, path / "second.safetensors")
    with zipfile.ZipFile(path / "photos.zip", "w") as archive:
        for i in range(3):
            with BytesIO() as buffer:
                Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "png")
                archive.writestr(f"{i}.png", buffer.getvalue())
    return path


def test_figures_are_what_they_say() -> None:
    changes = np.zeros(40)
    changes[ATTRIBUTES.index("Young")] = -0.5
    changes[ATTRIBUTES.index("Gray_Hair")] = 0.9  # a synonym
    changes[ATTRIBUTES.index("Male")] = 0.3
    found = bench.summarise("young", bench.Effect(changes, 0.7), ATTRIBUTES, side=-1)
    others = sorted([0.3] + [0.0] * (39 - 1 - len(found["synonyms"])))
    assert found["own"] == 0.5 and found["drift"] == pytest.approx(np.percentile(others, 90))
    assert found["largest"] == ["Male", pytest.approx(0.3)] and found["synonyms"]["Gray_Hair"] == pytest.approx(0.9)
    assert found["ratio"] == pytest.approx(found["drift"] / 0.5) and found["identity"] == 0.7
    beard = np.zeros(40)
    beard[ATTRIBUTES.index("No_Beard")] = -0.4  # a beard is less of No_Beard
    assert bench.summarise("beard", bench.Effect(beard, None), ATTRIBUTES, side=1)["own"] == pytest.approx(0.4)


def test_effects_are_means_over_faces(bundle) -> None:
    loaded, classifier = load_bundle(bundle), bench.load_attributes(bundle / "second.safetensors")
    ws = torch.randn(4, 8, D, generator=torch.Generator().manual_seed(0))
    direction = np.ones(D) / 4
    effect = bench.Bench(loaded, classifier, None, ws).effect(direction, (2, 6), 2.0)
    moved = ws.clone()
    moved[:, 2:6] += 0.5
    with torch.inference_mode():
        images = [((loaded.generate(c).clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1 for c in (ws, moved)]
        before, after = (classifier.balanced(classifier(part)).sigmoid() for part in images)
    assert np.allclose(effect.changes, (after - before).mean(0).numpy(), atol=1e-4) and effect.identity is None


def test_it_writes_tables_and_the_matrix(bundle, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "Identity", lambda: (_ for _ in ()).throw(FileNotFoundError("no weights")))
    arguments = ["--bundle", bundle, "--classifier", bundle / "second.safetensors", "--data", bundle / "photos.zip"]
    arguments += ["--generated", 4, "--real", 2, "--lr", 8, "--device", "cpu"]
    for out in ("a", "b"):
        bench.main([str(argument) for argument in (*arguments, "--out", tmp_path / out)])
    assert "| young -2 |" in capsys.readouterr().out
    for name in ("edits.json", "table.md", "matrix.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    results = json.loads((tmp_path / "a" / "edits.json").read_text())["results"]
    assert list(results) == ["2 encoded photos, 8 px", "4 generated faces"] and len(results) == 2
    assert len(results["4 generated faces"]["raw"]["smile"]["changes"]) == 40


def test_the_classifier_of_the_boundaries_may_not_judge(bundle, tmp_path) -> None:
    path = bundle / "boundaries" / "smile.npz"
    kept = path.read_bytes()
    loaded = bench.read_boundaries(bundle / "boundaries", ["smile"], None)["smile"]
    loaded.about["classifier_sha256"] = sha256_of(bundle / "second.safetensors")
    write_boundary(loaded, path)
    try:
        with pytest.raises(SystemExit):
            bench.main(["--bundle", str(bundle), "--classifier", str(bundle / "second.safetensors")])
    finally:
        path.write_bytes(kept)


def test_the_matrix_is_blue_below_and_red_above() -> None:
    picture = matrix_picture([("one", [[0.0, 0.5], [-0.5, 1.0]])], ["a", "b"], ["x", "y"])
    cells = [picture.getpixel((picture.width - 8 - 34 * (2 - x) + 30, picture.height - 8 - 34 * (2 - y) + 2))
             for y in range(2) for x in range(2)]  # fmt: skip
    assert cells[0] == (255, 255, 255) and cells[1][0] > cells[1][2] and cells[2][0] < cells[2][2]
