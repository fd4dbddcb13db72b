"""infer.py, run in-process on a tiny bundle: every kind of input, every refusal, and what is written."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import PixelDistance

import infer
from data.figures import disagreement, face_sheet, heat, overview
from data.image_io import from_uint8, read_image, to_uint8
from data.operator import Downscale
from data.report import FORMAT, folder_names
from data.resize import resize
from models.bundle import Bundle, load_bundle
from models.bundle_info import DEFAULT_BUNDLE
from models.checkpoints import sha256_of
from pipeline import Upsampler
from pipeline.torch_backend import TorchBackend

RNG = np.random.default_rng(0)
ROOT = Path(infer.__file__).parent
LOADS = "pipeline.torch_backend.load_bundle"
READS = "cli.inputs.read_image"


@pytest.fixture
def run(tiny_bundle: Path, tmp_path: Path) -> Callable[..., int]:
    """Runs infer.py on files in tmp_path, results in tmp_path/out."""

    def call(*arguments: str | Path, out: str = "out") -> int:
        options = ["--bundle", tiny_bundle, "--out", tmp_path / out, "--device", "cpu"]
        return infer.main([str(argument) for argument in (*options, *arguments)])

    return call


def picture(path: Path, width: int = 8, height: int = 8, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def save_kind(kind: str, folder: Path) -> Path:
    rgb = Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    path = folder / f"face.{ {'jpeg': 'jpg', 'cmyk': 'jpg', 'exif': 'jpg', 'webp': 'webp'}.get(kind, 'png') }"
    exif = Image.Exif()
    exif[0x0112] = 6
    if kind == "deep grey":
        Image.fromarray(RNG.integers(0, 65536, (8, 8), dtype=np.uint16)).save(path)
    elif kind == "exif":
        rgb.save(path, exif=exif)
    elif kind.endswith("px"):
        picture(path, *map(int, kind.removesuffix(" px").split("x")))
    else:
        mode = {"grey": "L", "rgba": "RGBA", "palette": "P", "cmyk": "CMYK"}.get(kind, "RGB")
        rgb.convert(mode).save(path)
    return path


KINDS = ["png", "jpeg", "webp", "deep grey", "grey", "rgba", "palette", "cmyk", "exif"]
SIZES = ["4x4 px", "32x32 px", "12x8 px", "8x12 px"]


@pytest.mark.parametrize("kind", KINDS + SIZES)
def test_good_inputs(kind: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = save_kind(kind, tmp_path)
    assert run(path, "--k", "2") == 0
    folder = tmp_path / "out" / "face"
    names = {"1.png", "2.png", "grid.png", "input.png", "latents.npz", "report.json"}
    assert {p.name for p in folder.iterdir()} == names
    report = report_of(folder)
    width, height = Image.open(path).size
    size = min(width, height)
    assert (report["input"], report["input_size"], report["lr_size"]) == (path.name, [width, height], size)
    lr, original = read_image(folder / "input.png"), read_image(path)
    top, left = ((side - size) // 2 for side in original.shape[-2:])
    assert np.array_equal(to_uint8(lr), to_uint8(original[:, top : top + size, left : left + size]))
    for sample in report["samples"]:
        face = read_image(folder / sample["file"])
        assert face.shape == (3, 32, 32)
        error = float((((resize(face, size) - lr) / 2) ** 2).mean())
        assert sample["lr_psnr"] == pytest.approx(min(100, -10 * np.log10(max(error, 1e-20))), abs=0.02)
    assert ("not square" in capsys.readouterr().err) == (width != height)


def test_report_and_latents(run: Callable[..., int], tiny_bundle: Path, tmp_path: Path) -> None:
    path = picture(tmp_path / "face.png")
    assert run(path, "-k", "3", "--seed", "7", "--noise-sigma", "0") == 0
    folder = tmp_path / "out" / "face"
    text = (folder / "report.json").read_text()
    report = json.loads(text)
    assert text == json.dumps(report, indent=2, sort_keys=True) + "\n"
    assert str(tmp_path) not in text and report["format"] == FORMAT
    assert (report["seed"], report["k"], report["fidelity"], report["resolution"]) == (7, 3, 1, 32)
    assert report["bundle"] == {"name": "tiny", "hash": sha256_of(tiny_bundle / "bundle.json")}
    samples = Upsampler.from_pretrained(tiny_bundle, "cpu")(read_image(path)[None], 3, seed=7, noise_sigma=0.0)[0]
    latents = np.load(folder / "latents.npz")
    assert latents["ws"].dtype == np.float32 and np.array_equal(latents["ws"], samples.ws)
    written = np.stack([to_uint8(read_image(folder / f"{i}.png")) for i in (1, 2, 3)])
    assert np.array_equal(to_uint8(samples.images), written)
    assert (written[0] != written[1]).any() and (written[1] != written[2]).any()


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        (["--fidelity", "0.5"], {"fidelity": 0.5}),
        (["--noise-sigma", "25"], {"noise_sigma": 25.0}),
        (["--seed", "1"], {"seed": 1}),
        (["--precision", "bf16"], {}),
    ],
)
def test_options_change_the_samples_and_the_report(
    options: list[str], notes: dict[str, float], run: Callable[..., int], tmp_path: Path
) -> None:
    path = picture(tmp_path / "face.png")
    assert run(path, "-k", "2", "--noise-sigma", "0", out="a") == 0
    assert run(path, "-k", "2", "--noise-sigma", "0", *options, out="b") == 0
    first, second = (report_of(tmp_path / name / "face") for name in "ab")
    assert {name: second[name] for name in notes} == notes
    others = {name for name in first if name not in ("samples", "files") and first[name] != second[name]}
    assert others == notes.keys()
    assert (tmp_path / "a" / "face" / "2.png").read_bytes() != (tmp_path / "b" / "face" / "2.png").read_bytes()


def test_select_keeps_samples_that_are_far_apart(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those whose coarse pixels are: the point estimate, the one farthest from it, and so on."""
    monkeypatch.setattr("losses.perceptual.LPIPS", PixelDistance)
    path = picture(tmp_path / "face.png")
    assert run(path, "-k", "6", out="all") == run(path, "--select", "3-of-6", out="apart") == 0
    faces = [read_image(tmp_path / "all" / "face" / f"{i}.png") for i in range(1, 7)]
    coarse = np.stack([face.reshape(3, 8, 4, 8, 4).mean(axis=(2, 4)).ravel() for face in faces])
    kept = [0]
    while len(kept) < 3:
        kept.append(int(np.linalg.norm(coarse[:, None] - coarse[kept], axis=2).min(axis=1).argmax()))
    found = [read_image(tmp_path / "apart" / "face" / f"{i}.png") for i in (1, 2, 3)]
    assert all(np.array_equal(face, faces[i]) for face, i in zip(found, kept, strict=True))
    reports = [report_of(tmp_path / out / "face") for out in ("all", "apart")]
    assert (reports[1]["k"], reports[1]["selected_of"]) == (3, 6) and "selected_of" not in reports[0]
    assert [row["lr_psnr"] for row in reports[1]["samples"]] == [reports[0]["samples"][i]["lr_psnr"] for i in kept]


def test_only_what_is_asked_for_is_written(run: Callable[..., int], tmp_path: Path) -> None:
    path = picture(tmp_path / "face.png")
    for save, names in (("images", {"1.png"}), ("grid", {"grid.png"}), ("latents,report", {"latents.npz"})):
        assert run(path, "-k", "1", "--save", save, out=save) == 0
        found = {p.name for p in (tmp_path / save / "face").iterdir()}
        assert found == names | {"input.png", "report.json"}
        assert (tmp_path / save / "overview.png").exists() == (save == "grid")


def cut(path: Path, target: Path) -> None:
    target.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bomb(target: Path) -> None:
    """A few bytes that claim to be 20000 x 20000 px."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))
    target.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b""))


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda p: p.write_text("no picture"), "not a picture"),
    "truncated": (lambda p: cut(picture(p.with_name("whole.png"), 30, 30), p), "truncated"),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "bomb": (bomb, "megapixels"),
    "folder": (lambda p: p.mkdir(), "folder without images"),
    "missing": (lambda p: None, "no such file"),
    "large": (lambda p: picture(p, 33, 33), "--downscale"),
    "3 px": (lambda p: picture(p, 3, 3), "too small"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_inputs(kind: str, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make, reason = REFUSED[kind]
    bad = tmp_path / "bad.png"
    make(bad)
    assert run(bad, picture(tmp_path / "good.png"), "--k", "1") == 1
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"good", "overview.png", "failed.jsonl"}
    assert report_of(tmp_path / "out" / "good")["k"] == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith(f"{bad}: ") and reason in errors[0]
    assert errors[0].count(str(bad)) == 1


def test_nothing_to_do(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(tmp_path / "nowhere.png") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--k", "0"],
        ["--k", "65"],
        ["--seed", "-1"],
        ["--downscale", "0"],
        ["--downscale", "3"],
        ["--downscale", "33"],
        ["--out", ""],
        ["--bundle", ""],
        ["--fidelity", "1.1"],
        ["--fidelity", "nan"],
        ["--noise-sigma", "-1"],
        ["--noise-sigma", "nan"],
        ["--select", "4"],
        ["--select", "4-of-3"],
        ["--select", "0-of-3"],
        ["--select", "2-of-65"],
        ["--runtime", "magic"],
        ["--precision", "fp16"],
        ["--batch-size", "0"],
        ["--save", "images,film"],
    ],
)
def test_wrong_options(options: list[str], run: Callable[..., int], tmp_path: Path) -> None:
    path = picture(tmp_path / "face.png")
    with pytest.raises(SystemExit) as stop:
        run(path, *options)
    assert stop.value.code == 2
    assert not (tmp_path / "out").exists()


def test_help_teaches(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        infer.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "python infer.py face.png" in text and "grid.png" in text
    for option in re.findall(r"--[a-z-]+", infer.__doc__ or ""):
        assert f"{option} " in text.split("options:")[1]


@pytest.mark.parametrize("device", ["toaster", "meta", "cuda:99"])
def test_device_that_is_not_there(device: str, run: Callable[..., int], tmp_path: Path, capsys) -> None:
    assert run(picture(tmp_path / "face.png"), "--device", device) == 2
    assert device.partition(":")[0] in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_missing_bundle(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = picture(tmp_path / "face.png")
    assert infer.main([str(path), "--bundle", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "bundle.json" in capsys.readouterr().err


def test_downscale(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    photo = picture(tmp_path / "photo.png", 60, 48)
    small = picture(tmp_path / "small.png", 6, 6)
    assert run(photo, small, "--downscale", "8", "--k", "1", "--align", "never") == 1
    assert f"{small}: 6 x 6 px cannot be downscaled to 8 px" in capsys.readouterr().err
    middle = torch.from_numpy(read_image(photo))[:, :, 6:54]
    expected = to_uint8(Downscale(8)(middle[None])[0])
    assert np.array_equal(to_uint8(read_image(tmp_path / "out" / "photo" / "input.png")), expected)
    # The written low-resolution picture leads to the same faces by itself.
    assert run(tmp_path / "out" / "photo" / "input.png", "--k", "1", out="again") == 0
    for name in ("1.png", "latents.npz", "grid.png"):
        again = tmp_path / "again" / "input" / name
        assert again.read_bytes() == (tmp_path / "out" / "photo" / name).read_bytes()


def test_same_command_same_bytes(run: Callable[..., int], tmp_path: Path) -> None:
    folder = tmp_path / "faces"
    folder.mkdir()
    for i in range(3):
        picture(folder / f"{i}.png", seed=i)
    assert run(folder, "--seed", "3", out="a") == run(folder, "--seed", "3", out="b") == 0
    assert run(folder, "--seed", "4", out="c") == 0
    first, second, other = (contents(tmp_path / name) for name in "abc")
    assert first == second and "overview.png" in first
    assert first["0/1.png"] == other["0/1.png"]  # the point estimate has no randomness in it
    assert first["0/2.png"] != other["0/2.png"]


def test_company_and_order_do_not_matter(run: Callable[..., int], tmp_path: Path) -> None:
    """Faces of one size go through the networks together, as many as --batch-size says."""
    one, two, three = (
        picture(tmp_path / f"{name}.png", n, n, seed=ord(name)) for name, n in zip("abc", (8, 16, 8), strict=True)
    )
    assert run(one, two, three, out="a") == run(three, two, one, out="b") == run(three, out="c") == 0
    for name in "abc":
        first, second = (tmp_path / out / name for out in "ab")
        a, b = (np.stack([np.asarray(Image.open(f / f"{i}.png"), int) for i in (1, 2)]) for f in (first, second))
        assert abs(a - b).max() <= 1  # the last bit may depend on what is computed together
    assert run(one, two, three, "--batch-size", "1", out="d") == run(three, two, one, "--batch-size", "1", out="e") == 0
    assert all(contents(tmp_path / "d" / name) == contents(tmp_path / "e" / name) for name in "abc")
    assert contents(tmp_path / "d" / "c") == contents(tmp_path / "c" / "c")


def test_same_stem(run: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [picture(tmp_path / "face.png", seed=1), picture(tmp_path / "other" / "face.png", seed=2)]
    assert run(*paths, "--k", "1") == 0
    for path, name in zip(paths, ["face", "face-2"], strict=True):
        assert np.array_equal(read_image(tmp_path / "out" / name / "input.png"), read_image(path))


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a.png", "b.png"], ["a", "b"]),
        (["x/a.png", "y/a.jpg", "z/a.png"], ["a", "a-2", "a-3"]),
        (["x/a.png", "y/a.png", "a-2.png"], ["a", "a-3", "a-2"]),
        (["a.png", "A.png"], ["a", "A-2"]),
        (["overview.png.png"], ["overview.png-2"]),
        (["...png", " .png"], ["face", "face-2"]),
        (["CON.png", "a:b.png", "a_b.png", "nul.x.png"], ["_CON", "a_b", "a_b-2", "_nul.x"]),
        (["\u00e9.png", "e\u0301.png"], ["\u00e9", "e\u0301-2"]),
        ([f"{i}/a.png" for i in range(20_000)], ["a", *(f"a-{i}" for i in range(2, 20_001))]),
    ],
)
def test_folder_names(files: list[str], names: list[str]) -> None:
    assert folder_names([Path(file) for file in files]) == names


def test_overwrite(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    face, other = picture(tmp_path / "face.png"), picture(tmp_path / "other.png", seed=1)
    folder = tmp_path / "out" / "face"
    assert run(face, "--k", "3") == 0
    (folder / "notes.txt").write_text("mine")
    before = contents(tmp_path / "out")

    assert run(face, other, "--k", "2") == 1
    assert "--overwrite" in capsys.readouterr().err
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert report_of(tmp_path / "out" / "other")["k"] == 2

    assert run(face, other, "--k", "2", "--overwrite") == 0
    assert (folder / "notes.txt").read_text() == "mine"
    assert report_of(folder)["k"] == 2
    assert {p.name for p in folder.glob("[0-9].png")} == {"1.png", "2.png"}
    assert contents(tmp_path / "out")["overview.png"] != before["overview.png"]


@pytest.mark.parametrize("name", ["1.png", "input.png", "report.json"])
@pytest.mark.parametrize("earlier", [False, True])
def test_overwrite_spares_what_is_not_ours(
    name: str, earlier: bool, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """There before the first call, or changed since the last one; a report is ours as long as it lists our files."""
    folder = tmp_path / "out" / "face"
    if earlier:
        assert run(picture(tmp_path / "face.png"), "--k", "2") == 0
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}" if name == "report.json" else "mine")
    before = contents(tmp_path / "out")
    assert run(picture(tmp_path / "face.png"), "--k", "2", "--overwrite") == 1
    assert "no earlier call wrote" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before


def test_overwrite_fills_a_folder_without_results(run: Callable[..., int], tmp_path: Path) -> None:
    folder = tmp_path / "out" / "face"
    folder.mkdir(parents=True)
    (folder / "7.png").write_text("mine")
    assert run(picture(tmp_path / "face.png"), "--k", "2", "--overwrite") == 0
    assert run(picture(tmp_path / "face.png"), "--k", "1", "--overwrite") == 0
    assert (folder / "7.png").read_text() == "mine" and not (folder / "2.png").exists()


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("kind", ["folder", "text", "picture"])
def test_overview_in_the_way(
    kind: str, overwrite: list[str], run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    target = tmp_path / "out" / "overview.png"
    target.parent.mkdir()
    {"folder": target.mkdir, "text": lambda: target.write_text("mine"), "picture": lambda: picture(target)}[kind]()
    before = contents(target.parent)
    assert run(picture(tmp_path / "face.png"), *overwrite) == 1
    assert "overview.png exists, and no earlier call wrote it" in capsys.readouterr().err
    after = contents(target.parent)
    assert {name: after.get(name) for name in before} == before and "face/report.json" in after


def test_names_that_break_lines_are_escaped(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "faces"
    folder.mkdir()
    for name in ("a\nb.png", "c\x1b[2Jd.png", "e.png"):
        picture(folder / name)
    (folder / "broken\nname.png").write_text("nothing")
    assert run(folder, "-k", "2") == 1
    out, err = capsys.readouterr()
    assert (tmp_path / "out" / "overview.png").is_file()
    assert (
        all(c.isprintable() or c == "\n" for c in out + err) and r"a\nb.png: " in out and r"broken\nname.png: " in err
    )


def test_file_in_the_way(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "face").write_text("mine")
    assert run(picture(tmp_path / "face.png"), "--overwrite") == 1
    assert "is not a folder" in capsys.readouterr().err
    assert (tmp_path / "out" / "face").read_text() == "mine"


def test_failure_while_writing_leaves_nothing(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.report.write_json", full)
    assert run(picture(tmp_path / "face.png")) == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_overview_that_cannot_be_written(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(picture: Image.Image, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cli.overview.save_overview", full)
    assert run(picture(tmp_path / "face.png")) == 1
    assert "overview.png: could not be written ([Errno 28] No space left" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["face"]


@pytest.mark.parametrize("error", [RuntimeError("odd\nthing"), MemoryError(), OSError(5, "odd"), ValueError("odd")])
def test_one_bad_face_never_stops_the_others(
    error: Exception, run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def reads(path: Path) -> np.ndarray:
        if path.name == "bad.png":
            raise error
        return read_image(path)

    monkeypatch.setattr(READS, reads)
    assert run(picture(tmp_path / "bad.png"), picture(tmp_path / "good.png"), "--k", "1") == 1
    assert (tmp_path / "out" / "good" / "report.json").exists() and not (tmp_path / "out" / "bad").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'bad.png'}: ") and ("odd" in line or "memory" in line)


def test_one_face_that_fails_in_a_batch_never_stops_the_others(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    bad = read_image(picture(tmp_path / "bad.png", seed=5))
    sample = TorchBackend.sample

    def stumbles(self: TorchBackend, lr: np.ndarray, *arguments: object) -> object:
        if any(np.allclose(face, bad, atol=1e-3) for face in lr):
            raise RuntimeError("out of memory")
        return sample(self, lr, *arguments)

    monkeypatch.setattr(TorchBackend, "sample", stumbles)
    assert run(*(picture(tmp_path / f"{i}.png", seed=i) for i in range(3)), tmp_path / "bad.png", "--k", "1") == 1
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"0", "1", "2", "overview.png", "failed.jsonl"}
    assert capsys.readouterr().err == f"{tmp_path / 'bad.png'}: out of memory\n"


def test_interrupted(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def reads(path: Path) -> np.ndarray:
        if path.name == "b.png":
            raise KeyboardInterrupt
        return read_image(path)

    monkeypatch.setattr(READS, reads)
    faces = [picture(tmp_path / name) for name in ("a.png", "b.png")]
    assert run(*faces, "--k", "1", "--batch-size", "1") == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert "interrupted" in capsys.readouterr().err


def test_nobody_reads_on(tiny_bundle: Path, tmp_path: Path) -> None:
    """A pipe whose reader has gone, as that of `| head -1`, neither stops the work nor makes noise."""
    reader, writer = os.pipe()
    os.close(reader)
    faces = [str(picture(tmp_path / name)) for name in ("a.png", "b.png")]
    options = ["--bundle", str(tiny_bundle), "--out", str(tmp_path / "out"), "--device", "cpu"]
    command = [sys.executable, "infer.py", *faces, "--k", "1", *options]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "b", "overview.png"}


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_others_may_read_what_the_umask_lets_them(run: Callable[..., int], tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        assert run(picture(tmp_path / "face.png"), "--k", "1") == 0
    finally:
        os.umask(old)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), RuntimeError("Input/output error")])
def test_bundle_that_cannot_be_read(
    error: Exception, run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def breaks(path: Path, *options: object) -> Bundle:
        raise error

    monkeypatch.setattr(LOADS, breaks)
    assert run(picture(tmp_path / "face.png")) == 2
    assert "--bundle" in (message := capsys.readouterr().err) and "Input/output error" in message


def test_smaller_than_the_bundle_takes(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def starts_at_8(path: Path, *options: object) -> Bundle:
        return dataclasses.replace(load_bundle(path, *options), lr_sizes=(8, 32))

    monkeypatch.setattr(LOADS, starts_at_8)
    assert run(picture(tmp_path / "small.png", 7, 7), picture(tmp_path / "good.png"), "--k", "1") == 1
    assert "small.png: 7 x 7 px is less than the 8 px" in capsys.readouterr().err
    assert (tmp_path / "out" / "good").is_dir()


def test_other_files_in_a_folder(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    faces = tmp_path / "faces"
    faces.mkdir()
    picture(faces / "a.png")
    (faces / "b.heic").touch()
    assert run(faces, "--k", "1") == 0
    assert capsys.readouterr().err == f"note: {faces}: 1 other file skipped (.heic)\n"
    assert run("", faces, "--k", "1", "--overwrite") == 1
    assert "empty name" in capsys.readouterr().err


def test_deterministic_kernels_are_asked_for(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "deterministic", False)
    monkeypatch.setattr(cudnn, "benchmark", True)
    assert run(picture(tmp_path / "face.png"), "--k", "1") == 0
    assert (cudnn.deterministic, cudnn.benchmark) == (True, False)


def test_names_with_any_letters(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(picture(tmp_path / "çehre 顔.png"), picture(tmp_path / "b.png")) == 0
    assert report_of(tmp_path / "out" / "çehre 顔")["input"] == "çehre 顔.png"
    assert f"Open {tmp_path / 'out' / 'overview.png'}" in capsys.readouterr().out


def test_colours_of_the_map() -> None:
    ramp = heat(torch.linspace(0, 1, 101)[None], 1.0)
    red, green, blue = (from_uint8(torch.from_numpy(np.array(ramp)).permute(2, 0, 1)) + 1) / 2
    linear = [torch.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for c in (red, green, blue)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    lightness = torch.where(luminance > 0.008856, 116 * luminance ** (1 / 3) - 16, 903.3 * luminance)[0]
    assert (lightness - torch.linspace(0, 100, 101)).abs().max() < 6  # even steps to the eye
    assert (lightness.diff() > 0).all()


def test_disagreement() -> None:
    images = torch.zeros(2, 3, 32, 32)
    images[0, :, 0, 0], images[1, :, 0, 0] = 1, -1
    spread = disagreement(images)
    assert spread[0, 0] == pytest.approx(0.5) and spread.sum() == pytest.approx(0.5)
    assert abs(disagreement(images[:1])).max() == 0


@pytest.mark.parametrize(("k", "columns", "rows"), [(1, 3, 1), (6, 8, 1), (7, 8, 2), (64, 8, 9)])
def test_sheet_layout(k: int, columns: int, rows: int) -> None:
    lr, images = -torch.ones(3, 4, 4), torch.ones(k, 3, 32, 32)
    sheet = face_sheet(lr, images, ["12 dB"] * k)
    assert sheet.size == (columns * 168 + 8, rows * 188 + 8)
    assert sheet.getpixel((8 + 80, 28 + 80)) == (0, 0, 0)
    assert overview([("a", lr, images)] * 2).size == (min(k + 1, 8) * 168 + 8, 2 * 188 + 8)


def test_shipped_bundle(tmp_path: Path) -> None:
    """The default bundle is small, and every sample that it gives downscales to its input."""
    assert sum(part.stat().st_size for part in DEFAULT_BUNDLE.rglob("*") if part.is_file()) <= 42 * 10**6
    samples = sorted((ROOT / "samples").glob("*.png"))
    assert len(samples) >= 4
    command = [sys.executable, "infer.py", "samples", "-o", str(tmp_path / "out"), "-k", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for path in samples:
        assert all(sample["lr_psnr"] > 38 for sample in report_of(tmp_path / "out" / path.stem)["samples"])
