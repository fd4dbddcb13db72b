"""The page's arithmetic, run by node, against the Python that it stands for."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.image_io import from_uint8, to_uint8
from data.pictures import disagreement, heat
from data.taps import downscaling_errors, resize, resize_weights
from editing.boundary import Boundary, apply_edits, write_boundary
from export.page import edits_of
from export.passes import feedback_inputs, take_passes

WEB = Path(__file__).resolve().parents[1] / "web"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="needs node, to run the page's modules outside of a browser")

# Calls functions of modules: [[module, name, arguments], …] in, their results out. Typed arrays go as {"type", "data"}.
HARNESS = """
import { readFileSync } from "node:fs";
globalThis.ImageData = class { constructor(w, h) { this.data = new Uint8ClampedArray(4 * w * h); } };
const revive = (key, value) => (value?.type ? globalThis[value.type].from(value.data) : value);
const flat = (key, value) => (ArrayBuffer.isView(value) ? Array.from(value) : value);
const results = [];
for (const [module, name, args] of JSON.parse(readFileSync(0, "utf8"), revive)) {
  const call = (await import(module))[name];
  let result;
  try {
    result = await call(...args.map((arg) => (arg?.source ? eval(arg.source) : arg)));
    if (result instanceof Blob) result = new Uint8Array(await result.arrayBuffer());
    if (result instanceof ImageData) result = result.data;
  } catch (error) {
    result = { error: error.message };
  }
  results.push(result);
}
process.stdout.write(JSON.stringify(results, flat));
"""


def floats(values: Any) -> dict[str, Any]:
    return {"type": "Float32Array", "data": np.asarray(values, np.float32).ravel().tolist()}


def node(*calls: tuple[str, str, list]) -> list[Any]:
    text = json.dumps([[(WEB / module).as_uri(), name, arguments] for module, name, arguments in calls])
    command = [str(NODE), "--input-type=module", "-e", HARNESS]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PAIRS = [
    (1, 4),
    (4, 64),
    (7, 3),
    (15, 5),
    (16, 16),
    (16, 64),
    (21, 7),
    (40, 13),
    (64, 8),
    (64, 64),
    (100, 64),
    (333, 16),
]


def test_weights() -> None:
    found = node(*(("taps.js", "resizeWeights", list(pair)) for pair in PAIRS))
    for (size_in, size_out), rows in zip(PAIRS, found, strict=True):
        matrix = np.zeros((size_out, size_in))
        for row, start, weights in zip(matrix, rows["start"], rows["weights"], strict=True):
            row[start : start + len(weights)] = weights
        np.testing.assert_allclose(matrix, resize_weights(size_in, size_out), atol=1e-7, err_msg=f"{size_in, size_out}")


@pytest.mark.parametrize(("n", "size"), [(5, 64), (40, 13), (64, 64), (99, 33)])
def test_resize(n: int, size: int) -> None:
    image = np.random.default_rng(n).uniform(-1, 1, (3, n, n)).astype(np.float32)
    (found,) = node(("taps.js", "resize", [floats(image), n, size]))
    np.testing.assert_allclose(np.reshape(found, (3, size, size)), resize(image, size), atol=2e-6)


@pytest.mark.parametrize("band", [1, 7, 256])
def test_resize_bytes(band: int) -> None:
    n, size = 50, 16
    pixels = np.random.default_rng(1).integers(0, 256, (n, n, 4), dtype=np.uint8)
    source = (
        f"((top, rows) => Uint8ClampedArray.from({pixels.ravel().tolist()}).subarray(top*{4 * n}, (top+rows)*{4 * n}))"
    )
    (found,) = node(("taps.js", "resizeBytes", [{"source": source}, n, size, band]))
    wanted = resize(from_uint8(pixels[..., :3].transpose(2, 0, 1)), size)
    np.testing.assert_allclose(np.reshape(found, (3, size, size)), wanted, atol=2e-6)


def test_downscaling_error() -> None:
    rng = np.random.default_rng(2)
    face, lr = (rng.uniform(-1, 1, (3, s, s)).astype(np.float32) for s in (32, 9))
    (found,) = node(("taps.js", "downscalingError", [floats(face), 32, floats(lr), 9]))
    assert found == pytest.approx(float(downscaling_errors(face[None], lr)[0]), rel=1e-5)


def test_feedback_inputs() -> None:
    rng = np.random.default_rng(4)
    for resolution, canvas in ((32, 16), (64, 16)):
        face, lr = (rng.uniform(-1.2, 1.2, (3, s, s)).astype(np.float32) for s in (resolution, 9))
        (found,) = node(("passes.js", "feedbackInputs", [floats(lr), 9, floats(face), resolution, canvas]))
        wanted = feedback_inputs(lr[None], face[None], np.zeros((1, 2, 3), np.float32), canvas)
        for name in ("lr", "residual", "images"):
            np.testing.assert_allclose(np.reshape(found[name], wanted[name].shape), wanted[name], atol=3e-6)


@pytest.mark.parametrize("gain", [0.7, 2.5, 5.0])
def test_passes(gain: float) -> None:
    """A step of 0.7 of what is missing does good, one of 2.5 is halved once, one of 5 twice."""
    lr, ws = np.full((3, 4, 4), 0.5, np.float32), np.zeros(6, np.float32)

    def draw(codes: np.ndarray) -> np.ndarray:
        return codes.mean(axis=(1, 2))[:, None, None, None] * np.ones((3, 8, 8), np.float32)

    def correct(lr: np.ndarray, images: np.ndarray, codes: np.ndarray) -> np.ndarray:
        return codes + np.float32(gain) * (np.float32(0.5) - codes.mean(axis=(1, 2), keepdims=True))

    wanted = take_passes(correct, draw, lr[None], ws.reshape(1, 2, 3), 4)[0]
    mean = "w.reduce((a, b) => a + b) / w.length"
    drawing = {"source": f"(async (w) => new Float32Array(192).fill({mean}))"}
    move = {"source": f"(async (face, w) => w.map((v) => v + {gain} * (0.5 - face[0])))"}
    (found,) = node(("passes.js", "takePasses", [move, drawing, floats(lr), 4, floats(ws), 8, 4]))
    np.testing.assert_allclose(found["ws"], wanted.ravel(), atol=1e-5)
    assert found["before"] == pytest.approx(0.0625, rel=1e-5) and found["after"] < 0.02
    assert found["after"] == pytest.approx(float(downscaling_errors(draw(wanted), lr)[0]), abs=1e-6)


def test_bytes() -> None:
    # Multiples of 1/127.5 from -1 and the halves between, which both have to round to even.
    values = np.concatenate([np.arange(-1.1, 1.1, 0.0007), np.arange(512) / 255 - 1]).astype(np.float32)
    calls = [("pixels.js", "toByte", [float(value)]) for value in values]
    found = node(*calls, *(("pixels.js", "fromByte", [byte]) for byte in range(256)))
    assert found[: len(values)] == to_uint8(values[None, None])[0, 0].tolist()
    assert np.array_equal(np.float32(found[len(values) :]), from_uint8(np.arange(256, dtype=np.uint8)))
    image = np.random.default_rng(0).uniform(-1.2, 1.2, (3, 8, 8)).astype(np.float32)
    (drawn,) = node(("pixels.js", "imageOf", [floats(image), 8]))
    drawn = np.reshape(drawn, (8, 8, 4))
    assert np.array_equal(drawn[..., :3].transpose(2, 0, 1), to_uint8(image)) and (drawn[..., 3] == 255).all()
    (back,) = node(("pixels.js", "planesOf", [drawn.ravel().tolist(), 8]))
    assert np.array_equal(np.reshape(np.float32(back), image.shape), from_uint8(to_uint8(image)))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_disagreement(k: int) -> None:
    faces = np.random.default_rng(k).uniform(-1, 1, (k, 3, 16, 16)).astype(np.float32)
    (found,) = node(("pixels.js", "disagreement", [[floats(face) for face in faces]]))
    wanted = disagreement(faces)
    np.testing.assert_allclose(np.reshape(found, (16, 16)), wanted, atol=1e-6)
    (colours,) = node(("pixels.js", "heatOf", [floats(wanted), 16, 0.3]))
    np.testing.assert_allclose(np.reshape(colours, (16, 16, 4))[..., :3], np.array(heat(wanted, 0.3)), atol=1)


def test_noise() -> None:
    first, again, other = node(*(("noise.js", "standardNormal", [40_000, seed]) for seed in (0, 0, 1)))
    assert first == again and first != other
    values = np.array(first)
    assert np.isfinite(values).all() and abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.02 and abs((values**4).mean() - 3) < 0.2
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 0.02


def test_edits_as_boundaries_do(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    normals = [n / np.linalg.norm(n) for n in rng.standard_normal((2, 8))]
    own = rng.standard_normal((3, 8))  # a step for each layer; the other edit has one for all
    made = [
        Boundary(name, n, 0.0, direction, layers, "0" * 64)
        for name, n, direction, layers in (
            ("smile", normals[0], own, (0, 3)),
            ("blond-hair", normals[1], 2 * normals[1], (2, 6)),
        )
    ]
    for boundary in made:
        write_boundary(boundary, tmp_path / f"{boundary.name}.npz")
    content = edits_of(tmp_path)
    assert [entry["name"] for entry in content["boundaries"]] == ["blond-hair", "smile"]
    read, too_few, strange = node(
        ("edits.js", "readEdits", [content, 6, 8]),
        ("edits.js", "readEdits", [content, 4, 8]),
        ("edits.js", "readEdits", [{"format": "another"}, 6, 8]),
    )
    assert "another generator" in too_few["error"] and "format" in strange["error"]
    content["boundaries"][1]["steps"].pop()
    (torn,) = node(("edits.js", "readEdits", [content, 6, 8]))
    assert "another generator" in torn["error"]
    edits = [{**entry, "steps": [floats(step) for step in entry["steps"]]} for entry in read]
    ws = rng.standard_normal((6, 8)).astype(np.float32)
    (found,) = node(("edits.js", "applyEdits", [floats(ws), 8, edits, [-1.5, 2]]))
    wanted = apply_edits(ws, [(made[1], -1.5), (made[0], 2.0)])
    np.testing.assert_allclose(np.reshape(found, ws.shape), wanted, atol=1e-5)
    assert edits_of(tmp_path / "nowhere")["boundaries"] == []


def test_zip() -> None:
    files = {"1.png": bytes(range(256)) * 5, "empty": b"", "report.json": b"{}\n"}
    entries = [
        {"name": name, "bytes": {"type": "Uint8Array", "data": list(content)}} for name, content in files.items()
    ]
    (found,) = node(("archive.js", "zip", [entries]))
    with zipfile.ZipFile(BytesIO(bytes(found))) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == files
