"""The ONNX export: it computes what torch does, says what it is, and runs where torch cannot be imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import export.onnx
import export.run
import infer
from data.image_io import from_uint8, to_uint8
from data.operator import Downscale, downscaling_error
from data.taps import downscaling_errors, resize
from export.graphs import describe
from export.metadata import ENCODER, FORMAT, GENERATOR, REPORT, from_props, to_props
from export.onnx import export_bundle
from export.parity import BATCHES, ParityError, check, tolerances
from export.session import Models, find_provider, load_models
from models import banded
from models.bundle import Bundle, load_bundle, save_bundle
from models.checkpoints import sha256_of
from models.encoder import Encoder
from models.generator import Generator

ROOT = Path(infer.__file__).parent
SIZE = 128  # the smallest at which the generator draws in bands, which must stay out of exports


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle, exported once: bundle/ and exported/."""
    torch.manual_seed(0)
    generator = Generator(SIZE, channels=(16, 16, 8, 8, 8, 8), z_dim=32, w_dim=32, mapping_layers=2).eval()
    for layer in generator.synthesis.layers:
        torch.nn.init.constant_(layer.noise_strength, 0.1)
    encoder = Encoder(SIZE, generator.num_ws, 32, backbone="test_resnet", width=8, canvas=32).eval()
    encoder.latents.fit(generator, samples=500)
    torch.nn.init.uniform_(encoder.spread)
    path = tmp_path_factory.mktemp("export")
    notes = {"name": "tiny", "licence": "none at all", "training_data": "noise", "lr_sizes": [4, 100]}
    save_bundle(path / "bundle", generator, encoder, notes)

    def refuse(*arguments: object) -> None:
        raise AssertionError("bands in an export")

    write_generator = export.onnx.write_generator
    with pytest.MonkeyPatch.context() as patch:

        def without_bands(bundle: Bundle, folder: Path) -> None:
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(banded, "draw_blocks", refuse)
                write_generator(bundle, folder)

        patch.setattr(export.onnx, "write_generator", without_bands)
        assert export.onnx.main(["--bundle", str(path / "bundle"), "--out", str(path / "exported")]) == 0
    return path


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load_bundle(folder / "bundle")


@pytest.fixture(scope="module")
def models(folder: Path) -> Models:
    return load_models(folder / "exported", threads=1)


def picture(path: Path, width: int = 16, height: int = 16, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def pixels_of(path: Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(int)


def test_report(folder: Path, bundle: Bundle) -> None:
    report = json.loads((folder / "exported" / REPORT).read_text())
    assert report["bundle"] == {"name": "tiny", "hash": sha256_of(folder / "bundle" / "bundle.json")}
    assert {path.name for path in (folder / "exported").iterdir()} == {ENCODER, GENERATOR, REPORT}
    for name, details in report["files"].items():
        path = folder / "exported" / name
        assert details == {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    assert report["tolerance"] == {name: value for name, value in tolerances(SIZE).items() if name != "feedback"}
    assert (report["passes"], report["feedback_canvas"], report["noise_dim"]) == (0, 0, 32)
    for name, allowed in report["tolerance"].items():
        assert list(report["largest_difference"][name]) == [str(batch) for batch in BATCHES]
        assert all(0 <= value <= allowed for value in report["largest_difference"][name].values())


@pytest.mark.parametrize("role", ["encoder", "generator"])
def test_files_say_what_they_are(role: str, folder: Path, bundle: Bundle) -> None:
    path = folder / "exported" / f"{role}.onnx"
    model = onnx.load(path)
    props = {prop.key: prop.value for prop in model.metadata_props}
    assert from_props(props, "here") == describe(bundle, role)
    assert (props["format"], props["licence"], props["resolution"], props["lr_sizes"]) == (
        FORMAT,
        "none at all",
        "128",
        "[4, 100]",
    )
    stored = {tensor.name for tensor in model.graph.initializer}
    needed = [value.name for value in model.graph.input if value.name not in stored]
    assert needed == (["canvas", "lr_size", "noise"] if role == "encoder" else ["ws"])
    for value in model.graph.input:
        assert value.type.tensor_type.shape.dim[0].dim_param == ("noise_batch" if value.name in stored else "batch")
    for trace in (b"site-packages", str(ROOT).encode(), b"encoder.py"):  # of the machine that exported it
        assert trace not in path.read_bytes()


@pytest.mark.parametrize("size", [4, 13, 32, 100])
def test_codes(size: int, bundle: Bundle, models: Models) -> None:
    lr = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(size)) * 2 - 1
    wanted = bundle.encode(lr, 4, np.random.default_rng(5)).numpy()
    got = models.encode(lr.numpy(), 4, np.random.default_rng(5))
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    assert np.abs(wanted[:, 1:] - wanted[:, :1]).max() > 0.01  # the candidates differ at all
    np.testing.assert_allclose(models.encode(lr.numpy(), 1), wanted[:, :1], atol=1e-4)


def test_images(bundle: Bundle, models: Models) -> None:
    ws = bundle.generator.mapping(torch.randn(6, 32, generator=torch.Generator().manual_seed(1))).unflatten(0, (2, 3))
    drawn = models.generate(ws.numpy())
    assert drawn.shape == (2, 3, 3, SIZE, SIZE)
    np.testing.assert_allclose(drawn, bundle.generate(ws).numpy(), atol=1e-4)


@pytest.mark.parametrize("batch", [1, 4])
def test_noise_replaces_the_stored_maps(batch: int, bundle: Bundle, models: Models) -> None:
    ws = bundle.generator.mapping(torch.randn(4, 32, generator=torch.Generator().manual_seed(1)))
    noise = bundle.generator.synthesis.make_noise(batch, torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = bundle.generator.synthesis(ws, noise=noise).numpy()
    drawn = models.generate(ws.numpy(), [maps.numpy() for maps in noise])
    np.testing.assert_allclose(drawn, wanted, atol=1e-4)
    assert np.abs(drawn - models.generate(ws.numpy())).max() > 0.01


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda models: models.encode(np.zeros((1, 3, 8, 9), np.float32)), "Expected floating-point faces"),
        (lambda models: models.encode(np.zeros((1, 3, 8, 8), np.uint8)), "Expected floating-point faces"),
        (lambda models: models.encode(np.zeros((1, 3, 101, 101), np.float32)), "Expected faces of 4 to 100 px"),
        (lambda models: models.encode(np.full((1, 3, 8, 8), np.nan, np.float32)), "NaN"),
        (lambda models: models.encode(np.zeros((1, 3, 8, 8), np.float32), 0), "at least 1 candidate"),
        (lambda models: models.generate(np.zeros((1, 3, 32), np.float32)), "Expected codes"),
        (lambda models: models.generate(np.full((1, 12, 32), np.inf, np.float32)), "finite codes"),
    ],
)
def test_refused_arrays(call: Callable[[Models], object], reason: str, models: Models) -> None:
    with pytest.raises(ValueError, match=reason):
        call(models)


@pytest.mark.parametrize("network", ["encoder", "generator"])
def test_models_that_differ_are_not_written(
    network: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load_bundle(folder / "bundle")
    wrong = other.encoder.latents.w_avg if network == "encoder" else other.generator.synthesis.b64.conv0.bias
    with torch.no_grad():
        wrong += 0.01
    for name in ("encoder", "generator"):
        file = folder / "exported" / f"{name}.onnx"
        monkeypatch.setattr(export.onnx, f"write_{name}", lambda bundle, out, file=file: shutil.copy(file, out))
    with pytest.raises(ParityError, match=f"exported {network} to differ"):
        export_bundle(other, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_earlier_exports_stay(folder: Path, bundle: Bundle, capsys: pytest.CaptureFixture) -> None:
    before = {path.name: path.read_bytes() for path in (folder / "exported").iterdir()}
    with pytest.raises(ValueError, match="encoder.onnx, generator.onnx, export.json exists; --overwrite"):
        export_bundle(bundle, folder / "exported")
    assert export.onnx.main(["--bundle", str(folder), "--out", str(folder / "new")]) == 1
    assert "bundle.json" in capsys.readouterr().err and not (folder / "new").exists()
    assert {path.name: path.read_bytes() for path in (folder / "exported").iterdir()} == before


def test_tolerances() -> None:
    same = {name: {"1": 0.0} for name in tolerances(64)}
    check(same, 64)
    for value in (2e-4, float("nan")):
        with pytest.raises(ParityError, match="generator"):
            check({**same, "generator": {"1": value}}, 64)
    check({**same, "generator": {"1": 9e-4}}, 1024)
    with pytest.raises(ParityError, match="encoder"):
        check({**same, "encoder": {"1": 9e-4}}, 1024)


WITHOUT_TORCH = """
import importlib.abc, runpy, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "lightning", "timm", "onnx", "tqdm", "scipy"):
            raise ImportError(f"{name} is not to be imported")

sys.meta_path.insert(0, Refuse())
runpy.run_module("export.run", run_name="__main__")
"""


def test_same_faces_without_torch(folder: Path, tmp_path: Path) -> None:
    """The same files as infer.py, in a process in which torch cannot be imported."""
    (tmp_path / "bad.png").write_text("no picture")
    faces = [picture(tmp_path / "a.png"), picture(tmp_path / "b.png", 90, 70, seed=1), tmp_path / "bad.png"]
    options = [*map(str, faces), "--k", "3", "--seed", "7"]
    command = [*options, "--model", str(folder / "exported"), "--out", str(tmp_path / "onnx"), "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    assert done.returncode == 1, done.stderr
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == ["warning", str(tmp_path / "bad.png")]
    torch_options = ["--bundle", str(folder / "bundle"), "--out", str(tmp_path / "torch"), "--device", "cpu"]
    assert infer.main([*options, *torch_options]) == 1

    files = {path.relative_to(tmp_path / "torch") for path in (tmp_path / "torch").rglob("*") if path.is_file()}
    assert {path.relative_to(tmp_path / "onnx") for path in (tmp_path / "onnx").rglob("*") if path.is_file()} == files
    assert len(files) == 2 * 8 + 1
    for path in files:
        ours, theirs = tmp_path / "onnx" / path, tmp_path / "torch" / path
        if path.suffix == ".png" and path.stem.isdigit():
            assert np.abs(pixels_of(ours) - pixels_of(theirs)).max() <= 1
        elif path.name == "input.png":
            assert ours.read_bytes() == theirs.read_bytes()
        elif path.name == "latents.npz":
            np.testing.assert_allclose(np.load(ours)["ws"], np.load(theirs)["ws"], atol=1e-4)
        elif path.name == "timing.json":
            assert json.loads(ours.read_text()).keys() == json.loads(theirs.read_text()).keys()
        elif path.name == "report.json":
            assert_same_report(json.loads(ours.read_text()), json.loads(theirs.read_text()))


def assert_same_report(ours: dict, theirs: dict) -> None:
    mine, wanted = ours.pop("candidates"), theirs.pop("candidates")
    assert ours == theirs
    for a, b in zip(mine, wanted, strict=True):
        assert a.pop("downscaling_error") == pytest.approx(b.pop("downscaling_error"), rel=1e-2)
        assert a == b


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs export.run on files in tmp_path, results in tmp_path/out."""

    def call(*arguments: str | Path, model: Path = folder / "exported") -> int:
        options = ["--model", model, "--out", tmp_path / "out", "--threads", "1"]
        return export.run.main([str(argument) for argument in (*options, *arguments)])

    return call


def test_downscale_as_infer_does(run: Callable[..., int], folder: Path, tmp_path: Path) -> None:
    photo = picture(tmp_path / "photo.png", 200, 160)
    assert run(photo, "--k", "1", "--downscale", "8") == 0
    options = ["--bundle", str(folder / "bundle"), "--out", str(tmp_path / "torch"), "--device", "cpu"]
    assert infer.main([str(photo), "--k", "1", "--downscale", "8", *options]) == 0
    ours, theirs = (pixels_of(tmp_path / out / "photo" / "input.png") for out in ("out", "torch"))
    assert ours.shape == (8, 8, 3) and np.abs(ours - theirs).max() <= 1
    assert run(photo, "--k", "1", "--overwrite") == 1  # too large without


def test_seed_and_overwrite(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    face = picture(tmp_path / "face.png")
    written = []
    for seed in ("3", "3", "4"):
        assert run(face, "--k", "2", "--seed", seed, "--overwrite") == 0
        written.append([(tmp_path / "out" / "face" / f"{i}.png").read_bytes() for i in (1, 2)])
    assert written[0] == written[1]
    assert written[0][0] == written[2][0] and written[0][1] != written[2][1]  # the best guess does not depend on it
    assert run(face, "--k", "2") == 1
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--k", "0"],
        ["--k", "65"],
        ["--seed", "-1"],
        ["--threads", "-1"],
        ["--provider", "toaster"],
        ["--downscale", "3"],
        ["--downscale", "101"],
        ["--out", ""],
        ["--model", ""],
    ],
)
def test_wrong_options(options: list[str], run: Callable[..., int], tmp_path: Path) -> None:
    path = picture(tmp_path / "face.png")
    with pytest.raises(SystemExit) as stop:
        run(path, *options)
    assert stop.value.code == 2 and not (tmp_path / "out").exists()


def test_nothing_to_do(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(tmp_path / "nowhere.png") == 1
    assert not (tmp_path / "out").exists()


def other_bundle(path: Path) -> None:
    model = onnx.load(path)
    props = {prop.key: prop.value for prop in model.metadata_props}
    onnx.helper.set_model_props(model, {**props, "bundle_sha256": "0" * 64})
    onnx.save(model, path)


def unknown_format(path: Path) -> None:
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda path: path.unlink(), "no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "onnxruntime cannot open it"),
        (lambda path: shutil.copy(path.with_name(ENCODER), path), "found the encoder"),
        (other_bundle, "expected models of one bundle"),
        (unknown_format, "export.onnx"),
    ],
)
def test_models_that_cannot_be_used(
    break_it: Callable[[Path], object],
    reason: str,
    run: Callable[..., int],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    shutil.copytree(folder / "exported", tmp_path / "models")
    break_it(tmp_path / "models" / GENERATOR)
    assert run(picture(tmp_path / "face.png"), model=tmp_path / "models") == 1
    errors = capsys.readouterr().err
    assert reason in errors and str(tmp_path / "models") in errors and errors.count("\n") == 1


def test_metadata_round_trip(bundle: Bundle) -> None:
    about = describe(bundle, "encoder")
    props = to_props(about)
    assert all(isinstance(value, str) for value in props.values()) and from_props(props, "here") == about
    with pytest.raises(ValueError, match="here: its metadata is damaged"):
        from_props({**props, "lr_sizes": "4"}, "here")


def test_providers_by_name() -> None:
    assert find_provider("cpu") == find_provider("CPUExecutionProvider") == "CPUExecutionProvider"
    with pytest.raises(ValueError, match="expected one of .*cpu.*, got 'toaster'"):
        find_provider("toaster")


def test_arrays_as_tensors() -> None:
    """What is written for arrays agrees with what is written for tensors."""
    levels = torch.linspace(-1.2, 1.2, 3 * 40 * 40).reshape(1, 3, 40, 40)
    assert np.array_equal(to_uint8(levels.numpy()), to_uint8(levels).numpy())
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert np.array_equal(from_uint8(every.numpy()), from_uint8(every).numpy())
    for size in (7, 10, 40):
        lr = Downscale(size)(levels)
        np.testing.assert_allclose(resize(levels.numpy(), size), lr.numpy(), atol=1e-6)
        faces = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(size))
        wanted = downscaling_error(faces, lr, Downscale(size))
        np.testing.assert_allclose(downscaling_errors(faces.numpy(), lr[0].numpy()), wanted, rtol=1e-5)
    with pytest.raises(ValueError, match="floating-point"):
        to_uint8(np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="uint8"):
        from_uint8(np.zeros((3, 4, 4), np.float32))
    with pytest.raises(ValueError, match="square"):
        resize(np.zeros((3, 4, 5), np.float32), 4)
