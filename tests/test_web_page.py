"""The page in a real Chromium: it computes what Python computes, says what goes wrong, and keeps to itself.

make test-web
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import shutil
import time
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
from export.page import EDITS, EDITS_FORMAT, EXAMPLE, MODEL, PACKED

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "samples"
PAGE = os.environ.get("AMORTIZED_PULSE_PAGE") and str(Path(os.environ["AMORTIZED_PULSE_PAGE"]).resolve())
CLOSE = 2  # of 255
WINDOWS = [(1366, 768), (390, 844)]  # a laptop's, a phone's
WIRE = 35e6  # bytes of a first visit, at most

pytestmark = [
    pytest.mark.skipif(not PAGE, reason="needs a page made by make web; make test-web makes it and runs these tests"),
    pytest.mark.skipif(
        find_chromium() is None, reason="needs Chromium: apt-get install chromium, or name it in $CHROMIUM"
    ),
]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> OnnxBackend:
    path = tmp_path_factory.mktemp("model") / MODEL
    path.write_bytes(gzip.decompress((Path(PAGE) / "models" / (MODEL + PACKED)).read_bytes()))
    return OnnxBackend(path, threads=1)


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


def text_of(page: Browser, name: str) -> str:
    return page.evaluate(f"document.getElementById('{name}').textContent")


def square_of(page: Browser) -> list[int]:
    """Side, left and top of the square in pixels of the picture."""
    label = page.evaluate("document.getElementById('box').getAttribute('aria-label')")
    return [int(number) for number in re.findall(r"-?\d+", label)]


@pytest.mark.parametrize("name", sorted(path.name for path in SAMPLES.glob("*.png")))
def test_same_pixels_as_in_python(name: str, page: Browser, backend: OnnxBackend) -> None:
    show(page, SAMPLES / name)
    given, made, psnr = samples(backend, SAMPLES / name)
    assert np.array_equal(picture(page, "#lr"), given)
    assert all(np.abs(sample(page, i) - made[i]).max() <= CLOSE for i in range(4))
    assert np.array_equal(picture(page, "#face"), sample(page, 0))
    assert float(re.fullmatch(r"LR-PSNR (\S+) dB", text_of(page, "face-text"))[1]) == pytest.approx(psnr[0], abs=0.3)


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
    close = page.evaluate("Number(document.getElementById('zoom').value)")
    for key in ("+", "+", "ArrowRight", "ArrowRight", "ArrowUp"):
        done = page.evaluate("Number(document.body.dataset.done)")
        page.press(key)
    finished(page, done)
    n, x, y = square_of(page)
    assert n < 160 and x > (210 - n) // 2 and y < (160 - n) // 2
    assert page.evaluate("Number(document.getElementById('zoom').value)") > close  # one direction for both
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
    n, x, y = square_of(page)
    assert n < 140 and (x, y) == (25, 0)  # the opposite corner stays


BAD = {
    "text.png": (b"this is no picture", "not a picture"),
    "cut.png": ((SAMPLES / "face-6-32px.png").read_bytes()[:60], "not a picture"),
    "empty.jpg": (b"", "empty"),
    "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40), "HEIC photo"),
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
    assert re.search(r"differ by \d+ of 255 grey levels on average, \d+ at most", text_of(page, "map-text"))
    act(page, "document.getElementById('more').click()")
    assert count(page) == 8
    faces = [sample(page, i) for i in range(8)]
    assert all(np.array_equal(a, b) for a, b in zip(before, faces, strict=False))
    assert all(np.abs(faces[i] - faces[j]).max() > CLOSE for i in range(8) for j in range(i))
    assert not np.array_equal(picture(page, "#map"), heat) and heat.max() > 60
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


def drop(*names: str) -> str:
    """Drops samples one right after the other."""
    fetched = ", ".join(f"fetch('samples/{name}').then((r) => r.blob())" for name in names)
    return f"""Promise.all([{fetched}]).then((blobs) => blobs.forEach((b, i) => {{
        const t = new DataTransfer();
        t.items.add(new File([b], `dropped-${{i}}.png`, {{type: 'image/png'}}));
        document.dispatchEvent(new DragEvent('drop', {{dataTransfer: t, bubbles: true, cancelable: true}}));
    }}))"""


def test_drop_and_samples(page: Browser) -> None:
    act(page, drop("face-6-32px.png", "face-4-8px.png"))  # the last one wins
    dropped = sample(page, 0)
    assert page.evaluate("document.getElementById('lr').width") == 8
    act(page, "document.querySelectorAll('#samples button')[3].click()")
    assert np.array_equal(sample(page, 0), dropped)
    page.evaluate(
        "const t = new DataTransfer(); t.setData('text/uri-list', 'https://example.org/face.jpg');"
        "document.dispatchEvent(new DragEvent('drop', {dataTransfer: t}))"
    )
    assert "on another site" in text_of(page, "message")


def test_walk_between_samples(page: Browser, backend: OnnxBackend) -> None:
    path = SAMPLES / EXAMPLE
    show(page, path)
    slide(page, "#walk", 1.5)
    lr = from_uint8(np.array(Image.open(path).convert("RGB")).transpose(2, 0, 1))[None]
    noise = face_noise(lr, 4, backend.about.noise_dim, 0)
    halfway = (noise[:, 1:2] + noise[:, 2:3]) / np.sqrt(2)
    made = to_uint8(backend.sample(lr, halfway).images[0, 0]).transpose(1, 2, 0).astype(int)
    assert np.abs(picture(page, "#face") - made).max() <= CLOSE
    assert text_of(page, "face-title") == "Between 2 and 3"
    slide(page, "#walk", 2)
    assert np.array_equal(picture(page, "#face"), sample(page, 2))


HIDDEN = """(() => {
    const seen = (e) => e.checkVisibility({visibilityProperty: true});
    return ![...document.querySelectorAll('#faces canvas, #face, #map')].some(seen);
})()"""


def test_old_faces_never_stand_under_new_inputs(page: Browser, tmp_path: Path) -> None:
    show(page, photo(tmp_path / "photo.png"))
    before = sample(page, 1)
    change = "{ const s = document.getElementById('size'); s.value = 9; s.dispatchEvent(new Event('input')); }"
    frame = f"{change} new Promise((done) => requestAnimationFrame(() => done({HIDDEN})))"
    assert page.evaluate(frame)
    page.evaluate("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'Escape', bubbles: true}))")
    finished(page)
    if page.evaluate("Number(document.getElementById('size').value)") == 16:  # else it was done before Escape came
        assert np.array_equal(sample(page, 1), before) and picture(page, "#lr").shape[0] == 16
    act(page, f"{change} 0")
    assert not page.evaluate(HIDDEN) and not np.array_equal(sample(page, 1), before)


def test_many_moves_on_a_slow_device_end_at_the_last(page: Browser) -> None:
    show(page, SAMPLES / EXAMPLE)
    page.call("Emulation.setCPUThrottlingRate", rate=6)
    try:
        for strength in (-2, -1.5, -1, 0, 1, 1.5):
            page.evaluate(
                f"document.querySelector('[name=smile]').value = {strength};"
                "document.querySelector('[name=smile]').dispatchEvent(new Event('input'))"
            )
        slide(page, "[name=smile]", 2)
        moved = [sample(page, i) for i in range(4)]
    finally:
        page.call("Emulation.setCPUThrottlingRate", rate=1)
    act(page, "document.getElementById('reset').click()")
    slide(page, "[name=smile]", 2)
    assert all(np.array_equal(sample(page, i), moved[i]) for i in range(4))


def test_faces_of_a_photo_are_framed(page: Browser, backend: OnnxBackend, tmp_path: Path) -> None:
    group = Image.new("RGB", (600, 400), (90, 110, 100))
    for i, (name, side, angle) in enumerate((("face-2-16px.png", 220, 10), ("face-6-32px.png", 160, 0))):
        _, made, _ = samples(backend, SAMPLES / name)
        face = Image.fromarray(made[0].astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
        group.paste(face.rotate(angle, Image.Resampling.BICUBIC), (40 + 300 * i, 80))
    group.save(tmp_path / "group.png")
    show(page, tmp_path / "group.png")
    boxes = page.evaluate("document.querySelectorAll('#boxes button').length")
    assert boxes == 2 and text_of(page, "found").startswith("2 faces")
    n, x, _ = square_of(page)
    assert n == pytest.approx(220, rel=0.15) and x == pytest.approx(40, abs=25)  # the larger one, as training faces are
    turned = float(page.evaluate("document.getElementById('box').style.rotate").removesuffix("rad"))
    assert np.degrees(turned) == pytest.approx(-10, abs=5)
    act(page, "document.querySelectorAll('#boxes button')[1].click()")
    n, x, _ = square_of(page)
    assert n == pytest.approx(160, rel=0.15) and x == pytest.approx(340, abs=25)
    show(page, photo(tmp_path / "photo.png"))
    assert "No face was found" in text_of(page, "found")


EDGES = "(e => (({top, bottom, left, right}) => [top, bottom, left, right])(e.getBoundingClientRect()))"


@pytest.mark.parametrize("window", WINDOWS)
def test_the_face_stays_in_view(window: tuple[int, int], page: Browser) -> None:
    page.resize(*window)
    show(page, SAMPLES / EXAMPLE)
    for name in ("smile", "blond-hair"):
        page.evaluate(f"document.querySelector('[name={name}]').scrollIntoView({{block: 'end'}})")
        top, bottom, left, right = page.evaluate(f"{EDGES}(document.getElementById('face'))")
        assert -1 <= top and bottom <= window[1] and left >= 0 and right <= window[0]
        assert bottom - top >= (0.7 if window[0] > window[1] else 0.35) * window[1]
        assert page.evaluate(
            f"(() => {{ const s = document.querySelector('[name={name}]'), r = s.getBoundingClientRect();"
            "return document.elementFromPoint(r.left + r.width / 2, r.top + r.height / 2) === s; })()"
        )
    prevented = (
        "!document.getElementById('stage').dispatchEvent(new WheelEvent('wheel', {bubbles: true, cancelable: true}))"
    )
    assert not page.evaluate(prevented)  # the wheel scrolls the page


def test_before_and_after(page: Browser) -> None:
    assert page.evaluate(
        "[...document.querySelectorAll('.example img')].every((i) => i.complete && i.naturalWidth > 1)"
    )
    show(page, SAMPLES / EXAMPLE)
    page.evaluate("const s = document.getElementById('split'); s.value = 30; s.dispatchEvent(new Event('input'))")
    assert "70%" in page.evaluate("getComputedStyle(document.querySelector('#compare .before')).clipPath")
    page.evaluate("document.getElementById('enlarge').click()")
    assert "matrix(2," in page.evaluate("getComputedStyle(document.getElementById('face')).transform")


def test_works_offline_after_the_first_visit(opened: Browser) -> None:
    with serve(Path(PAGE)) as (address, _):
        opened.open(address + "/")
        opened.wait_for("document.body.dataset.ready !== undefined")
        show(opened, SAMPLES / EXAMPLE)
        first = sample(opened, 1)
        opened.evaluate("navigator.serviceWorker.ready.then(() => 0)")
    opened.open("about:blank")
    opened.open(address + "/")
    opened.wait_for("document.body.dataset.ready !== undefined")
    act(opened, "document.querySelectorAll('#samples button')[1].click()")
    assert np.array_equal(sample(opened, 1), first)
    opened.errors.clear()


@pytest.mark.skipif(
    not os.environ.get("AMORTIZED_PULSE_TEST_ALL"), reason="takes time, and an idle machine: make test-all"
)
def test_waits_at_20_megabits(opened: Browser) -> None:
    line = {"offline": False, "latency": 20, "downloadThroughput": 2.5e6, "uploadThroughput": 1e6}  # bytes a second
    with serve(Path(PAGE)) as (address, _):
        opened.call("Network.emulateNetworkConditions", **line)
        for most in (15, 3):  # seconds to the first face, of the first and the second visit
            start = time.monotonic()
            opened.open(address + "/")
            opened.wait_for("document.body.dataset.ready !== undefined")
            show(opened, SAMPLES / EXAMPLE)
            assert time.monotonic() - start <= most
            opened.evaluate("navigator.serviceWorker.ready.then(() => 0)")
        opened.call("Network.emulateNetworkConditions", **line | {"latency": 0, "downloadThroughput": -1})


def test_nothing_leaves(page: Browser, site: tuple[str, list]) -> None:
    address, asked = site
    page.call("Network.setCacheDisabled", cacheDisabled=True)
    page.call("Storage.clearDataForOrigin", origin=address, storageTypes="all")
    asked.clear()
    page.requests.clear()
    page.open(address + "/")
    page.wait_for("document.body.dataset.ready !== undefined")
    show(page, SAMPLES / "face-1-16px.png")
    seen = [(request["method"], request["url"]) for request in page.requests]
    assert all(method == "GET" and url.startswith((address, "data:", "blob:")) for method, url in seen)
    assert [url for _, url in seen if url.endswith("ort.wasm.min.mjs")]  # those of the worker are among them
    assert asked and all(method == "GET" for method, _ in asked)
    page.call("Network.setCacheDisabled", cacheDisabled=False)
    paths = [path for path in Path(PAGE).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in paths) <= WIRE
    files = {f"/{path.relative_to(PAGE)}" for path in paths} | {"/"}
    assert {path.split("?")[0] for _, path in asked} <= files  # its own files, and no word of the picture
    report = json.loads((Path(PAGE) / "models" / "model.json").read_bytes())
    hashes = {details["sha256"][:16] for details in report["files"].values()}
    assert {path.split("?")[1] for _, path in asked if "?" in path} == hashes
    refused = page.evaluate("fetch('http://127.0.0.2:9/').then(() => 'sent', () => 'refused')")
    assert refused == "refused" and any("Content Security Policy" in error for error in page.errors)
    page.errors.clear()
    text = page.evaluate("document.body.innerText")
    assert "Nothing is uploaded" in text and "invented" in text
    links = page.evaluate("[...document.querySelectorAll('nav a')].filter((a) => !a.hidden).map((a) => a.href)")
    assert any("arxiv.org" in link for link in links) and f"{address}/model-card.txt" in links


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
    for _ in range(5):  # after the links
        page.press("Tab")
        if page.evaluate("document.activeElement.id") == "file":
            break
    else:
        raise AssertionError("the file input is not reached")
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
    model = folder / "models" / (MODEL + PACKED)
    size = model.stat().st_size
    model.unlink()
    message = "document.getElementById('message').textContent"
    with serve(folder) as (address, _):
        opened.open(address + "/")
        opened.wait_for(f"{message}.includes('{MODEL} could not be fetched (404)')")
        opened.set_files("#file", SAMPLES / "face-1-16px.png")
        opened.wait_for(f"{message}.startsWith('The faces could not be made: {MODEL}')")
        for content, reason in ((b"cut short", "did not arrive whole"), (bytes(size), "arrived damaged")):
            model.write_bytes(content)
            opened.evaluate("document.querySelector('#samples button').click()")
            opened.wait_for(f"{message}.includes('{reason}')")
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
