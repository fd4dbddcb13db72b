"""Every benchmark runs on tiny inputs, and its figures mean what they say."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import D, write_faces
from torch import nn

import benchmarks.editing
import benchmarks.generator
import benchmarks.parity
import benchmarks.realism
from data.figures import matrix_picture
from data.labels import ATTRIBUTES
from data.operator import Downscale, back_project
from editing.direction import EditDirection, read_directions, write_direction
from models.attributes import AttributeClassifier, load_attributes, save_attributes
from models.bundle import load_bundle
from models.checkpoints import save_generator, sha256_of
from models.generator import Generator

ROOT = Path(__file__).resolve().parents[1]


# --- realism.py ---


def pixel_features(faces):
    """Stands where both networks would."""
    squares = (faces.float() / 255 - 0.5).square()
    return tuple(nn.functional.adaptive_avg_pool2d(squares, n).flatten(1) for n in (2, 1))


def test_realism_table_has_a_floor_and_ceilings_and_follows_the_seed(tmp_path, monkeypatch, capsys, networks) -> None:
    for seed, name in enumerate(("train", "val")):
        write_faces(tmp_path / f"{name}.zip", 30, grain=32, seed=seed)  # noise
    save_generator(networks[0], tmp_path / "generator.safetensors")
    monkeypatch.setattr(benchmarks.realism, "networks", lambda device: pixel_features)
    monkeypatch.chdir(tmp_path)

    def table(*more: str) -> str:
        options = "--generator generator.safetensors --val val.zip --train train.zip --device cpu --samples 30"
        benchmarks.realism.main([*options.split(), *more])
        return capsys.readouterr().out

    text = table("--grid", "grid.png")
    header, _, *rows = text.splitlines()
    assert header == "| 30 faces against validation faces | fd_vgg11 | kid_vgg11 | fd_edgeface |"
    found = {name.strip(): [float(value) for value in values[:3]] for _, name, *values in (r.split("|") for r in rows)}
    assert list(found) == ["real: training faces", "generator, truncation 1", "bicubic x2", "bicubic x4"]
    for floor, generator, x2, x4 in zip(*found.values(), strict=True):
        assert floor < x2 < x4 and generator > floor  # noise loses its variance, the more the smaller it was
    assert Image.open("grid.png").size == (8 * 34 + 2, 6 * 34 + 2)
    assert table() == text != table("--seed", "1") and table("--size", "16") != text


# --- generator.py ---

MODEL = '''
import torch
from op import scale

class Generator(torch.nn.Module):
    """Has the reference's interface."""
    def __init__(self, size, style_dim, n_mlp):
        super().__init__()
        self.size, self.weight = size, torch.nn.Parameter(torch.ones(1))

    def forward(self, styles, input_is_latent, randomize_noise):
        assert input_is_latent and not randomize_noise
        ws = styles[0] * self.weight
        return scale(ws.mean(dim=(1, 2)))[:, None, None, None].expand(-1, 3, self.size, self.size), None
'''
OPERATIONS = """
from torch.utils.cpp_extension import load
library = load("needs a CUDA compiler", sources=[])

def scale(x):
    return 2 * x
"""


@pytest.fixture
def narrow(monkeypatch) -> None:
    monkeypatch.setattr(
        benchmarks.generator, "Generator", lambda resolution: Generator(resolution, (8,) * 4, mapping_layers=1)
    )


@pytest.fixture
def checkout(tmp_path) -> Path:
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "__init__.py").write_text(OPERATIONS)
    (tmp_path / "model.py").write_text(MODEL)
    return tmp_path


def test_the_reference_is_imported_without_compiling(checkout, narrow) -> None:
    synthesize = benchmarks.generator.make_synthesis(benchmarks.generator.REFERENCE, 32, str(checkout))
    ws = benchmarks.generator.codes(2, 32)
    assert torch.equal(synthesize(ws)[:, 0, 0, 0], 2 * ws.mean(dim=(1, 2)))


@torch.no_grad()
def test_our_variants_synthesize_the_same_face(narrow) -> None:
    ws, names = benchmarks.generator.codes(2, 32), (benchmarks.generator.EXACT, benchmarks.generator.HALF)
    exact, half = (benchmarks.generator.make_synthesis(name, 32, None)(ws) for name in names)
    assert exact.shape == (2, 3, 32, 32) and exact.dtype == half.dtype == torch.float32
    assert 0 < (exact - half).abs().mean() < 0.05 * exact.std()
    assert 0 < benchmarks.generator.grey_levels(32) < 0.05 * 0.5 * 127.5


@pytest.mark.parametrize("gradient", [False, True])
def test_a_gradient_is_computed_only_where_asked(gradient) -> None:
    seen = []

    def synthesize(ws):
        seen.append((ws.requires_grad, torch.is_grad_enabled()))
        return ws * 2

    assert benchmarks.generator.once(synthesize, torch.ones(2, 8, 4), gradient) > 0
    assert seen == [(gradient, gradient)]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").is_file(), reason="the system does not tell the peak memory")
def test_peak_memory_is_that_of_one_image() -> None:
    """In a process of its own, as the benchmark does it: here, a call may find room that earlier tests have left."""
    script = (
        "import torch, benchmarks.generator as benchmark\n"
        "benchmark.make_synthesis = lambda *a: lambda ws: torch.ones(2**24).mean()\n"
        "print(benchmark.peak_megabytes('any', 32, None, 1, False))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(64, abs=16)


def test_report_gives_ratios_of_rounds() -> None:
    names = benchmarks.generator.REFERENCE, benchmarks.generator.EXACT, benchmarks.generator.HALF
    taken = ([4.0, 8.0, 6.0], 300.0, None), ([1.0, 2.0, 2.0], 100.0, None), ([1.0, 1.0, 1.0], None, 0.25)
    results = {name: benchmarks.generator.Result(*parts) for name, parts in zip(names, taken, strict=True)}
    text = benchmarks.generator.report(results, argparse.Namespace(gradient=False, resolution=32, batch=1))
    rows = dict(re.findall(r"^\| ([^|]+?) \| (.*) \|$", text, re.MULTILINE))
    assert [rows[name] for name in names] == [
        "6000 | 1.00 | 300 | –", "2000 | 4.00 | 100 | –", "1000 | 6.00 | – | 0.25"
    ]  # fmt: skip


def test_variants_take_turns(checkout, narrow, monkeypatch, capsys) -> None:
    order = []
    monkeypatch.setattr(
        benchmarks.generator, "once", lambda synthesize, ws, gradient: order.append(id(synthesize)) or 1.0
    )

    class Pool:
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731
        apply = lambda self, task: 7.0  # noqa: E731

    context = argparse.Namespace(Pool=lambda count: Pool())
    monkeypatch.setattr(benchmarks.generator.multiprocessing, "get_context", lambda kind: context)
    benchmarks.generator.main(f"--rosinality {checkout} --resolution 32 --rounds 2".split())
    out = capsys.readouterr().out
    assert out.count("| 7 |") == 3 and "32 px, batch 1, forward" in out
    assert len(order) == 9 and order[:3] == order[3:6] == order[6:]


# --- parity.py ---


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


@pytest.mark.parametrize(("shift", "status"), [(0.0, None), (0.1, "exceed")])
def test_parity_fails_where_pictures_differ(networks, tmp_path, monkeypatch, capsys, shift, status) -> None:
    generator = networks[0]
    (tmp_path / "model.py").write_text("")

    def pair(module, case, target):
        path = target.with_suffix(".safetensors")
        save_generator(generator, path, dtype=torch.float32)
        return lambda z: generator(z, truncation_psi=benchmarks.parity.TRUNCATION, noise_mode="const") + shift, path

    synthesize, path = pair(None, (), tmp_path / "network")
    apart, value = benchmarks.parity.difference(synthesize, path, 0)
    assert apart == pytest.approx(shift, abs=1e-5) and value > shift
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


# --- editing.py ---


@pytest.fixture
def edited(bundle_copy) -> Path:
    """A bundle with two directions, a classifier and photos."""
    owner = sha256_of(bundle_copy / "generator.safetensors")
    for i, name in enumerate(("smile", "young")):
        normal = np.random.default_rng(i).standard_normal(D)
        normal /= np.linalg.norm(normal)
        direction = EditDirection(name, normal, 0.0, np.tile(normal, (8, 1)), owner)
        write_direction(direction, bundle_copy / "directions" / f"{name}.npz")
    classifier = AttributeClassifier(ATTRIBUTES, 32, "test_resnet")
    classifier.rates[ATTRIBUTES.index("Young")] = 0.8
    save_attributes(classifier, bundle_copy / "second.safetensors")
    write_faces(bundle_copy / "photos.zip", 3)
    return bundle_copy


def test_figures_are_means_over_faces_that_keep_their_correction(edited) -> None:
    bundle, classifier = load_bundle(edited), load_attributes(edited / "second.safetensors")
    lr = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    encoding, steps = bundle.encode(lr), np.ones((8, D)) / 4
    found = benchmarks.editing.Bench(bundle, classifier, None, encoding, lr).measure("smile", steps)
    with torch.inference_mode():
        before = bundle.generate(encoding)[:, 0]
        after = bundle.generate(encoding._replace(ws=encoding.ws + 0.5))[:, 0]
        images = [back_project(before, lr), back_project(after, lr + Downscale(8)(after - before))]
        scores = [classifier.balanced(classifier(((x + 1) * 127.5).round() / 127.5 - 1)).sigmoid() for x in images]
    assert np.allclose(found["changes"], (scores[1] - scores[0]).mean(0).numpy(), atol=1e-4)
    assert found["identity"] is None and found["strength"] == 2
    assert found["target"] == found["changes"][ATTRIBUTES.index("Smiling")]
    assert found["ratio"] == pytest.approx(found["leakage"] / found["target"]) or found["target"] <= 0
    others = [name for name in ATTRIBUTES if name != "Smiling" and name not in found["synonyms"]]
    assert abs(found["largest"][1]) == max(abs(found["changes"][ATTRIBUTES.index(name)]) for name in others)


def test_edits_are_tables_and_a_matrix(edited, tmp_path, monkeypatch, capsys) -> None:

    def missing() -> None:
        raise FileNotFoundError("no weights")

    monkeypatch.setattr(benchmarks.editing, "load_mobilefacenet", missing)
    arguments = ["--bundle", edited, "--classifier", edited / "second.safetensors", "--data", edited / "photos.zip"]
    arguments += ["--generated", 4, "--real", 2, "--lr", 8, "--device", "cpu"]
    for out in ("a", "b"):
        benchmarks.editing.main([str(argument) for argument in (*arguments, "--out", tmp_path / out)])
    assert "| young -2 |" in capsys.readouterr().out
    for name in ("edits.json", "table.md", "matrix.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    results = json.loads((tmp_path / "a" / "edits.json").read_text())["results"]
    assert set(results) == {"2 photos, 8 px", "4 generated faces"}
    assert len(results["4 generated faces"]["raw"]["smile"]["changes"]) == 40


def test_the_classifier_of_the_directions_may_not_judge(edited) -> None:
    direction = read_directions(edited / "directions", ["smile"], None)["smile"]
    direction.about["classifier_sha256"] = sha256_of(edited / "second.safetensors")
    write_direction(direction, edited / "directions" / "smile.npz", overwrite=True)
    with pytest.raises(SystemExit):
        benchmarks.editing.main(["--bundle", str(edited), "--classifier", str(edited / "second.safetensors")])


def test_the_matrix_is_blue_below_and_red_above() -> None:
    picture = matrix_picture([("one", [[0.0, 0.5], [-0.5, 1.0]])], ["a", "b"], ["x", "y"])
    cells = [picture.getpixel((picture.width - 8 - 34 * (2 - x) + 30, picture.height - 8 - 34 * (2 - y) + 2))
             for y in range(2) for x in range(2)]  # fmt: skip
    assert cells[0] == (255, 255, 255) and cells[1][0] > cells[1][2] and cells[2][0] < cells[2][2]


# --- options ---


@pytest.mark.parametrize(
    ("benchmark", "command", "message"),
    [
        (benchmarks.generator, "--rosinality nowhere", "model.py"),
        (benchmarks.generator, "--rounds 0", "at least 1"),
        (benchmarks.parity, "", "clone one"),
        (benchmarks.realism, "--generator x --samples 1", "at least 2"),
        (benchmarks.parity, "--rosinality .", "with model.py in it"),
        (benchmarks.parity, "--nvidia .", "training"),
    ],
)
def test_what_is_missing_is_named(benchmark, command, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(command.split())
    assert message in capsys.readouterr().err
