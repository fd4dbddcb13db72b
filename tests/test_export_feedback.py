"""The export of bundles with learned feedback and a posterior: the same passes, the same candidates as torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from small_runs import write_bundle

import export.onnx
import export.quality
import export.run
import infer
from data.operator import Downscale
from data.report import write_json
from export.fused import fuse
from export.graphs import _export, write_encoder, write_feedback
from export.metadata import ENCODER, FEEDBACK, GENERATOR, REPORT, UPSAMPLE, from_props, to_props
from export.onnx import export_bundle
from export.page import RUNTIME_FILES, assemble
from export.parity import BATCHES, ParityError
from export.passes import ROWS, feedback_inputs, take_passes
from export.quality import feedback_calibration, feedback_holds
from export.runtime import exported
from export.session import Models, load_models
from models import feedback
from models.adapted import additions
from models.bundle import Bundle, load_bundle, save_bundle
from models.checkpoints import sha256_of
from models.curvature import Curvature
from models.posterior import FlowPosterior

PASSES, RANK = 2, 8


def awaken(bundle: Bundle) -> None:
    """Gives the parts that training would fill something to do: feedback, its coordinates, posterior, spread."""
    torch.manual_seed(5)
    encoder = bundle.encoder
    with torch.no_grad():
        torch.nn.init.normal_(encoder.feedback.out.weight, std=1e-3)  # small steps: some do good, some harm
        torch.nn.init.normal_(encoder.feedback.out.bias, std=1e-2)
        torch.nn.init.normal_(encoder.posterior.network.last.weight, std=0.05)
        encoder.spread.uniform_(0.2, 1.0)
        directions, _ = torch.linalg.qr(torch.randn(encoder.num_ws * encoder.w_dim, RANK))
        encoder.latents.set_curvature(Curvature(directions, torch.linspace(0.1, 0.9, RANK)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bundle with feedback and a Gaussian posterior, exported once: bundle/ and exported/."""
    path = tmp_path_factory.mktemp("feedback")
    write_bundle(path / "start", feedback=PASSES, rank=RANK, posterior="gaussian")
    bundle = load_bundle(path / "start")
    awaken(bundle)
    notes = {"name": "tiny", "licence": "none at all", "training_data": "noise"}
    save_bundle(path / "bundle", bundle.generator, bundle.encoder, notes)
    export_bundle(load_bundle(path / "bundle"), path / "exported", fused=True)
    return path


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return load_bundle(folder / "bundle")


@pytest.fixture(scope="module")
def models(folder: Path) -> Models:
    return load_models(folder / "exported", threads=1)


@pytest.fixture
def traced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares the tracing: the models that were exported once are copied."""
    for role in ("encoder", "generator", "feedback"):
        file = folder / "exported" / f"{role}.onnx"
        monkeypatch.setattr(export.onnx, f"write_{role}", lambda bundle, out, file=file: shutil.copy(file, out))


def faces(count: int, size: int) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(size)) * 2 - 1


def test_what_is_written(folder: Path, bundle: Bundle, models: Models) -> None:
    report = json.loads((folder / "exported" / REPORT).read_text())
    assert set(report["files"]) == {ENCODER, GENERATOR, FEEDBACK, UPSAMPLE}
    assert report["passes"] == models.about.passes == PASSES
    assert report["noise_dim"] == models.about.noise_dim == bundle.encoder.noise_dim > bundle.encoder.w_dim
    assert report["feedback_canvas"] == models.about.feedback_canvas == 16
    assert list(report["largest_difference"]["feedback"]) == [str(batch) for batch in BATCHES]
    assert all(0 < value <= 1e-4 for value in report["largest_difference"]["feedback"].values())
    model = onnx.load(folder / "exported" / FEEDBACK)
    assert [value.name for value in model.graph.input] == ["lr", "residual", "images", "lr_size", "ws"]
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    sizes = [list(tensor.dims) for tensor in model.graph.initializer]
    rows = bundle.encoder.num_ws * bundle.encoder.w_dim
    assert sizes.count([rows, RANK]) == 1 and [RANK, rows] not in sizes  # the directions are stored once


@pytest.mark.parametrize("size", [4, 13, 32])
@pytest.mark.parametrize("batch", BATCHES)
def test_one_pass_from_equal_codes(size: int, batch: int, bundle: Bundle, models: Models) -> None:
    lr = faces(batch, size)
    ws = bundle.encode(lr, 1, passes=0)[:, 0]
    images = bundle.generate(ws)
    with torch.inference_mode():
        wanted = bundle.encoder.correct(lr, images, ws).numpy()
    assert np.abs(wanted - ws.numpy()).max() > 0.01  # it moves at all
    np.testing.assert_allclose(models.correct(lr.numpy(), images.numpy(), ws.numpy()), wanted, atol=1e-4)


def test_additions_for_small_faces_go_along(tmp_path: Path) -> None:
    """In one batch of faces that take them, take some of them, and take none."""
    write_bundle(tmp_path / "b", feedback=1, rank=RANK, posterior="gaussian", feedback_small_rank=2)
    bundle = load_bundle(tmp_path / "b")
    awaken(bundle)
    encoder, sizes = bundle.encoder, (4, 6, 16)
    for weight in additions(encoder.feedback):
        torch.nn.init.normal_(weight, std=0.05)
    images, ws = faces(3, 32), torch.randn(3, encoder.num_ws, encoder.w_dim)
    rows = [(faces(1, size), images[i : i + 1], ws[i : i + 1]) for i, size in enumerate(sizes)]
    with torch.inference_mode():
        wanted = torch.cat([encoder.correct(*row) for row in rows])
    write_feedback(bundle, tmp_path)
    parts = [feedback_inputs(*(x.numpy() for x in row), encoder.feedback.canvas) for row in rows]
    inputs = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    got = onnxruntime.InferenceSession(tmp_path / FEEDBACK).run(["moved"], inputs)[0]
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4)
    for weight in additions(encoder.feedback):
        weight.data.zero_()
    with torch.inference_mode():
        changes = (torch.cat([encoder.correct(*row) for row in rows]) - wanted).abs().amax(dim=(1, 2))
    assert changes[0] > 1e-3 and changes[2] == 0


def test_passes_as_torch_takes_them() -> None:
    """The same decisions, halvings and rows, with steps of which some do good and some harm."""
    rng = np.random.default_rng(3)
    plain = rng.standard_normal((4 * 6, 3 * 12 * 12)).astype(np.float32) / 5
    target = rng.standard_normal((5, 4, 6)).astype(np.float32)
    gains = rng.uniform(0.5, 6, (5, 1, 1)).astype(np.float32)  # above 2, a step overshoots

    def draw(ws):
        return (ws.reshape(len(ws), -1) @ plain).reshape(len(ws), 3, 12, 12)

    lr = Downscale(6)(torch.from_numpy(draw(target)).clamp(-1, 1)).numpy()
    seen: dict[str, list[np.ndarray]] = {"torch": [], "numpy": []}

    def correct(lr, images, ws, name="numpy"):
        seen[name].append(images)
        return ws + gains * (target - ws)

    def correct_torch(lr, images, ws):
        return torch.from_numpy(correct(lr, images.numpy(), ws.numpy(), "torch"))

    ws = np.zeros((5, 4, 6), np.float32)
    for passes in (0, 1, 5):
        found, images = take_passes(correct, draw, lr, ws, passes)
        np.testing.assert_array_equal(images, draw(found))
        draw_torch = lambda codes: torch.from_numpy(draw(codes.numpy()))  # noqa: E731
        wanted = feedback.take_passes(correct_torch, draw_torch, torch.from_numpy(lr), torch.from_numpy(ws), passes)
        np.testing.assert_allclose(found, wanted.ws.numpy(), atol=1e-5)
    assert len(seen["numpy"]) == 6
    for a, b in zip(seen["numpy"], seen["torch"], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    distance = np.abs(found - target).max(axis=(1, 2))
    assert (distance < 0.5 * np.abs(target).max()).any() and len(np.unique(np.round(distance, 3))) == 5


@pytest.mark.parametrize("passes", [0, 1, PASSES, None])
def test_codes_and_faces_of_a_seed(passes: int | None, bundle: Bundle, models: Models) -> None:
    lr = faces(3, 9)
    wanted = bundle.encode(lr, 4, np.random.default_rng(5), passes)
    got = models.encode(lr.numpy(), 4, np.random.default_rng(5), passes)
    np.testing.assert_allclose(got, wanted.numpy(), atol=1e-4)
    np.testing.assert_allclose(models.generate(got), bundle.generate(wanted).numpy(), atol=1e-4)
    assert np.abs(got[:, 1:] - got[:, :1]).max() > 0.01
    before = models.encode(lr.numpy(), 4, np.random.default_rng(5), 0)
    assert (np.abs(got - before).max() > 1e-3) == (passes != 0)
    images, codes = bundle.upsample(lr, 4, rng=np.random.default_rng(5), passes=passes)
    assert torch.equal(codes, wanted)
    torch.testing.assert_close(images, bundle.generate(wanted), rtol=0, atol=1e-4)
    if passes is None:
        np.testing.assert_allclose(models.upsample(lr.numpy(), 4, rng=np.random.default_rng(5))[0], images, atol=1e-4)
    warmer = models.encode(lr.numpy(), 4, np.random.default_rng(5), passes, temperature=0.5)
    wanted = bundle.encode(lr, 4, np.random.default_rng(5), passes, temperature=0.5)
    np.testing.assert_allclose(warmer, wanted.numpy(), atol=1e-4)


def test_many_rows_pass_in_portions(bundle: Bundle, models: Models) -> None:
    lr, k = faces(3, 8), ROWS // 2
    wanted = bundle.encode(lr, k, np.random.default_rng(1))
    np.testing.assert_allclose(models.encode(lr.numpy(), k, np.random.default_rng(1)), wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("encoder", [[], ["--passes", "0", "--temperature", "0.5"]])
def test_same_faces_as_infer(encoder: list[str], folder: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "face.png")
    options = [str(tmp_path / "face.png"), "--k", "3", "--seed", "7", *encoder, "--out"]
    assert infer.main([*options, str(tmp_path / "a"), "--bundle", str(folder / "bundle"), "--device", "cpu"]) == 0
    assert export.run.main([*options, str(tmp_path / "b"), "--model", str(folder / "exported"), "--threads", "1"]) == 0
    for i in (1, 2, 3):
        ours, theirs = (np.array(Image.open(tmp_path / out / "face" / f"{i}.png")).astype(int) for out in "ab")
        assert np.abs(ours - theirs).max() <= 1
    reports = [json.loads((tmp_path / out / "face" / "report.json").read_text()) for out in "ab"]
    assert [(r.get("passes"), r.get("temperature")) for r in reports] == [(0, 0.5) if encoder else (None, None)] * 2


def test_a_flow_is_exported(folder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(folder / "bundle")
    encoder = bundle.encoder
    encoder.posterior = FlowPosterior(encoder.context_dim, encoder.w_dim, transforms=1, hidden=16, condition=4).eval()
    torch.nn.init.normal_(encoder.posterior.network.last.weight, std=0.05)
    write_encoder(bundle, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / ENCODER)
    for batch, samples in ((1, 1), (3, 2)):
        canvas, size = faces(batch, encoder.canvas), torch.full((batch,), 8.0)
        noise = torch.randn(batch, samples, encoder.noise_dim, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = encoder.candidates(canvas, size, noise, encoder.spread_at(8)).numpy()
        inputs = {"canvas": canvas.numpy(), "lr_size": size.numpy(), "noise": noise.numpy()}
        np.testing.assert_allclose(session.run(["ws"], inputs)[0], wanted, atol=1e-4)


def test_sizes_that_a_trace_fixes_are_refused() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.ones(len(x), 1)

    batch = torch.export.Dim("batch", min=1, max=100)
    with pytest.raises(ValueError, match="Expected x of any size"):
        _export(Fixed(), {"x": torch.zeros(2, 3)}, {"x": {0: batch}}, ["x"], ["y"])


def test_fused_says_that_it_has_no_passes(folder: Path, models: Models) -> None:
    model = fuse(*(onnx.load(folder / "exported" / name) for name in (ENCODER, GENERATOR)))
    about = from_props({prop.key: prop.value for prop in model.metadata_props}, "here")
    assert (about.role, about.passes, about.feedback_canvas) == ("upsample", 0, 0)
    assert about.noise_dim == models.about.noise_dim


@pytest.mark.usefixtures("traced")
def test_feedback_that_differs_is_not_written(folder: Path, tmp_path: Path) -> None:
    other = load_bundle(folder / "bundle")
    with torch.no_grad():
        other.encoder.feedback.out.bias += 0.05
    with pytest.raises(ParityError, match="exported feedback to differ"):
        export_bundle(other, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("does_well", [True, False])
def test_int8(
    does_well: bool, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    few = [np.random.default_rng(i).uniform(-1, 1, (3, 3, 32, 32)).astype(np.float32) for i in (0, 1)]
    monkeypatch.setattr(export.onnx, "sharp_faces", lambda bundle, source: few)
    monkeypatch.setattr(export.onnx, "feedback_holds", lambda half, this: does_well)
    for name in ("_lpips", "_identity"):
        monkeypatch.setattr(export.quality, name, lambda images, truth: 0.5)
    monkeypatch.setattr(export.onnx, "load_bundle", lambda path: bundle)
    out = tmp_path / "out"
    assert export.onnx.main(["--bundle", "any", "--out", str(out), "--precision", "int8", "--fused"]) == 0
    told = capsys.readouterr().out
    assert "feedback.onnx: 0." in told and "upsample.onnx: without the 2 passes" in told
    report = json.loads((out / REPORT).read_text())
    assert report["precision"]["feedback"] == ("int8" if does_well else "fp16")
    model = onnx.load(out / FEEDBACK)
    assert ("QuantizeLinear" in {node.op_type for node in model.graph.node}) == does_well
    assert report["files"][FEEDBACK]["sha256"] == sha256_of(out / FEEDBACK)
    lr = faces(2, 8).numpy()
    assert np.isfinite(load_models(out, threads=1).encode(lr, 3)).all()


def test_int8_feedback_is_measured(models: Models) -> None:
    inputs = list(feedback_calibration(models, faces(3, 32).numpy()))
    assert len(inputs) == 3 * PASSES
    assert {name: array.shape for name, array in inputs[0].items()} == {
        "lr": (1, 3, 16, 16), "residual": (1, 3, 16, 16), "images": (1, 3, 32, 32), "lr_size": (1,),
        "ws": (1, models.about.num_ws, models.about.w_dim),
    }  # fmt: skip
    half = {"downscaling_error": {"this": 1.0}}
    for error, loss, holds in ((1.05, 0.009, True), (1.2, 0.0, False), (0.9, 0.011, False), (float("nan"), 0, False)):
        assert feedback_holds(half, {"downscaling_error": {"this": error}, "lpips": {"loss": loss}}) == holds
    assert feedback_holds(half, {"downscaling_error": {"this": 1.0}, "lpips": None})


def test_models_of_one_bundle(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "exported", tmp_path / "a")
    model = onnx.load(tmp_path / "a" / FEEDBACK)
    props = {prop.key: prop.value for prop in model.metadata_props}
    onnx.helper.set_model_props(model, {**props, "bundle_sha256": "0" * 64})
    onnx.save(model, tmp_path / "a" / FEEDBACK)
    with pytest.raises(ValueError, match="models of one bundle"):
        load_models(tmp_path / "a")
    (tmp_path / "a" / FEEDBACK).unlink()
    with pytest.raises(FileNotFoundError, match=r"feedback\.onnx"):
        load_models(tmp_path / "a")


def test_older_exports(folder: Path, models: Models, tmp_path: Path) -> None:
    """Those that know nothing of feedback have none; who asks for passes is told."""
    later = ("noise_dim", "passes", "feedback_canvas")
    props = {name: text for name, text in to_props(models.about).items() if name not in later}
    about = from_props(props, "here")
    assert (about.noise_dim, about.passes, about.feedback_canvas) == (about.w_dim, 0, 0)
    plain = Models(models.about, models.encoder, models.generator)
    with pytest.raises(ValueError, match="learned feedback, 'tiny' has none"):
        plain.encode(faces(1, 8).numpy(), 1, passes=1)


@pytest.mark.usefixtures("traced")
def test_exports_from_before_feedback_are_made_anew(folder: Path, tmp_path: Path) -> None:
    made = exported(folder / "bundle", tmp_path)
    assert load_models(made, threads=1).about.passes == PASSES
    (made / FEEDBACK).unlink()
    assert exported(folder / "bundle", tmp_path) == made and (made / FEEDBACK).is_file()


def test_page_has_the_feedback(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "npm" / "dist").mkdir(parents=True)
    for name in RUNTIME_FILES:
        (tmp_path / "npm" / "dist" / name).write_text(name)
    assert "models/feedback.onnx" in assemble(folder / "exported", tmp_path / "page", tmp_path / "npm")
    shutil.copytree(folder / "exported", tmp_path / "plain")
    report = json.loads((tmp_path / "plain" / REPORT).read_text())
    del report["files"][FEEDBACK]
    write_json(report, tmp_path / "plain" / REPORT)
    assert "models/feedback.onnx" not in assemble(tmp_path / "plain", tmp_path / "other", tmp_path / "npm")
