"""The page in a real Chromium: it computes what Python computes, says what goes wrong, and keeps to itself.

make test-web
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import Browser, find_chromium, pixels, serve
from PIL import Image

from data.image_io import from_uint8, to_picture, to_uint8
from data.noise import face_noise
from data.resize import resize
from editing.direction import EditDirection, EditPlan
from export.onnxruntime_backend import OnnxBackend
from export.page import EDITS, EDITS_FORMAT, MODEL

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "samples"
PAGE = os.environ.get("AMORTIZED_PULSE_PAGE") and str(Path(os.environ["AMORTIZED_PULSE_PAGE"]).resolve())
CLOSE = 2  # of 255

pytestmark = [
    pytest.mark.skipif(not PAGE, reason="needs a page made by make web; make test-web makes it and runs these tests"),
    pytest.mark.skipif(
        find_chromium() is None, reason="needs Chromium: apt-get install chromium, or name it in $CHROMIUM"
    ),
]


@pytest.fixture(scope="module")
def backend() -> OnnxBackend:
    return OnnxBackend(Path(PAGE) / "models" / MODEL, threads=1)


@pytest.fixture(scope="module")
def edits(backend: OnnxBackend) -> list[EditDirection]:
    rng = np.random.default_rng(0)
    shape = backend.about.num_ws, backend.about.w_dim
    normal = np.eye(shape[1])[0]
    steps = rng.standard_normal((2, *shape)) * 0.2
    return [
        EditDirection(name, normal, 0.0, step, "0" * 64)
        for name, step in zip(("smile", "blond-hair"), steps, strict=True)
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, edits: list[EditDirection]) -> Iterator[tuple[str, list]]:
    """The page, with edits of our own: the bundle may have others, or none."""
    folder = tmp_path_factory.mktemp("site") / "page"
    shutil.copytree(PAGE, folder, copy_function=os.symlink)
    (folder / "models" / EDITS).unlink()
    entries = [{"name": edit.name, "steps": edit.steps.tolist()} for edit in edits]
    (folder / "models" / EDITS).write_text(json.dumps({"format": EDITS_FORMAT, "edits": entries}))
    with serve(folder) as (address, asked):
        yield address, asked


@pytest.fixture(scope="module")
def opened(site: tuple[str, list], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(opened: Browser, site: tuple[str, list]) -> Iterator[Browser]:
    """The page, loaded anew; whatever a test does to it, no error may have been left in the console."""
    opened.resize(1280, 900)
    opened.errors.clear()
    opened.open(site[0] + "/")
    opened.wait_for("document.body.dataset.ready !== undefined")
    yield opened
    assert opened.errors == []


def act(page: Browser, action: str) -> None:
    """Does something that changes the faces, and waits until they are drawn."""
    before = page.evaluate("Number(document.body.dataset.done ?? 0)")
    page.evaluate(action)
    finished(page, before)


def finished(page: Browser, before: int = 0) -> None:
    quiet = "!document.getElementById('work').hasAttribute('aria-busy')"
    page.wait_for(f"Number(document.body.dataset.done ?? 0) > {before} && {quiet}")


def show(page: Browser, path: Path) -> None:
    before = page.evaluate("Number(document.body.dataset.done ?? 0)")
    page.set_files("#file", path)
    finished(page, before)


def slide(page: Browser, selector: str, value: float) -> None:
    target = f"document.querySelector({json.dumps(selector)})"
    act(page, f"{target}.value = {value}; {target}.dispatchEvent(new Event('input', {{bubbles: true}}))")


def picture(page: Browser, selector: str) -> np.ndarray:
    """The bytes of a canvas (H, W, 3)."""
    values = np.array(pixels(page, selector), np.uint8).reshape(-1, 4)
    side = round(len(values) ** 0.5)
    assert (values[:, 3] == 255).all()
    return values[:, :3].reshape(side, side, 3).astype(int)


def sample(page: Browser, i: int) -> np.ndarray:
    return picture(page, f'canvas[data-sample="{i}"]')


def count(page: Browser) -> int:
    return page.evaluate("document.querySelectorAll('canvas[data-sample]').length")


def photo(path: Path, width: int = 210, height: int = 160) -> Path:
    """A picture with edges, gradients and noise, that is no face."""
    y, x = np.mgrid[:height, :width] / 160
    planes = np.stack([np.sin(9 * x * y), np.cos(7 * x), (x + y > 1) - 0.5]) / 1.5
    planes += np.random.default_rng(0).normal(0, 0.1, planes.shape)
    to_picture(planes.astype(np.float32)).save(path)
    return path


def samples(
    backend: OnnxBackend, path: Path, size: int = 0, **options: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What Python makes of a picture: its input (s, s, 3) and samples (4, R, R, 3) in bytes, and LR-PSNR (4,)."""
    planes = from_uint8(np.array(Image.open(path).convert("RGB")).transpose(2, 0, 1))
    side = min(planes.shape[1:])
    top, left = ((length - side) // 2 for length in planes.shape[1:])
    square = planes[:, top : top + side, left : left + side]
    lr = from_uint8(to_uint8(resize(square, size) if size else square))[None]
    found = backend.sample(lr, face_noise(lr, 4, backend.about.noise_dim, 0), **options)
    given, made = (to_uint8(x[0]).astype(int) for x in (lr, found.images))
    return given.transpose(1, 2, 0), made.transpose(0, 2, 3, 1), found.lr_psnr[0]


@pytest.mark.parametrize("name", sorted(path.name for path in SAMPLES.glob("*.png")))
def test_same_pixels_as_in_python(name: str, page: Browser, backend: OnnxBackend) -> None:
    show(page, SAMPLES / name)
    given, made, psnr = samples(backend, SAMPLES / name)
    assert np.array_equal(picture(page, "#lr"), given)
    assert all(np.abs(sample(page, i) - made[i]).max() <= CLOSE for i in range(4))
    assert np.array_equal(picture(page, "#face"), sample(page, 0))
    text = page.evaluate("document.getElementById('face-text').textContent")
    assert float(re.fullmatch(r"LR-PSNR (\S+) dB", text)[1]) == pytest.approx(psnr[0], abs=0.3)


def test_fidelity(page: Browser, backend: OnnxBackend) -> None:
    path = SAMPLES / "face-1-16px.png"
    show(page, path)
    slide(page, "#fidelity", 0.5)
    _, made, _ = samples(backend, path, fidelity=0.5)
    assert all(np.abs(sample(page, i) - made[i]).max() <= CLOSE for i in range(4))


def test_photos_are_downscaled_as_in_python(page: Browser, backend: OnnxBackend, tmp_path: Path) -> None:
    path = photo(tmp_path / "photo.png")
    show(page, path)
    for size in (16, 13):
        slide(page, "#size", size)
        given, made, _ = samples(backend, path, size)
        assert np.abs(picture(page, "#lr") - given).max() <= 1
        if np.array_equal(picture(page, "#lr"), given):  # the noise follows from the very bytes
            assert np.abs(sample(page, 1) - made[1]).max() <= CLOSE


def test_crop_by_keyboard(page: Browser, tmp_path: Path) -> None:
    path = photo(tmp_path / "photo.png")
    show(page, path)
    before = sample(page, 0)
    page.evaluate("document.getElementById('box').focus()")
    for key in ("+", "+", "ArrowRight", "ArrowRight", "ArrowUp"):
        done = page.evaluate("Number(document.body.dataset.done)")
        page.press(key)
    finished(page, done)
    n, x, y = map(int, re.findall(r"\d+", page.evaluate("document.getElementById('box').getAttribute('aria-label')")))
    assert n < 160 and x > (210 - n) // 2 and y < (160 - n) // 2
    planes = from_uint8(np.array(Image.open(path)).transpose(2, 0, 1))[:, y : y + n, x : x + n]
    wanted = to_uint8(resize(planes, 16)).transpose(1, 2, 0).astype(int)
    assert np.abs(picture(page, "#lr") - wanted).max() <= 1
    assert not np.array_equal(sample(page, 0), before)


def test_crop_by_dragging(page: Browser, tmp_path: Path) -> None:
    show(page, photo(tmp_path / "photo.png"))
    corner = "document.querySelector('[data-corner=se]').getBoundingClientRect()"
    left, top = page.evaluate(f"[{corner}.left + 10, {corner}.top + 10]")
    done = page.evaluate("Number(document.body.dataset.done)")
    for kind, dx in (("mousePressed", 0), ("mouseMoved", -20), ("mouseMoved", -60), ("mouseReleased", -60)):
        where = {"x": left + dx, "y": top + dx, "button": "left", "buttons": 1, "clickCount": 1}
        page.call("Input.dispatchMouseEvent", type=kind, **where)
    finished(page, done)
    n, x, y = map(int, re.findall(r"\d+", page.evaluate("document.getElementById('box').getAttribute('aria-label')")))
    assert n < 140 and (x, y) == (25, 0)  # the opposite corner stays


BAD = {
    "text.png": (b"this is no picture", "not a picture"),
    "cut.png": ((SAMPLES / "face-6-32px.png").read_bytes()[:60], "not a picture"),
    "empty.jpg": (b"", "empty"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_files_get_a_message(name: str, page: Browser, tmp_path: Path) -> None:
    show(page, SAMPLES / "face-4-8px.png")
    before = sample(page, 0)
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(content)
    page.set_files("#file", tmp_path / name)
    text = page.wait_for("!document.getElementById('message').hidden && document.getElementById('message').textContent")
    assert text.startswith(f"{name}: ") and reason in text
    assert np.array_equal(sample(page, 0), before)  # the good one stays
    show(page, SAMPLES / "face-5-8px.png")
    assert page.evaluate("document.getElementById('message').hidden")


def test_too_small_and_transparent(page: Browser, tmp_path: Path) -> None:
    Image.new("RGB", (3, 50)).save(tmp_path / "small.png")
    page.set_files("#file", tmp_path / "small.png")
    assert "3 × 50 px" in page.wait_for("document.getElementById('message').textContent")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    show(page, tmp_path / "clear.png")
    assert (picture(page, "#lr") == 255).all()


def test_slider_edits_as_python_does(page: Browser, backend: OnnxBackend, edits: list[EditDirection]) -> None:
    path = SAMPLES / "face-2-16px.png"
    show(page, path)
    before = [sample(page, i) for i in range(4)]
    slide(page, "[name=smile]", 2)
    slide(page, "[name=blond-hair]", -1.5)
    offset = EditPlan(((edits[0], 2), (edits[1], -1.5))).offset(backend.about.num_ws, backend.about.w_dim)
    _, made, _ = samples(backend, path, edit=offset)
    assert all(np.abs(sample(page, i) - made[i]).max() <= CLOSE for i in range(4))
    assert all(np.abs(sample(page, i) - before[i]).max() > CLOSE for i in range(4))
    act(page, "document.getElementById('reset').click()")
    assert all(np.abs(sample(page, i) - before[i]).max() <= 1 for i in range(4))  # but for rounding


def test_more_samples(page: Browser) -> None:
    show(page, SAMPLES / "face-3-16px.png")
    before, heat = [sample(page, i) for i in range(4)], picture(page, "#map")
    act(page, "document.getElementById('more').click()")
    assert count(page) == 8
    faces = [sample(page, i) for i in range(8)]
    assert all(np.array_equal(a, b) for a, b in zip(before, faces, strict=False))
    assert all(np.abs(faces[i] - faces[j]).max() > CLOSE for i in range(8) for j in range(i))
    assert not np.array_equal(picture(page, "#map"), heat) and heat.max() > 200
    page.evaluate("document.querySelectorAll('#faces button')[5].click()")
    assert np.array_equal(picture(page, "#face"), faces[5])
    show(page, SAMPLES / "face-1-16px.png")  # another picture starts with four again
    assert count(page) == 4


def test_save_all(page: Browser) -> None:
    show(page, SAMPLES / "face-1-16px.png")
    page.evaluate(
        "window.saved = new Promise((done) => { URL.createObjectURL = (blob) => { done(blob); return '#'; }; });"
        "HTMLAnchorElement.prototype.click = function () { window.savedAs = this.download; }"
    )
    page.evaluate("document.getElementById('save-all').click()")
    content = page.evaluate(
        "saved.then((blob) => blob.arrayBuffer()).then((b) => btoa(String.fromCharCode(...new Uint8Array(b))))"
    )
    assert page.evaluate("savedAs") == "face-1-16px.zip"
    with zipfile.ZipFile(BytesIO(base64.b64decode(content))) as archive:
        assert archive.testzip() is None
        names = ["input.png", *(f"{i}.png" for i in range(1, 5)), "disagreement.png", "report.json"]
        assert archive.namelist() == names
        assert np.array_equal(np.array(Image.open(archive.open("3.png")).convert("RGB")), sample(page, 2))
        report = json.loads(archive.read("report.json"))
    assert report["lr_size"] == 16 and len(report["samples"]) == 4 and "invented" in report["note"]


def test_drop_and_samples(page: Browser) -> None:
    fetched = "fetch('samples/face-4-8px.png').then((r) => r.blob())"
    transfer = "const t = new DataTransfer(); t.items.add(new File([b], 'dropped.png', {type: 'image/png'}));"
    drop = "document.dispatchEvent(new DragEvent('drop', {dataTransfer: t, bubbles: true, cancelable: true}))"
    act(page, f"{fetched}.then((b) => {{ {transfer} {drop}; }})")
    dropped = sample(page, 0)
    act(page, "document.querySelectorAll('#samples button')[3].click()")
    assert np.array_equal(sample(page, 0), dropped)


def test_nothing_leaves(page: Browser, site: tuple[str, list]) -> None:
    address, asked = site
    page.call("Network.setCacheDisabled", cacheDisabled=True)
    asked.clear()
    page.requests.clear()
    page.open(address + "/")
    page.wait_for("document.body.dataset.ready !== undefined")
    show(page, SAMPLES / "face-1-16px.png")
    seen = [(request["method"], request["url"]) for request in page.requests]
    assert all(method == "GET" and url.startswith((address, "data:", "blob:")) for method, url in seen)
    assert [url for _, url in seen if url.endswith("ort-wasm-simd-threaded.wasm")]  # those of the worker are among them
    assert asked and all(method == "GET" for method, _ in asked)
    page.call("Network.setCacheDisabled", cacheDisabled=False)
    files = {f"/{path.relative_to(PAGE)}" for path in Path(PAGE).rglob("*")} | {"/"}
    assert {path.split("?")[0] for _, path in asked} <= files  # its own files, and no word of the picture
    report = json.loads((Path(PAGE) / "models" / "model.json").read_bytes())
    assert {path.split("?")[1] for _, path in asked if "?" in path} == {report["files"][MODEL]["sha256"][:16]}
    refused = page.evaluate("fetch('http://127.0.0.2:9/').then(() => 'sent', () => 'refused')")
    assert refused == "refused" and any("Content Security Policy" in error for error in page.errors)
    page.errors.clear()
    text = page.evaluate("document.body.innerText")
    assert "Nothing is uploaded" in text and "invented" in text


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_widths(width: int, dark: bool, page: Browser) -> None:
    page.resize(width, 800, dark)
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    show(page, SAMPLES / "face-1-16px.png")
    assert page.evaluate(fits)
    if shots := os.environ.get("SCREENSHOTS"):
        page.screenshot(Path(shots) / f"page-{width}-{'dark' if dark else 'light'}.png")


def test_keyboard_reaches_everything(page: Browser) -> None:
    page.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    show(page, SAMPLES / "face-1-16px.png")
    wanted = page.evaluate(
        "[...document.querySelectorAll('#work button:enabled, #work input:enabled, #box')]"
        ".filter((e) => e.checkVisibility()).length"
    )
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(wanted + 5):
        page.press("Tab")
        reached.add(page.evaluate("[...document.querySelectorAll('#work *')].indexOf(document.activeElement)"))
    assert len(reached - {-1}) == wanted >= 14
    nodes: list[dict[str, Any]] = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "slider", "textbox", "img", "group", "image")
    named = [node for node in nodes if node.get("role", {}).get("value") in roles and not node["ignored"]]
    assert len(named) > wanted and [node for node in named if not node.get("name", {}).get("value")] == []


def test_models_that_cannot_be_fetched(opened: Browser, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    shutil.copytree(PAGE, folder, copy_function=os.symlink)
    (folder / "models" / MODEL).unlink()
    with serve(folder) as (address, _):
        opened.open(address + "/")
        opened.wait_for("document.body.dataset.ready !== undefined")
        opened.set_files("#file", SAMPLES / "face-1-16px.png")
        message = "document.getElementById('message').textContent"
        assert f"{MODEL} could not be fetched (404)" in opened.wait_for(message)
        (folder / "models" / MODEL).write_bytes(b"cut short")
        opened.evaluate("document.querySelector('#samples button').click()")
        opened.wait_for(f"{message}.includes('did not arrive whole') && {message}")
    opened.errors.clear()


def test_opened_as_a_file(opened: Browser) -> None:
    opened.open(Path(PAGE, "index.html").as_uri())
    assert "needs a web server" in re.sub(r"\s+", " ", opened.wait_for("document.getElementById('about')?.textContent"))
    assert opened.evaluate("document.body.dataset.ready === undefined")
    opened.errors.clear()


def test_threads_where_the_server_allows_them(opened: Browser, backend: OnnxBackend) -> None:
    headers = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
    opened.errors.clear()
    with serve(Path(PAGE), headers) as (address, _):
        opened.open(address + "/")
        opened.wait_for("document.body.dataset.ready !== undefined")
        assert opened.evaluate("crossOriginIsolated")
        show(opened, SAMPLES / "face-1-16px.png")
        _, made, _ = samples(backend, SAMPLES / "face-1-16px.png")
        assert np.abs(sample(opened, 0) - made[0]).max() <= CLOSE
    assert opened.errors == []
