"""Photos with faces in them, through infer.py on a tiny bundle, with a stub in the place of the face finder."""

from __future__ import annotations

import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import infer
from data.face_finder import DetectedFace
from data.ffhq_crop import cut_out, ffhq_square
from data.image_io import read_bytes, read_image
from data.listing import find_images
from data.paste_back import Patch, paste_back, read_photo

# A face of 1 px a side: the eyes a quarter apart, the square's centre at (0, 0).
UNIT = np.array([[-0.125, -0.025], [0.125, -0.025], [0.0, 0.06], [-0.1, 0.225], [0.1, 0.225]])


def face(x: float, y: float, side: float, degrees: float = 0.0, confidence: float = 0.99) -> DetectedFace:
    angle = np.radians(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    points = UNIT @ turn * side + (x, y)
    half = 0.3 * side
    return DetectedFace(points - 0.5, np.array([[x - half, y - half], [x + half, y + half]]), confidence)


def photo(path: Path, width: int = 120, height: int = 90) -> Path:
    rng = np.random.default_rng(3)
    small = Image.fromarray(rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8))
    small.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def run(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs infer.py on files in tmp_path, where the finder sees given faces."""

    def call(found: list[DetectedFace], *arguments: str | Path, out: str = "out") -> int:
        class Stub:
            def __init__(self, **_: object) -> None:
                pass

            def detect(self, picture: Image.Image, smallest: int) -> list[DetectedFace]:
                return found

        monkeypatch.setattr("cli.photos.FaceFinder", Stub)
        options = ["--bundle", tiny_bundle, "--out", tmp_path / out, "--device", "cpu", "-k", "2"]
        return infer.main([str(argument) for argument in (*options, *arguments)])

    return call


THREE = [face(30, 40, 20.4, 10), face(85, 45, 30.6, -20, 0.95), face(60, 30, 50)]


def test_each_face_has_a_folder_and_is_listed(run: Callable[..., int], tmp_path: Path) -> None:
    path = photo(tmp_path / "holiday.png")
    assert run(THREE, path) == 0
    folder = tmp_path / "out" / "holiday"
    assert sorted(p.name for p in folder.iterdir()) == ["face-2", "face-3", "faces.json"]
    listed = json.loads((folder / "faces.json").read_text())
    assert listed["input"] == "holiday.png"
    large, middle, small = listed["faces"]  # the bundle makes 32 px
    assert large["folder"] is None and large["lr_size"] is None and "more than the 32 px" in large["passed_through"]
    expected = {"folder": "face-2", "angle": -20, "confidence": 0.95, "lr_size": 30}
    assert {name: middle[name] for name in expected} == expected
    assert (small["folder"], small["angle"], small["lr_size"]) == ("face-3", 10, 20)
    square = ffhq_square(THREE[1].points)
    np.testing.assert_allclose(middle["square"], square.corners, atol=0.01)
    cut = np.asarray(cut_out(Image.open(path), square, 30))
    assert np.array_equal(read_bytes(folder / "face-2" / "input.png"), cut)
    for name in ("face-2", "face-3"):
        report = json.loads((folder / name / "report.json").read_text())
        assert report["input_size"] == [120, 90] and min(row["lr_psnr"] for row in report["samples"]) > 30
    assert Image.open(tmp_path / "out" / "overview.png").height > 2 * 160


@pytest.mark.parametrize(("scale", "sample"), [(1, 1), (3, 2)])
def test_faces_are_put_back_and_the_rest_stays(
    run: Callable[..., int], tmp_path: Path, scale: int, sample: int
) -> None:
    path = photo(tmp_path / "holiday.png")
    assert run(THREE, path, "--paste-back", "--upscale", scale, "--paste-sample", sample) == 0
    folder = tmp_path / "out" / "holiday"
    pairs = [(THREE[1], "face-2"), (THREE[0], "face-3")]
    patches = [Patch(ffhq_square(f.points), read_image(folder / name / f"{sample}.png")) for f, name in pairs]
    pasted = read_bytes(folder / "photo.png")
    assert np.array_equal(pasted, np.asarray(paste_back(read_photo(path), patches, scale).picture))
    plain = np.asarray(Image.open(path).resize((120 * scale, 90 * scale), Image.Resampling.LANCZOS))
    changed = (plain != pasted).any(axis=-1).mean()
    assert 0.02 < changed < (20.4**2 + 30.6**2) / (120 * 90)
    if scale == 1:  # the samples downscale to what was there
        assert np.abs(read_bytes(path).astype(int) - pasted).mean() < 1


def test_small_squares_are_faces_and_the_finder_is_not_asked(run: Callable[..., int], tmp_path: Path) -> None:
    path = photo(tmp_path / "face.png", 24, 24)
    assert run(THREE, path) == 0
    assert (tmp_path / "out" / "face" / "report.json").is_file()
    assert run([face(12, 12, 20)], path, "--align", "always", out="always") == 0
    assert (tmp_path / "always" / "face" / "face-1" / "report.json").is_file()
    assert run([], path, "--align", "always", out="none") == 1
    wide = photo(tmp_path / "wide.png", 30, 24)
    assert run([face(12, 12, 20)], wide, "--align", "never", out="never") == 0
    assert (tmp_path / "never" / "wide" / "report.json").is_file()


def test_downscale_makes_low_resolution_faces_of_sharp_photos(run: Callable[..., int], tmp_path: Path) -> None:
    path = photo(tmp_path / "sharp.png")
    assert run(THREE, path, "--downscale", "8") == 0
    faces = json.loads((tmp_path / "out" / "sharp" / "faces.json").read_text())["faces"]
    assert [row["lr_size"] for row in faces] == [8, 8, 8]


def doubts_of(folder: Path) -> list[str]:
    return json.loads((folder / "report.json").read_text())["doubts"]


def test_no_face_is_doubtful_or_has_a_way_out(run: Callable[..., int], tmp_path: Path, capsys) -> None:
    path, large = photo(tmp_path / "a.png", 32, 30), photo(tmp_path / "b.png")
    assert run([], path, large) == 1
    assert "no face found" in doubts_of(tmp_path / "out" / "a")
    said = capsys.readouterr()
    assert f"{large}: " in said.err and "--downscale" in said.err and "doubtful: no face found" in said.out
    assert run([], large, "--downscale", "16", out="down") == 0
    assert "no face found" in doubts_of(tmp_path / "down" / "b")


def test_without_the_finder_the_centre_is_taken(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    path = photo(tmp_path / "a.png", 32, 30)
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    for align, status in (("auto", 0), ("always", 1)):
        options = ["--bundle", tiny_bundle, "-o", tmp_path / align, "-k", "1", "--align", align]
        assert infer.main([str(option) for option in (path, *options)]) == status
        assert "pip install" in capsys.readouterr().err
    assert doubts_of(tmp_path / "auto" / "a") == ["under 8 px between the eyes"]


PROFILE = face(60, 45, 30)
PROFILE.points[2, 0] += 5
DOUBTFUL = {
    "cut by the border": face(6, 45, 30),
    "far from frontal": PROFILE,
    "under 8 px between the eyes": face(60, 45, 25),
}


@pytest.mark.parametrize("word", DOUBTFUL)
def test_what_is_doubtful_is_said(run: Callable[..., int], tmp_path: Path, word: str) -> None:
    path = photo(tmp_path / "a.png")
    assert run([DOUBTFUL[word]], path) == 0
    assert run([face(60, 45, 32.5)], path, out="good") == 0
    assert word in doubts_of(tmp_path / "out" / "a" / "face-1")
    assert doubts_of(tmp_path / "good" / "a" / "face-1") == []
    grids = [Image.open(tmp_path / out / "a" / "face-1" / "grid.png") for out in ("out", "good")]
    assert grids[0].height > grids[1].height


def test_a_photo_appears_as_a_whole_or_not_at_all(run: Callable[..., int], tmp_path: Path, monkeypatch, capsys) -> None:
    path = photo(tmp_path / "holiday.png")

    def breaks(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("cli.photos.write_photo", breaks)
        assert run(THREE, path, "--paste-back") == 1
    assert "holiday.png: the disk is full" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert run(THREE, path, "--paste-back") == 0
    assert run(THREE, path) == 1  # nothing is replaced
    assert run(THREE[:1], path, "--overwrite") == 0
    files = {
        p.relative_to(tmp_path / "out" / "holiday").as_posix() for p in (tmp_path / "out" / "holiday").rglob("*.*")
    }
    assert "face-1/report.json" in files and "photo.png" not in files and "face-2/1.png" not in files
    assert find_images([tmp_path / "out"]).images == []  # results are no inputs


@pytest.mark.parametrize(
    "options", [["--paste-sample", "3", "--paste-back"], ["--upscale", "2"], ["--paste-back", "--align", "never"]]
)
def test_options_that_cannot_be_followed(run: Callable[..., int], tmp_path: Path, options: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run([], photo(tmp_path / "a.png"), *options)
    assert options[0] in capsys.readouterr().err


def test_photos_that_are_done_are_passed_over(run: Callable[..., int], tmp_path: Path, capsys) -> None:
    path, other = photo(tmp_path / "holiday.png"), photo(tmp_path / "other.png", 100)
    assert run(THREE, path) == 0
    before = (tmp_path / "out" / "holiday" / "faces.json").read_bytes()
    (tmp_path / "out" / "holiday" / "face-3" / "1.png").unlink()  # and is made again
    assert run(THREE, path, other) == 0
    assert (tmp_path / "out" / "holiday" / "face-3" / "1.png").is_file()
    capsys.readouterr()
    assert run([], path, other) == 0
    assert capsys.readouterr().out.startswith("2 inputs were there already")
    assert (tmp_path / "out" / "holiday" / "faces.json").read_bytes() == before
    assert run(THREE, path, "--seed", "1") == 1 and "--overwrite" in capsys.readouterr().err


def test_photos_in_archives(run: Callable[..., int], tmp_path: Path, capsys) -> None:
    path = photo(tmp_path / "holiday.png")
    assert run(THREE, path, "--paste-back", "--archive", "tar") == 0
    assert f"{tmp_path}/out/faces-00000.tar" in capsys.readouterr().out
    with tarfile.open(tmp_path / "out" / "faces-00000.tar") as archive:
        names = archive.getnames()
    files = ("1.png", "2.png", "input.png", "latents.npz", "report.json")
    faces = [f"holiday.face-{i}.{file}" for i in (2, 3) for file in files]
    assert names == [*faces, "holiday.faces.json", "holiday.photo.png"]
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run(THREE, path, "--archive", "parquet") == 0
    table = parquet.read_table(tmp_path / "out" / "faces-00000.parquet")
    assert table["name"].to_pylist() == ["holiday/face-2", "holiday/face-3"]
