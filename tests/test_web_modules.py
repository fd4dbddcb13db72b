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

from data.figures import disagreement, heat
from data.image_io import from_uint8, to_uint8
from data.noise import face_key, face_noise, philox
from editing.direction import EditDirection, EditPlan, write_direction
from export.page import MAP_MAXIMUM, edits_of
from pipeline.familiarity import Familiarity

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
    (content,) = node(("pixels.js", "bytesOf", [floats(image)]))
    assert content == to_uint8(image).ravel().tolist()
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
    """The same numbers as in Python, for any seed and face."""
    rng = np.random.default_rng(0)
    counters, key = rng.integers(0, 2**32, (200, 4)), (2**32 - 5, 2**31 + 7)
    found = node(*(("noise.js", "philox", [counter.tolist(), list(key)]) for counter in counters))
    assert found == philox(counters.astype(np.uint32), key).tolist()
    for size, seed in ((4, 0), (16, 7), (31, 2**40 + 3)):
        face = rng.integers(0, 256, (3, size, size), dtype=np.uint8)
        content = {"type": "Uint8Array", "data": face.ravel().tolist()}
        hashed, noise = node(
            ("noise.js", "faceKey", [content, seed]), ("noise.js", "faceNoise", [content, [0, 3, 1], 321, seed])
        )
        assert tuple(hashed) == face_key(face, seed)
        wanted = face_noise(from_uint8(face)[None], 4, 321, seed)[0, [0, 3, 1]]
        np.testing.assert_allclose(np.reshape(noise, (3, 321)), wanted, rtol=2e-7, atol=0)


def test_the_walk_keeps_the_variance() -> None:
    rows = np.random.default_rng(0).standard_normal((2, 4000)).astype(np.float32)
    start, middle, end = (
        np.float32(x) for x in node(*(("walk.js", "between", [floats(rows), t]) for t in (0, 0.5, 1)))
    )
    np.testing.assert_allclose([start, end], rows, atol=1e-6)
    assert middle.std() == pytest.approx(1, abs=0.05)
    np.testing.assert_allclose(middle, rows.sum(axis=0) / np.sqrt(2), atol=1e-6)


def test_squares_of_faces() -> None:
    found = [
        {"type": "Float32Array", "data": data}
        for data in ([0.99, 0.95, 0.5], [40, 30, 10, 0, 60, 60, 0, 20, 9, 9, 9, 9])
    ]
    large, small = node(("faces.js", "squaresOf", [*found, 0.5]))[0]
    assert (large["n"], large["x"], large["y"]) == (80, 80, 80) and large["angle"] == pytest.approx(np.pi / 2)
    assert (small["n"], small["x"], small["y"], small["angle"]) == (40, 60, 40, 0)


@pytest.mark.parametrize("size", [4, 8, 11, 16, 64])
def test_doubts_as_in_python(size: int) -> None:
    sizes, residuals = np.array([8, 16, 32]), np.array([1e-4, 4e-4, 2e-4])
    none = np.zeros(0)
    known = Familiarity("", none, none, none, 0.0, sizes, none, residuals)
    limits = {"sizes": sizes.tolist(), "residuals": residuals.tolist()}
    cases = [(residual, sigma) for residual in np.geomspace(5e-5, 1e-3, 12).tolist() for sigma in (0.0, 3.0)]
    found = node(*(("doubts.js", "isUnexplained", [*case, size, limits]) for case in cases))
    assert found == [known.is_unexplained(*case, size) for case in cases] and len(set(found)) == 2
    assert node(("doubts.js", "isUnexplained", [1.0, 0.0, size, None])) == [False]


def test_the_map_has_the_scale_of_the_example() -> None:
    (found,) = node(("pixels.js", "heatOf", [floats([0.1]), 1]))
    assert np.abs(np.array(found[:3]) - np.array(heat([[0.1]], MAP_MAXIMUM)).ravel()).max() <= 1


def test_edits_as_in_python(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    made = [
        EditDirection(name, np.eye(8)[i], 0.0, rng.standard_normal((6, 8)), "0" * 64)
        for i, name in enumerate(("smile", "blond-hair"))
    ]
    for direction in made:
        write_direction(direction, tmp_path / f"{direction.name}.npz")
    content = edits_of(tmp_path)
    read, too_few, strange = node(
        ("edits.js", "readEdits", [content, 6, 8]),
        ("edits.js", "readEdits", [content, 4, 8]),
        ("edits.js", "readEdits", [{"format": "another"}, 6, 8]),
    )
    assert "another generator" in too_few["error"] and "format" in strange["error"]
    assert [entry["name"] for entry in read] == ["blond-hair", "smile"]
    (found,) = node(("edits.js", "offsetOf", [read, [-1.5, 2], 48]))
    wanted = EditPlan(((made[1], -1.5), (made[0], 2.0))).offset(6, 8)
    np.testing.assert_allclose(np.reshape(found, wanted.shape), wanted, atol=1e-5)
    assert edits_of(tmp_path / "nowhere")["edits"] == []


def test_zip() -> None:
    files = {"1.png": bytes(range(256)) * 5, "empty": b"", "report.json": b"{}\n"}
    entries = [
        {"name": name, "bytes": {"type": "Uint8Array", "data": list(content)}} for name, content in files.items()
    ]
    (found,) = node(("archive.js", "zip", [entries]))
    with zipfile.ZipFile(BytesIO(bytes(found))) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == files
