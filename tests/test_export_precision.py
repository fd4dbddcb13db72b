"""Smaller models: what they store, what they lose, and what is refused; and both models in one file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import export.onnx
import export.quality
import export.run
import infer
from data.taps import resize
from editing.boundary import Boundary, write_boundary
from export.fused import fuse
from export.metadata import BOUNDARIES, ENCODER, GENERATOR, REPORT, TIMING, UPSAMPLE, from_props
from export.onnx import export_bundle
from export.page import EDITS, assemble, make_page
from export.precision import quantize, store_half
from export.quality import QualityError, calibration, check_quality, compare, sharp_faces
from export.runtime import exported
from export.session import Models, load_models
from models.bundle import Bundle, load_bundle, save_bundle
from models.encoder import Encoder
from models.generator import Generator

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle, exported once: bundle/ and exported/."""
    torch.manual_seed(0)
    generator = Generator(SIZE, channels=(16, 16, 8, 8), z_dim=32, w_dim=32, mapping_layers=2).eval()
    encoder = Encoder(SIZE, generator.num_ws, 32, backbone="test_resnet", width=8, canvas=32).eval()
    encoder.latents.fit(generator, samples=500)
    path = tmp_path_factory.mktemp("precision")
    notes = {"name": "tiny", "licence": "none at all", "training_data": "noise", "lr_sizes": [4, 32]}
    save_bundle(path / "bundle", generator, encoder, notes)
    export_bundle(load_bundle(path / "bundle"), path / "exported")
    return path


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load_bundle(folder / "bundle")


@pytest.fixture(scope="module")
def models(folder: Path) -> Models:
    return load_models(folder / "exported", threads=1)


@pytest.fixture
def traced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the tracing, which is tested elsewhere: the models that were exported once are copied."""
    for role in ("encoder", "generator"):
        file = folder / "exported" / f"{role}.onnx"
        monkeypatch.setattr(export.onnx, f"write_{role}", lambda bundle, out, file=file: shutil.copy(file, out))


def network(weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Conv, Relu, Flatten, Gemm; and an input `scale` with a default, by which the result is multiplied."""
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["a"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("Flatten", ["b"], ["c"], "flatten"),
        helper.make_node("Gemm", ["c", "matrix"], ["d"], "gemm"),
        helper.make_node("Mul", ["d", "scale"], ["y"], "mul"),
    ]
    inputs = [("x", ["batch", 16, 8, 8]), ("scale", list(weights["scale"].shape))]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", weights["matrix"].shape[1]])
    stored = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "net", values, [output], stored), opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 10
    helper.set_model_props(model, {"name": "test"})
    return model


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (128, 16, 3, 3), "matrix": (8192, 100), "scale": (1, 100)}
    return {name: (rng.standard_normal(shape) / 50).astype(np.float32) for name, shape in shapes.items()}


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


def test_half_weights_are_rounded_and_nothing_else() -> None:
    given, x = weights(), np.random.default_rng(1).standard_normal((2, 16, 8, 8)).astype(np.float32)
    rounded = {n: a.astype(np.float16).astype(np.float32) if n != "scale" else a for n, a in given.items()}
    model = store_half(network(given))
    onnx.checker.check_model(model)
    assert model.ByteSize() < 0.51 * network(given).ByteSize()
    np.testing.assert_allclose(run(model, x), run(network(rounded), x), rtol=1e-6, atol=1e-7)
    scaled = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x, "scale": 2 * given["scale"]})
    np.testing.assert_allclose(scaled[0], 2 * run(model, x), rtol=1e-6)  # still an input, with its default


def test_weights_beyond_half_stay() -> None:
    given = weights()
    given["matrix"][0, 0] = 1e6
    model = store_half(network(given))
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds["matrix"] == kinds["scale"] == TensorProto.FLOAT and kinds["kernel_half"] == TensorProto.FLOAT16


def test_int8_is_close_and_small() -> None:
    given, rng = weights(), np.random.default_rng(1)
    batches = [{"x": rng.standard_normal((4, 16, 8, 8)).astype(np.float32)} for _ in range(8)]
    model = quantize(network(given), batches)
    assert model.ByteSize() < 0.27 * network(given).ByteSize()
    assert {prop.key: prop.value for prop in model.metadata_props} == {"name": "test"}
    x = rng.standard_normal((4, 16, 8, 8)).astype(np.float32)
    wanted, got = run(network(given), x), run(model, x)
    error = np.sqrt(np.square(got - wanted).mean() / np.square(wanted).mean())
    assert 1e-4 < error < 0.05


def test_int8_needs_faces_and_products() -> None:
    with pytest.raises(ValueError, match="Expected faces to calibrate on|No data"):
        quantize(network(weights()), [])
    small = {"kernel": np.ones((2, 16, 3, 3), np.float32), "matrix": np.ones((128, 3), np.float32)}
    with pytest.raises(ValueError, match="found none"):
        quantize(network(small | {"scale": np.ones((1, 3), np.float32)}), [])


def test_calibration_covers_the_sizes(models: Models, bundle: Bundle) -> None:
    faces, others = sharp_faces(bundle, None)
    assert faces.shape == (128, 3, SIZE, SIZE) and others.shape == (64, 3, SIZE, SIZE)
    assert np.array_equal(faces, sharp_faces(bundle, None)[0]) and not np.array_equal(faces[:64], others)
    inputs = list(calibration(models, faces))
    sizes = np.array([row["lr_size"][0] for row in inputs])
    assert len(inputs) == 128 and sizes.min() == 4 and sizes.max() > 28 and len(set(sizes)) > 10
    first = resize(faces[0], int(sizes[0])).clip(-1, 1)
    np.testing.assert_allclose(inputs[0]["canvas"][0], resize(first, 32), atol=2.5 / 255)  # but for 8 bit
    for row in inputs[:2]:
        assert models.encode_canvas(row["canvas"], row["lr_size"], row["noise"]).shape == (
            1,
            3,
            models.about.num_ws,
            32,
        )


def test_faces_of_ones_own(tmp_path: Path, bundle: Bundle) -> None:
    for i in range(6):
        Image.new("RGB", (40, 40), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    faces, others = sharp_faces(bundle, tmp_path)
    assert (len(faces), len(others)) == (4, 2) and faces.shape[1:] == (3, SIZE, SIZE)
    for i in range(1, 6):
        (tmp_path / f"{i}.png").unlink()
    with pytest.raises(ValueError, match="at least 3 faces"):
        sharp_faces(bundle, tmp_path)


def measures(monkeypatch: pytest.MonkeyPatch, lpips: Callable | None = None) -> None:
    """Replaces the networks that measure, whose weights a test does not download."""
    mean = lpips or (lambda images, truth: float(np.abs(images - truth).mean()))
    monkeypatch.setattr(export.quality, "_lpips", mean)
    monkeypatch.setattr(export.quality, "_identity", lambda images, truth: 1 - float(np.abs(images - truth).mean()))


def test_compare(models: Models, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    measures(monkeypatch)
    _, faces = sharp_faces(bundle, None)
    same = compare(models, models, faces[:8])
    assert same["lpips"]["loss"] == same["identity"]["loss"] == same["pixels_rms"] == 0
    assert same["lr_sizes"] == [8, 16, 32] and same["faces"] == 8

    class Blurred(Models):
        def generate(self, ws: np.ndarray, noise: Any = None) -> np.ndarray:
            return super().generate(ws, noise) * 0.5

    worse = compare(models, Blurred(**vars(models)), faces[:8])
    assert worse["pixels_rms"] > 0.01 and worse["lpips"]["this"] != worse["lpips"]["fp32"]
    assert worse["lpips"]["loss"] == pytest.approx(worse["identity"]["loss"])


def test_what_is_missing_is_said(models: Models, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(images: np.ndarray, truth: np.ndarray) -> float:
        raise FileNotFoundError("put it there")

    measures(monkeypatch, absent)
    found = compare(models, models, sharp_faces(bundle, None)[1][:2])
    assert found["lpips"] is None and found["missing"] == ["lpips: put it there"] and found["identity"]["loss"] == 0
    check_quality(found, "int8")


@pytest.mark.parametrize("loss", [0.0101, float("nan")])
def test_losses_are_refused(loss: float) -> None:
    check_quality({"lpips": {"loss": 0.0099}}, "int8")
    with pytest.raises(QualityError, match="int8 to cost at most 0.01 of LPIPS.*nothing was written"):
        check_quality({"lpips": {"loss": loss}}, "int8")


@pytest.mark.usefixtures("traced")
def test_export_int8_then_fp32(
    folder: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    measures(monkeypatch)
    out = tmp_path / "out"
    names = {ENCODER, GENERATOR, UPSAMPLE, REPORT, TIMING}
    command = ["--bundle", str(folder / "bundle"), "--out", str(out), "--precision", "int8", "--fused"]
    assert export.onnx.main(command) == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("of the size", "lpips on 64 faces", "identity on", "pixels differ by"))
    assert {path.name for path in out.iterdir()} == names
    report = json.loads((out / REPORT).read_text())
    assert report["precision"]["name"] == "int8" and report["precision"]["faces_from"] == "the bundle's generator"
    assert "seconds" not in report["precision"] and set(json.loads((out / TIMING).read_text())) == {
        "encode",
        "generate",
    }
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(out / ENCODER).graph.node}
    assert "QuantizeLinear" not in {node.op_type for node in onnx.load(out / GENERATOR).graph.node}
    for name in (ENCODER, GENERATOR):
        assert report["files"][name]["bytes"] == (out / name).stat().st_size < report["precision"]["bytes_fp32"][name]
    small = load_models(out, threads=1)
    assert small.about == load_models(folder / "exported", threads=1).about

    export_bundle(bundle, out, overwrite=True)  # what the first export had more of is gone
    assert {path.name for path in out.iterdir()} == {ENCODER, GENERATOR, REPORT}


@pytest.mark.usefixtures("traced")
def test_a_loss_leaves_nothing(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([0.1, 0.2])
    measures(monkeypatch, lambda images, truth: next(losses))
    with pytest.raises(QualityError):
        export_bundle(bundle, tmp_path / "out", precision="fp16")
    assert not list((tmp_path / "out").iterdir())


def test_faces_are_for_smaller_models(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        export.onnx.main(["--out", str(tmp_path), "--faces", str(tmp_path)])
    assert stop.value.code == 2


@pytest.mark.parametrize(("batch", "samples"), [(1, 1), (2, 3)])
def test_fused(batch: int, samples: int, folder: Path, models: Models) -> None:
    model = fuse(*(onnx.load(folder / "exported" / name) for name in (ENCODER, GENERATOR)))
    about = from_props({prop.key: prop.value for prop in model.metadata_props}, "here")
    assert about.role == "upsample" and set(about.values) >= {"canvas", "lr_size", "noise", "images", "ws"}
    rng = np.random.default_rng(0)
    inputs = {
        "canvas": rng.uniform(-1, 1, (batch, 3, 32, 32)).astype(np.float32),
        "lr_size": np.full(batch, 8, np.float32),
        "noise": rng.standard_normal((batch, samples, 32)).astype(np.float32),
    }
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert [value.name for value in session.get_inputs()] == list(inputs)
    images, ws = session.run(["images", "ws"], inputs)
    wanted = models.encode_canvas(*inputs.values())
    np.testing.assert_allclose(ws, wanted, atol=1e-5)
    assert images.shape == (batch, samples + 1, 3, SIZE, SIZE)
    np.testing.assert_allclose(images, models.generate(wanted), atol=1e-5)


@pytest.mark.usefixtures("traced")
def test_boundaries_go_along(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    normal = np.eye(32)[0]
    (tmp_path / BOUNDARIES).mkdir()
    write_boundary(Boundary("smile", normal, 0.0, 2 * normal, (0, 4), "0" * 64), tmp_path / BOUNDARIES / "smile.npz")
    out = tmp_path / "out"
    export_bundle(bundle, out, boundaries=tmp_path / BOUNDARIES)
    assert (out / BOUNDARIES / "smile.npz").read_bytes() == (tmp_path / BOUNDARIES / "smile.npz").read_bytes()
    export_bundle(bundle, out, overwrite=True)
    assert not (out / BOUNDARIES).exists()


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    """A stand-in for the npm package, whose files are only copied here."""
    (tmp_path / "npm" / "dist").mkdir(parents=True)
    for name in export.page.RUNTIME_FILES:
        (tmp_path / "npm" / "dist" / name).write_text(name)
    return tmp_path / "npm"


def test_page_is_one_folder(folder: Path, tmp_path: Path, runtime: Path) -> None:
    files = assemble(folder / "exported", tmp_path / "page", runtime)
    assert files == {str(p.relative_to(tmp_path / "page")): p.stat().st_size for p in (tmp_path / "page").rglob("*.*")}
    assert {"index.html", "app.js", "models/encoder.onnx", f"models/{EDITS}", "samples/index.json"} <= set(files)
    assert not [name for name in files if "node_modules" in name or name.endswith("package.json")]
    for path in (tmp_path / "page").glob("*.*"):  # nothing comes from elsewhere
        assert "://" not in path.read_text().replace("http://www.w3.org/2000/svg", ""), path
    with pytest.raises(FileNotFoundError, match="npm ci"):
        assemble(folder / "exported", tmp_path / "other", tmp_path / "nowhere")
    assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("traced")
def test_page_is_replaced_and_strangers_are_not(
    folder: Path, tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measures(monkeypatch)
    monkeypatch.setattr(export.page, "RUNTIME", runtime)
    monkeypatch.setattr(export.page.assemble, "__defaults__", (runtime, None))
    out = tmp_path / "page"
    make_page(folder / "bundle", out)
    report = json.loads((out / "models" / REPORT).read_bytes())
    assert report["precision"]["name"] == "fp16"
    (out / "old.js").write_text("")
    monkeypatch.setattr(export.onnx, "write_encoder", None)  # a second export would fail
    make_page(folder / "bundle", out)
    assert not (out / "old.js").exists() and json.loads((out / "models" / REPORT).read_bytes()) == report
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="no page of ours"):
        make_page(folder / "bundle", tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


@pytest.mark.usefixtures("traced")
def test_bundles_are_exported_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert exported(folder / "exported", tmp_path) == folder / "exported"
    first = exported(folder / "bundle", tmp_path)
    assert load_models(first, threads=1).about == load_models(folder / "exported", threads=1).about
    (first / REPORT).unlink()  # as after a kill
    assert exported(folder / "bundle", tmp_path) == first and (first / REPORT).is_file()
    monkeypatch.setattr(export.onnx, "write_encoder", None)  # another export would fail
    assert exported(folder / "bundle", tmp_path) == first
    with pytest.raises(FileNotFoundError):
        exported(tmp_path / "nowhere", tmp_path)


def test_infer_by_onnx(folder: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "-face.png")  # no option
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    options = ["--k", "2", "--seed", "3", "--downscale", "6", "--out"]
    given = [str(tmp_path / "-face.png"), str(tmp_path / "photo.png")]
    command = [*given, *options, str(tmp_path / "a"), "--runtime", "onnx", "--bundle", str(folder / "exported")]
    assert infer.main(command) == 0 and infer.main(command) == 1 and infer.main([*command, "--overwrite"]) == 0
    assert export.run.main([*given, *options, str(tmp_path / "b"), "--model", str(folder / "exported")]) == 0
    for name in ("photo/1.png", "photo/2.png", "photo/report.json", "overview.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("option", [["--refine", "3"], ["--start", "mean"], ["--device", "cuda"], ["--epsilon", "0.1"]])
def test_what_onnx_cannot_do(option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        infer.main([str(tmp_path / "face.png"), "--runtime", "onnx", *option])
    assert stop.value.code == 2 and f"error: {option[0]}" in capsys.readouterr().err
