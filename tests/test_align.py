"""Alignment: known transforms of known landmarks, an analytic picture, and faces that are aligned already."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import align
from data.align import main, read_landmarks
from data.face_finder import DetectedFace, FaceFinder
from data.ffhq_crop import Square, cut_out, ffhq_square

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="the example files are not on this machine")

# A face upright in a photo: eyes 60 px apart, the mouth 54 px below them.
UPRIGHT = np.array([[70.0, 100.0], [130.0, 100.0], [101.0, 130.0], [80.0, 154.0], [120.0, 154.0]])


def similarity(points: np.ndarray, degrees: float, scale: float, shift: tuple[float, float]) -> np.ndarray:
    """Turns clockwise as one sees it (y points down), scales, shifts; about the corner of the first pixel."""
    angle = np.radians(degrees)
    matrix = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (points + 0.5) @ matrix.T + shift - 0.5


def waves(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A smooth picture known at every place, in [0, 255]; (H, W, 3)."""
    return np.stack([127.5 + 100 * np.sin(x / 9 + c) * np.cos(y / 11 - c) for c in range(3)], axis=-1)


def photo_of_waves(width: int = 200, height: int = 260) -> Image.Image:
    y, x = np.mgrid[:height, :width] + 0.5
    return Image.fromarray(waves(x, y).round().astype(np.uint8))


# --- the square ---


def test_square_of_an_upright_face_in_closed_form() -> None:
    """Eyes 60 px apart and a mouth 54 px below: half the side is max(2 · 60, 1.8 · 54) = 120."""
    square = ffhq_square(UPRIGHT)
    np.testing.assert_allclose(square.centre, (100.5, 105.9))
    np.testing.assert_allclose(
        square.corners, np.array([(-19.5, -14.1), (-19.5, 225.9), (220.5, 225.9), (220.5, -14.1)])
    )
    assert square.side == pytest.approx(240)


def test_long_face_is_measured_by_its_mouth() -> None:
    points = UPRIGHT.copy()
    points[3:, 1] += 46  # the mouth 100 px below the eyes
    assert ffhq_square(points).side == pytest.approx(2 * 1.8 * 100)


@pytest.mark.parametrize("degrees", [0, 17, -40, 90, 180])
@pytest.mark.parametrize(("scale", "shift"), [(1.0, (0, 0)), (0.37, (12.5, -4)), (3.0, (500, 250))])
def test_square_moves_with_the_landmarks(degrees, scale, shift) -> None:
    corners = ffhq_square(similarity(UPRIGHT, degrees, scale, shift)).corners
    np.testing.assert_allclose(corners, similarity(ffhq_square(UPRIGHT).corners - 0.5, degrees, scale, shift) + 0.5)


def test_nose_does_not_matter_and_the_tilt_is_shared() -> None:
    points = UPRIGHT.copy()
    points[2] = (0, 0)
    assert np.array_equal(ffhq_square(points).corners, ffhq_square(UPRIGHT).corners)
    points[3:, 0] += 20  # the mouth aside: e − R m turns by atan(20 / 114)
    right = ffhq_square(points).right
    assert np.degrees(np.arctan2(right[1], right[0])) == pytest.approx(-np.degrees(np.arctan(20 / 114)))


@pytest.mark.parametrize("points", [np.zeros((5, 2)), np.zeros((4, 2)), np.full((5, 2), np.nan)])
def test_points_of_no_face_are_refused(points) -> None:
    with pytest.raises(ValueError, match="Expected .*landmarks"):
        ffhq_square(points)


# --- cutting out ---


def upright_square(left: float, top: float, side: float) -> Square:
    return Square(np.array([left + side / 2, top + side / 2]), np.array([side / 2, 0.0]))


def test_square_of_whole_pixels_is_the_crop() -> None:
    photo = photo_of_waves()
    face = cut_out(photo, upright_square(30, 50, 100), 100)
    assert np.array_equal(np.asarray(face), np.asarray(photo)[50:150, 30:130])


def test_whole_picture_is_itself() -> None:
    photo = photo_of_waves(64, 64)
    assert np.array_equal(np.asarray(cut_out(photo, upright_square(0, 0, 64), 64)), np.asarray(photo))


@pytest.mark.parametrize("degrees", [0, 20, -75, 180])
@pytest.mark.parametrize("size", [32, 64, 100, 150])
def test_turned_square_shows_what_is_there(degrees, size) -> None:
    """Against the picture's formula, evaluated at the centres of the result's pixels."""
    angle = np.radians(degrees)
    square = Square(np.array([101.3, 128.8]), 50 * np.array([np.cos(angle), np.sin(angle)]))
    face = np.asarray(cut_out(photo_of_waves(), square, size)).astype(float)
    top_left, bottom_left, _, top_right = square.corners
    u, v = np.meshgrid((np.arange(size) + 0.5) / size, (np.arange(size) + 0.5) / size)
    places = top_left + u[..., None] * (top_right - top_left) + v[..., None] * (bottom_left - top_left)
    inside = slice(2, -2)  # Lanczos has less to go by at the border
    error = np.abs(face - waves(places[..., 0], places[..., 1]))[inside, inside]
    assert error.mean() < 1.5 and error.max() < 8


def test_strong_shrinking_does_not_alias() -> None:
    """A chessboard of single pixels becomes grey at every factor."""
    y, x = np.mgrid[:512, :512]
    board = Image.fromarray(np.repeat(((x + y) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2))
    for side in (500, 300, 150):
        face = np.asarray(cut_out(board, upright_square(5, 5, side), 40)).astype(int)
        assert abs(face.mean() - 127.5) < 1 and np.ptp(face[2:-2, 2:-2]) <= 8, side


def test_beyond_the_border_is_mirrored_then_fades_and_the_photo_stays() -> None:
    photo = photo_of_waves(200, 200)
    face = np.asarray(cut_out(photo, upright_square(-50, 0, 200), 200)).astype(int)
    pixels = np.asarray(photo).astype(int)
    assert np.array_equal(face[:, 50:], pixels[:, :150])
    assert np.abs(face[:, 49] - pixels[:, 0]).max() <= 12  # continuous
    assert np.abs(face[:, 45] - pixels[:, 4]).mean() < 0.5 * np.abs(face[:, 45] - pixels[:, 45]).mean()  # mirrored
    contrast = face.std(axis=0).mean(axis=1)
    assert contrast[0] < 0.5 * contrast[50] and contrast[0] < contrast[30] < contrast[48]  # fading


@pytest.mark.parametrize("offset", [(-300.0, -300.0), (150.0, 180.0)])
def test_square_mostly_outside_is_still_filled(offset) -> None:
    face = np.asarray(cut_out(photo_of_waves(), upright_square(*offset, 400), 64))
    assert face.shape == (64, 64, 3) and face.min() > 10  # nowhere the black of nothing


# --- the command ---


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    photo_of_waves().save(folder / "a.png")
    photo_of_waves(300, 260).save(folder / "b.jpg")
    return folder


def line(name: str, points: np.ndarray) -> str:
    return f"{name} " + " ".join(f"{value:g}" for value in points.ravel()) + "\n"


@pytest.fixture
def landmarks(tmp_path) -> Path:
    path = tmp_path / "landmarks.txt"
    header = (
        "2\nlefteye_x lefteye_y righteye_x righteye_y nose_x nose_y leftmouth_x leftmouth_y rightmouth_x rightmouth_y\n"
    )
    path.write_text(header + line("a.png", UPRIGHT) + line("b.jpg", UPRIGHT))
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_landmarks_of_a_list_are_used(photos, landmarks, tmp_path, capsys) -> None:
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    assert (
        main([str(photos), "--out", str(out), "--size", "32", "--landmarks", str(landmarks), "--sheet", str(sheet)])
        == 0
    )
    assert names_in(out) == ["a.png", "b.png"]
    expected = cut_out(photo_of_waves(), ffhq_square(UPRIGHT), 32)
    assert np.array_equal(np.asarray(Image.open(out / "a.png")), np.asarray(expected))
    assert Image.open(sheet).width > 300
    assert f"a face of 240 px -> {out / 'a.png'}" in capsys.readouterr().out


def test_bad_photos_are_named_and_the_others_go_on(photos, landmarks, tmp_path, capsys) -> None:
    (photos / "aa.jpg").write_bytes(b"no picture")
    photo_of_waves().save(photos / "c.png")
    out = tmp_path / "out"
    assert (
        main(
            [str(photos), str(tmp_path / "gone.png"), "--out", str(out), "--size", "32", "--landmarks", str(landmarks)]
        )
        == 1
    )
    assert names_in(out) == ["a.png", "b.png"]
    said = capsys.readouterr().err
    for part in ("aa.jpg: not a picture", "c.png: ", "no line for it", "gone.png: no such file"):
        assert part in said


FURTHER = ("", "_face2", "_face3")


def found_faces(*sides: float):
    """A finder of faces of given sizes, in place of MTCNN, which small pictures of nobody would not wake."""
    return lambda path, picture: np.array([similarity(UPRIGHT, 0, side / 240, (0, 0)) for side in sides])


@pytest.fixture
def finder(monkeypatch):
    def put(function) -> None:
        monkeypatch.setattr(align, "FaceFinder", lambda *_: function)

    return put


def test_several_faces_give_several_files_the_largest_first(photos, tmp_path, finder) -> None:
    finder(found_faces(100, 200, 150))
    photo_of_waves().save(photos / "a_face2.png")  # has the first right to its name
    out = tmp_path / "out"
    assert main([str(photos), "--out", str(out), "--size", "32"]) == 0
    assert names_in(out) == sorted(
        f"{photo}{face}.png"
        for photo, faces in (("a", ("", "_face3", "_face4")), ("a_face2", FURTHER), ("b", FURTHER))
        for face in faces
    )
    for name, side in (("a", 200), ("a_face3", 150), ("a_face4", 100)):
        expected = cut_out(photo_of_waves(), ffhq_square(similarity(UPRIGHT, 0, side / 240, (0, 0))), 32)
        assert np.array_equal(np.asarray(Image.open(out / f"{name}.png")), np.asarray(expected)), name


def test_largest_and_smallest_choose(photos, tmp_path, finder, capsys) -> None:
    finder(found_faces(100, 200))
    a = [str(photos / "a.png"), "--size", "480"]
    assert main([*a, "--out", str(tmp_path / "one"), "--largest"]) == 0
    assert names_in(tmp_path / "one") == ["a.png"]
    assert "a face of 200 px, enlarged to 480 px" in capsys.readouterr().out
    assert main([*a, "--out", str(tmp_path / "two")]) == 0  # 100 px is less than a quarter of 480
    assert names_in(tmp_path / "two") == ["a.png"]
    assert main([*a, "--out", str(tmp_path / "three"), "--smallest", "90"]) == 0
    assert names_in(tmp_path / "three") == ["a.png", "a_face2.png"]
    assert main([*a, "--out", str(tmp_path / "four"), "--smallest", "300"]) == 1
    assert "the largest face takes up 200 px, less than 300" in capsys.readouterr().err


def test_no_face_is_a_reason(photos, tmp_path, finder, capsys) -> None:
    finder(lambda path, picture: np.zeros((0, 5, 2)) if path.name == "a.png" else UPRIGHT[None])
    assert main([str(photos), "--out", str(tmp_path / "out"), "--size", "32"]) == 1
    assert "a.png: no face found" in capsys.readouterr().err
    assert names_in(tmp_path / "out") == ["b.png"]


def test_second_call_goes_on_where_the_first_stopped(photos, landmarks, tmp_path, capsys, monkeypatch) -> None:
    out = tmp_path / "out"
    call = [str(photos), "--out", str(out), "--size", "32", "--landmarks", str(landmarks)]
    assert main(call) == 0
    before = (out / "a.png").read_bytes()
    (out / "b.png").unlink()
    cut = []
    monkeypatch.setattr(align, "cut_out", lambda *args: cut.append(args) or cut_out(*args))
    assert main(call) == 0
    assert len(cut) == 1 and names_in(out) == ["a.png", "b.png"]
    assert "1 photos were aligned before" in capsys.readouterr().out
    assert main([*call, "--overwrite"]) == 0
    assert len(cut) == 3 and (out / "a.png").read_bytes() == before


def test_faces_of_another_size_and_photos_are_not_overwritten(photos, landmarks, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    call = [str(photos / "a.png"), "--landmarks", str(landmarks)]
    assert main([*call, "--out", str(out), "--size", "32"]) == 0
    assert main([*call, "--out", str(out), "--size", "48"]) == 1
    assert "made of another photo or otherwise; --overwrite" in capsys.readouterr().err
    assert main([*call, "--out", str(out), "--size", "48", "--overwrite"]) == 0
    photo = (photos / "a.png").read_bytes()
    assert main([*call, "--out", str(photos), "--size", "32", "--overwrite"]) == 1
    assert "no earlier call wrote it" in capsys.readouterr().err and (photos / "a.png").read_bytes() == photo


def test_another_photo_of_the_same_name_is_another_job(photos, landmarks, tmp_path, capsys) -> None:
    (tmp_path / "other").mkdir()
    photo_of_waves(220).save(tmp_path / "other" / "a.png")
    call = ["--out", str(tmp_path / "out"), "--size", "32", "--landmarks", str(landmarks)]
    assert main([str(photos / "a.png"), *call]) == 0
    before = (tmp_path / "out" / "a.png").read_bytes()
    assert main([str(tmp_path / "other" / "a.png"), *call]) == 1
    assert "made of another photo" in capsys.readouterr().err and (tmp_path / "out" / "a.png").read_bytes() == before
    assert main([str(tmp_path / "other" / "a.png"), *call, "--overwrite"]) == 0
    assert (tmp_path / "out" / "a.png").read_bytes() != before


@pytest.mark.parametrize("text", ["", "2\nnames\n", "a.png 1 2 3\n", line("a.png", UPRIGHT) + "b.jpg 1 2 x\n"])
def test_other_lists_are_refused(tmp_path, text) -> None:
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"list\.txt.*ten numbers"):
        read_landmarks(path)


NUMBERS = [f"{value:g}" for value in UPRIGHT.ravel()]
TABLES = {
    "Kaggle": "image_id,lefteye_x,lefteye_y\na b.png," + ",".join(NUMBERS) + "\n",
    "blanks": "a b.png  " + "   ".join(NUMBERS) + "\n\n",
    "quoted": '"a b.png",' + ",".join(f'"{n}"' for n in NUMBERS) + "\r\n",
    "semicolons": "a b.png;" + ";".join(n.replace(".", ",") + ",0" for n in NUMBERS) + "\n",
    "tabs": "a b.png\t" + "\t".join(NUMBERS) + "\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("kind", TABLES)
def test_tables_of_other_forms_are_read(tmp_path, kind, encoding) -> None:
    (tmp_path / "list").write_bytes(TABLES[kind].encode(encoding))
    found = read_landmarks(tmp_path / "list")
    assert found.keys() == {"a b.png"} and np.array_equal(found["a b.png"], UPRIGHT)


@needs_cases
@pytest.mark.parametrize(("file", "name"), [("landmarks.csv", "a.png"), ("landmarks_blank.txt", "a b.png")])
def test_the_cases_are_read(file, name) -> None:
    points = read_landmarks(CASES / file)[name]
    assert points.tolist() == [[5, 6], [11, 6], [8, 8], [6, 11], [10, 11]]


@pytest.mark.parametrize("point", [(1e9, 5), (-3, 5), (5, 260), (np.nan, 5)])
def test_points_outside_the_picture_are_refused(photos, tmp_path, point, capsys) -> None:
    points = UPRIGHT.copy()
    points[3] = point
    (tmp_path / "list").write_text(line("a.png", points))
    call = [str(photos / "a.png"), "--out", str(tmp_path / "out"), "--landmarks", str(tmp_path / "list")]
    assert main(call) == 1
    assert "points outside its 200 x 260 px" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.png"))


@pytest.mark.parametrize("turn", range(4))
def test_faces_are_found_in_every_turn(turn) -> None:
    """With a finder that sees faces only where the mouth is below the eyes, and knows the place of this one."""
    upright = photo_of_waves()
    photo = upright.rotate(90 * turn, expand=True)

    class Stub(FaceFinder):
        def __init__(self) -> None:
            self.smallest = None

        def _search(self, picture, smallest):
            same = picture.size == upright.size and np.array_equal(np.asarray(picture), np.asarray(upright))
            return [DetectedFace(UPRIGHT, UPRIGHT[[0, 4]], 1.0)] if same else []

    (points,) = Stub()(Path("a.png"), photo)
    face, expected = (cut_out(*args, 64) for args in ((photo, ffhq_square(points)), (upright, ffhq_square(UPRIGHT))))
    np.testing.assert_allclose(np.asarray(face, float), np.asarray(expected, float), atol=2)


def test_a_face_within_a_face_is_no_other() -> None:
    class Stub(FaceFinder):
        def __init__(self) -> None:
            self.smallest = None

        def _search(self, picture, smallest):
            boxes = [[[50, 70], [150, 190]], [[70, 90], [130, 165]], [[140, 160], [190, 220]]]
            return [DetectedFace(UPRIGHT, np.array(box, float), 1.0) for box in boxes]

    found = Stub().detect(photo_of_waves())
    assert [face.box[0].tolist() for face in found] == [[50, 70], [140, 160]]


@pytest.mark.parametrize("arguments", [["--size", "0"], ["--confidence", "1.5"], ["--min-face", "-1"]])
def test_arguments_out_of_range_are_refused(photos, tmp_path, arguments, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(photos), "--out", str(tmp_path / "out"), *arguments])
    assert arguments[0] in capsys.readouterr().err


# --- MTCNN ---


@pytest.fixture(scope="module")
def mtcnn() -> FaceFinder:
    pytest.importorskip("facenet_pytorch", reason="facenet-pytorch is not installed")
    return FaceFinder()


@pytest.mark.parametrize("picture", [np.zeros((64, 64, 3)), np.full((4, 4, 3), 255), np.full((20, 300, 3), 90)])
def test_pictures_of_nothing_show_no_face(mtcnn, picture) -> None:
    assert mtcnn(Path("x"), Image.fromarray(picture.astype(np.uint8))).shape == (0, 5, 2)


def test_aligned_faces_are_found_where_they_are(mtcnn) -> None:
    """Of CelebA-HQ's own pictures: aligning them again changes little, and turning them first changes nothing."""
    path = align_data()
    with zipfile.ZipFile(path) as archive:
        names = sorted(archive.namelist())[:6]
        pictures = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in names]
    shifts, sides = [], []
    for picture in pictures:
        points = mtcnn(path, picture)
        square = ffhq_square(points[0])
        shifts.append((square.centre - np.array(picture.size) / 2) / picture.width)
        sides.append(square.side / picture.width)
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.03 and np.abs(shifts).max() < 0.1
    assert 0.9 < np.mean(sides) < 1.1
    turned = pictures[0].rotate(20, Image.Resampling.BICUBIC)  # counter-clockwise
    upright, other = ffhq_square(mtcnn(path, pictures[0])[0]), ffhq_square(mtcnn(path, turned)[0])
    degrees = np.degrees(np.arctan2(*upright.right[::-1]) - np.arctan2(*other.right[::-1]))
    assert degrees == pytest.approx(20, abs=3) and other.side == pytest.approx(upright.side, rel=0.06)


def align_data() -> Path:
    from data.contents import find_data

    try:
        return find_data("celebahq512_val.zip")
    except FileNotFoundError:
        pytest.skip("celebahq512_val.zip, faces of CelebA-HQ at 512 px, is not here")
