"""The exported graph: it computes what torch does, says what it is, and runs where torch cannot be imported."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import export.detector
import export.onnx
import export.page
from data.face_finder import FaceFinder
from data.ffhq_crop import ffhq_square
from data.image_io import from_uint8, read_image, to_picture
from data.noise import face_noise
from data.operator import Downscale, resize_matrix, trusted_part
from evaluation.metrics import lr_psnr
from export import graph
from export.onnxruntime_backend import FORMAT, OnnxBackend, find_provider
from export.parity import check, upsample
from export.quantise import FP16, INT8, store
from export.synthesis import synthesize
from models.bundle import Bundle, load_bundle, save_bundle
from models.encoder import Encoder
from models.generator import Generator
from pipeline import Upsampler
from pipeline.onnx_backend import find_model

ROOT = Path(__file__).resolve().parents[1]
SIZE = 32
ORT = os.environ.get("ORT", "")
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle whose every part counts, exported once: bundle/ and upsampler.onnx."""
    torch.manual_seed(0)
    generator = Generator(SIZE, channels=(16, 16, 8, 8), z_dim=32, w_dim=32, mapping_layers=2).eval()
    for layer in generator.synthesis.layers:
        torch.nn.init.constant_(layer.noise_strength, 0.1)
    settings = {"backbone": "test_resnet", "width": 8, "hidden": 16, "head_rank": 4}
    encoder = Encoder(SIZE, generator.num_ws, 32, generator.channels, **settings).eval()
    encoder.latents.fit(generator, samples=500)
    for head in encoder.details:
        torch.nn.init.normal_(head.out.weight, std=0.3)
    torch.nn.init.constant_(encoder.noise_estimator.layers[4].bias, 3.5)  # some 30 grey levels
    path = tmp_path_factory.mktemp("export")
    save_bundle(
        path / "bundle", generator, encoder, {"name": "tiny", "licence": "none at all", "training_data": "noise"}
    )
    command = ["--bundle", str(path / "bundle"), "--out", str(path / "upsampler.onnx")]
    assert export.onnx.main(command) == 0
    with pytest.raises(SystemExit, match="2"):  # not without --overwrite
        export.onnx.main(command)
    return path


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load_bundle(folder / "bundle")


@pytest.fixture(scope="module")
def backend(folder: Path) -> OnnxBackend:
    return OnnxBackend(folder / "upsampler.onnx", threads=1)


def faces(batch: int, size: int) -> np.ndarray:
    pixels = np.random.default_rng(size).integers(30, 226, (batch, 3, size, size), dtype=np.uint8)
    return from_uint8(pixels)


@pytest.mark.parametrize("size", range(4, SIZE + 1))
def test_every_size(size: int, bundle: Bundle, backend: OnnxBackend) -> None:
    lr, edit = faces(2, size), np.random.default_rng(1).normal(0, 0.2, (2, 8, 32)).astype(np.float32)
    for k, fidelity, sigma, strength, preserve in (
        (1, 1.0, 0.0, 0, False),
        (3, 0.5, 12.0, 1, False),
        (2, 1.0, 12.0, 1, True),
    ):
        noise = face_noise(lr, k, backend.about.noise_dim, seed=1)
        got = backend.sample(lr, noise, fidelity, sigma, strength * edit, preserve)
        tensors = (torch.from_numpy(lr), torch.from_numpy(noise), fidelity, torch.full((2,), sigma))
        images, ws = upsample(bundle, *tensors, torch.from_numpy(strength * edit), preserve)
        assert np.abs(got.images - images.numpy()).max() < 2 / 255
        np.testing.assert_allclose(got.ws, ws, atol=1e-4)
        np.testing.assert_allclose(got.lr_psnr, lr_psnr(torch.from_numpy(got.images), torch.from_numpy(lr)), atol=0.05)
        assert got.sigma.tolist() == [sigma, sigma]
        if strength == 0:
            raw = bundle.generate(bundle.encoder(*tensors[:2]))
            missing = (Downscale(size)(raw.flatten(0, 1)) - tensors[0]) / 2
            np.testing.assert_allclose(got.residual[:, 0], missing.square().mean(dim=(1, 2, 3)), rtol=1e-3)


def test_an_edit_keeps_the_correction(backend: OnnxBackend) -> None:
    """An edit shows in the downscaled picture unless it is to be preserved; no edit is the ordinary projection."""
    lr = faces(1, 8)
    noise = face_noise(lr, 2, backend.about.noise_dim, 0)
    plain = backend.sample(lr, noise, sigma=0)
    edited, preserved = (backend.sample(lr, noise, 1, 0, np.full((8, 32), 0.3), keep) for keep in (False, True))
    assert np.abs(edited.images - plain.images).max() > 0.1
    assert (edited.lr_psnr < plain.lr_psnr - 3).all() and (preserved.lr_psnr > edited.lr_psnr + 3).all()
    np.testing.assert_allclose(edited.ws - plain.ws, 0.3, atol=1e-5)


def test_noise_is_estimated(bundle: Bundle, backend: OnnxBackend) -> None:
    lr = faces(2, 8)
    estimated = bundle.encoder.noise_level(torch.from_numpy(lr)).tolist()
    found = backend.sample(lr, face_noise(lr, 1, backend.about.noise_dim, 0), sigma=np.array([-1.0, 3.0])).sigma
    assert found.tolist() == pytest.approx([estimated[0], 3.0], rel=1e-4) and estimated[0] > 5


@pytest.mark.parametrize(("size_in", "size_out"), [(64, 21), (64, 63), (63, 21), (9, 64), (333, 16), (64, 64)])
def test_the_operator_by_its_formula(size_in: int, size_out: int) -> None:
    wanted = resize_matrix(size_in, size_out)
    found = graph.resize_matrix(size_in, size_out)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    if size_out < size_in:
        inverse = found.T @ graph.inverse(found @ found.T)
        torch.testing.assert_close(inverse, torch.linalg.pinv(wanted), atol=1e-4, rtol=0)
        residual = torch.randn(2, 1, 3, size_out, size_out, generator=torch.Generator().manual_seed(0)) * 0.2
        ratio = torch.tensor([0.0, 0.5])
        trusted = graph.trusted_part(residual, found @ found.T, ratio[:, None, None, None, None])
        torch.testing.assert_close(trusted[:, 0], trusted_part(residual[:, 0], size_in, ratio), atol=1e-3, rtol=0)


@pytest.mark.parametrize("conv_clamp", [None, 0.7])
def test_the_exported_form_of_the_generator(conv_clamp: float | None) -> None:
    torch.manual_seed(0)
    synthesis = Generator(32, (24, 16, 12, 8), z_dim=16, w_dim=16, mapping_layers=1, conv_clamp=conv_clamp).synthesis
    for layer in synthesis.layers:
        torch.nn.init.normal_(layer.bias)
        torch.nn.init.constant_(layer.noise_strength, 0.3)
    ws, details = torch.randn(3, synthesis.num_ws, 16), {8: torch.randn(3, 16, 8, 8)}
    torch.testing.assert_close(synthesize(synthesis, ws, details), synthesis(ws, details=details), atol=1e-5, rtol=1e-5)


def test_the_file_says_what_it_is(folder: Path, bundle: Bundle, backend: OnnxBackend) -> None:
    path = folder / "upsampler.onnx"
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    about = backend.about
    assert (about.name, about.bundle_sha256, about.licence) == ("tiny", bundle.hash, "none at all")
    assert (about.lr_sizes, about.edits, about.noise_dim) == ((4, SIZE), (), bundle.encoder.noise_dim)
    assert [value.name for value in (*model.graph.input, *model.graph.output)] == list(export.onnx.DESCRIPTIONS)
    assert all(value.doc_string for value in (*model.graph.input, *model.graph.output)) and model.doc_string
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [
        *("batch", 3, "lr_size", "lr_size")
    ]
    content = path.read_bytes()
    for trace in (b"site-packages", str(ROOT).encode(), b'File "'):  # of the machine that exported it
        assert trace not in content
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names) and any(name.startswith("encoder.sampler.seen/Gemm") for name in names)


@pytest.mark.parametrize("precision", [FP16, INT8])
def test_smaller_files(precision: str, folder: Path, backend: OnnxBackend, tmp_path: Path) -> None:
    smaller = tmp_path / "smaller.onnx"
    onnx.save(store(onnx.load(folder / "upsampler.onnx"), precision), smaller)
    assert smaller.stat().st_size < 0.75 * (folder / "upsampler.onnx").stat().st_size
    lr = faces(2, 16)
    noise = face_noise(lr, 2, backend.about.noise_dim, 0)
    before, after = (b.sample(lr, noise, sigma=0) for b in (backend, OnnxBackend(smaller)))
    assert np.sqrt(np.square(before.images - after.images).mean()) * 127.5 < export.parity.PIXELS_ALLOWED[precision]
    with pytest.raises(ValueError, match="differ from torch by at most"):
        check({"pixels_rms": float("nan")}, precision)


WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "torchvision", "timm", "onnx", "lightning", "scipy"):
    sys.modules[name] = None  # importing it fails
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_infer_without_torch(folder: Path, tmp_path: Path) -> None:
    """The same samples as with torch, from another folder, in a process in which torch cannot be imported."""
    for name, lr in zip("ab", faces(2, 16), strict=True):
        to_picture(lr).save(tmp_path / f"{name}.png")
    command = [sys.executable, "-c", WITHOUT_TORCH, str(ROOT / "infer.py"), "a.png", "b.png", "-k", "3", "--seed", "7"]
    done = subprocess.run(
        [*command, "--runtime", "onnx", "--bundle", str(folder)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wanted = Upsampler.from_pretrained(folder / "bundle", "cpu")(faces(2, 16), 3, seed=7)
    for row, name in enumerate("ab"):
        for i in range(3):
            made = read_image(tmp_path / "out" / name / f"{i + 1}.png")
            assert np.abs(made - wanted.images[row, i]).max() < 2.1 / 127.5
        report = json.loads((tmp_path / "out" / name / "report.json").read_text())
        assert report["samples"][0]["lr_psnr"] == pytest.approx(float(wanted.lr_psnr[row, 0]), abs=0.1)


def test_both_runtimes_edit_alike(folder: Path) -> None:
    edit = np.random.default_rng(0).normal(0, 0.2, (8, 32)).astype(np.float32)
    onnx_samples, torch_samples = (
        Upsampler.from_pretrained(path, "cpu", runtime)(faces(2, 12), 2, 0, 0.8, 10.0, edit)
        for path, runtime in ((folder, "onnx"), (folder / "bundle", "torch"))
    )
    assert np.abs(onnx_samples.images - torch_samples.images).max() < 2.1 / 127.5
    for name in ("ws", "residual", "sigma"):
        np.testing.assert_allclose(getattr(onnx_samples, name), getattr(torch_samples, name), atol=1e-4)


@pytest.mark.parametrize(
    ("lr", "noise", "reason"),
    [
        (np.zeros((1, 3, 8, 9), np.float32), (1, 1, 256), "Expected floating-point faces"),
        (np.zeros((1, 3, 8, 8), np.uint8), (1, 1, 256), "Expected floating-point faces"),
        (np.zeros((1, 3, 33, 33), np.float32), (1, 1, 256), "Expected faces of 4 to 32 px"),
        (np.full((1, 3, 8, 8), np.nan, np.float32), (1, 1, 256), "NaN"),
        (np.zeros((1, 3, 8, 8), np.float32), (1, 0, 256), "Expected noise"),
        (np.zeros((2, 3, 8, 8), np.float32), (1, 1, 256), "Expected noise"),
    ],
)
def test_refused_arrays(lr: np.ndarray, noise: tuple[int, ...], reason: str, backend: OnnxBackend) -> None:
    with pytest.raises(ValueError, match=reason):
        backend.sample(lr, np.zeros(noise, np.float32))


def test_refused_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        OnnxBackend(tmp_path / "nowhere.onnx")
    model = onnx.load(folder / "upsampler.onnx")
    onnx.helper.set_model_props(model, {"format": "another"})
    onnx.save(model, tmp_path / "another.onnx")
    with pytest.raises(ValueError, match=f"expected a model of the format '{FORMAT}', found 'another'"):
        OnnxBackend(tmp_path / "another.onnx")
    (tmp_path / "cut.onnx").write_bytes((folder / "upsampler.onnx").read_bytes()[:1000])
    with pytest.raises(ValueError, match="onnxruntime cannot open it"):
        OnnxBackend(tmp_path / "cut.onnx")
    with pytest.raises(FileNotFoundError, match="neither upsampler.onnx nor bundle.json"):
        find_model(tmp_path)


def test_bundles_are_exported_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def write(bundle: Path, out: Path, overwrite: bool) -> None:
        made.append(shutil.copy(folder / "upsampler.onnx", out))

    monkeypatch.setattr(export.onnx, "write_model", write)
    assert find_model(folder / "bundle", tmp_path) == find_model(folder / "bundle", tmp_path) == Path(made[0])
    assert len(made) == 1


def test_the_provider_that_runs_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert find_provider("cpu") == find_provider("CPUExecutionProvider") == "CPUExecutionProvider"
    with pytest.raises(ValueError, match="providers .*cpu.*, got 'toaster'"):
        find_provider("toaster")
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["AzureExecutionProvider", "FakeExecutionProvider"]
    )
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers, real=onnxruntime.InferenceSession: real(
            path, options, ["CPUExecutionProvider"]
        ),
    )
    assert OnnxBackend(folder / "upsampler.onnx", "fake").provider == "CPUExecutionProvider"
    assert "FakeExecutionProvider cannot start here; CPUExecutionProvider runs" in caplog.text


def test_a_model_that_differs_is_not_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(folder / "upsampler.onnx")
    for weight in model.graph.initializer:
        if weight.name == "encoder.latents.w_avg":
            weight.CopyFrom(onnx.numpy_helper.from_array(np.ones(32, np.float32), weight.name))
    monkeypatch.setattr(export.onnx, "export_bundle", lambda *arguments: model)
    with pytest.raises(ValueError, match="differ from torch"):
        export.onnx.write_model(folder / "bundle", tmp_path / "wrong.onnx")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def page(folder: Path) -> Path:
    """The page's files, with a stand-in for onnxruntime-web."""
    runtime = folder / "runtime"
    (runtime / "dist").mkdir(parents=True)
    for name in (*export.page.RUNTIME_MODULES, export.page.RUNTIME_WASM):
        (runtime / "dist" / name).write_text("")
    export.page.assemble(
        folder / "upsampler.onnx", folder / "none", folder / "page", runtime, code="https://example.org"
    )
    return folder / "page"


def unpacked(page: Path, name: str) -> bytes:
    return gzip.decompress((page / "models" / (name + export.page.PACKED)).read_bytes())


def test_the_page_has_what_it_needs(page: Path, folder: Path, backend: OnnxBackend) -> None:
    about = json.loads((page / "models" / "model.json").read_text())
    assert (about["format"], about["noise_dim"], about["lr_sizes"]) == (FORMAT, backend.about.noise_dim, [4, SIZE])
    for name, details in about["files"].items():
        packed = (page / "models" / (name + export.page.PACKED)).read_bytes()
        assert details == {"bytes": len(packed), "sha256": hashlib.sha256(packed).hexdigest()}
    assert unpacked(page, export.page.MODEL) == (folder / "upsampler.onnx").read_bytes()
    offline = json.loads((page / "offline.json").read_text())
    assert "./" in offline and all((page / path).exists() for path in offline)
    assert {"app.js", "example/1.png", "models/model.json"} <= set(offline)
    assert about["code"] == "https://example.org" and not about["card"]  # the card is another bundle's
    assert json.loads((page / "models" / "edits.json").read_text())["edits"] == []
    assert {"app.js", "noise.js", "worker.js", "index.html"} <= {path.name for path in page.iterdir()}
    with pytest.raises(FileNotFoundError, match="npm ci"):
        export.page.assemble(folder / "upsampler.onnx", folder, folder / "other", folder)


@pytest.mark.parametrize(("size", "lr_size"), [(4, 4), (40, 13), (160, 16), (99, 33)])
def test_the_page_downscales_photos(size: int, lr_size: int, page: Path) -> None:
    session = onnxruntime.InferenceSession(unpacked(page, "downscale.onnx"))
    planes = faces(1, size)[0]
    (found,) = session.run(None, {"planes": planes, "pixels": np.zeros(lr_size, np.float32)})
    wanted = Downscale(lr_size)(torch.from_numpy(planes)[None])[0].clamp(-1, 1)
    assert np.abs(found - wanted.numpy()).max() <= 1.01 / 255
    np.testing.assert_allclose(found, from_uint8(np.rint((found + 1) * 127.5).astype(np.uint8)), atol=1e-6)


def test_the_page_finds_faces_as_data_align_does(page: Path) -> None:
    """A generated face in a picture of the detector's size, turned: the square of MTCNN's own points."""
    content = unpacked(page, "detector.onnx")
    assert len(content) < 2e6
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    side = export.detector.SIDE
    picture = Image.new("RGB", (side, side), (100, 120, 110))
    face = Image.open(ROOT / "samples" / "face-6-32px.png").convert("RGB").resize((200, 200), Image.Resampling.BICUBIC)
    picture.paste(face.rotate(10, Image.Resampling.BICUBIC), (60, 90))
    planes = from_uint8(np.asarray(picture).transpose(2, 0, 1))
    scores, squares = onnxruntime.InferenceSession(content).run(None, {"planes": planes})
    (points,) = FaceFinder()(Path("unused"), picture)
    wanted = ffhq_square(points)
    assert scores[0] >= 0.9 > scores[1]
    assert np.hypot(*(squares[0, :2] - wanted.centre)) < 0.04 * wanted.side
    assert np.hypot(*(squares[0, 2:] - wanted.right)) < 0.08 * wanted.side


@pytest.fixture(scope="module")
def program(folder: Path) -> Iterator[Path]:
    """export/upsample.cpp, compiled; ORT is a release of onnxruntime, a folder with include/ and lib/."""
    if not ORT or COMPILER is None:
        pytest.skip("needs a C++ compiler, and onnxruntime's headers and library in $ORT")
    path = folder / "upsample"
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-isystem", f"{ORT}/include"]
    links = ["-L", f"{ORT}/lib", "-lonnxruntime", f"-Wl,-rpath,{ORT}/lib", "-o", str(path)]
    subprocess.run([str(COMPILER), *options, str(ROOT / "export" / "upsample.cpp"), *links], check=True)
    yield path


@pytest.mark.parametrize("size", [4, 13, SIZE])
def test_the_same_pixels_in_cpp(size: int, folder: Path, program: Path, backend: OnnxBackend, tmp_path: Path) -> None:
    lr = faces(1, size)
    pixels = np.rint((lr[0] + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(pixels).save(tmp_path / "face.ppm")
    command = [program, folder / "upsampler.onnx", tmp_path / "face.ppm", tmp_path / "best.ppm"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    wanted = backend.sample(lr, face_noise(lr, 1, backend.about.noise_dim, 0)).images[0, 0].transpose(1, 2, 0)
    made = np.array(Image.open(tmp_path / "best.ppm")).astype(float)
    assert made.shape == (SIZE, SIZE, 3) and np.abs(made - (wanted + 1) * 127.5).max() <= 1


@pytest.mark.parametrize("content", [b"P6\n4 5\n255\n", b"P6\n4 4\n255\nabc", b"P3\n4 4\n255\n", b""])
def test_bad_pictures_in_cpp(content: bytes, folder: Path, program: Path, tmp_path: Path) -> None:
    (tmp_path / "face.ppm").write_bytes(content)
    command = [program, folder / "upsampler.onnx", tmp_path / "face.ppm", tmp_path / "best.ppm"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "face.ppm: e" in done.stderr and not (tmp_path / "best.ppm").exists()
