"""What a command line may name: files, folders, lists, patterns, zips and Parquet files."""

from __future__ import annotations

import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.image_io import UnreadableImage, read_image
from data.listing import Member, find_images
from data.report import folder_names

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (6, 8), dtype=np.uint8)


def test_find_images(tmp_path: Path) -> None:
    folder, empty = tmp_path / "faces", tmp_path / "empty"
    (folder / "deeper.png").mkdir(parents=True)
    empty.mkdir()
    for name in ("b.PNG", "a.jpeg", "c.tiff", "notes.txt", "._a.jpeg", "deeper.png/x.png"):
        (folder / name).touch()
    odd = tmp_path / "odd.dat"
    odd.touch()
    again = [folder / "a.jpeg", folder / ".." / "odd.dat"]
    found = find_images([odd, folder, *again, tmp_path / "gone.png", str(empty)])
    assert found.images == [odd, folder / "a.jpeg", folder / "b.PNG", folder / "c.tiff"]
    assert [path for path, _ in found.problems] == [tmp_path / "gone.png", empty]
    assert "no such" in found.problems[0][1] and "without images" in found.problems[1][1]
    assert found.skipped == [(folder, "1 other file skipped (.txt)")]


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "jfif", "webp", "bmp", "tif", "tiff", "gif", "ppm", "pgm"])
def test_suffixes_in_folders(tmp_path: Path, suffix: str) -> None:
    image = Image.fromarray(GREY if suffix == "pgm" else RGB)
    image.save(tmp_path / f"a.{suffix}", format="JPEG" if suffix == "jfif" else None)
    (path,) = find_images([tmp_path]).images
    assert read_image(path).shape == (3, 6, 8)


@pytest.mark.parametrize(
    ("files", "remark"),
    [
        (["b.heic", "c.HEIC"], "2 other files skipped (.heic)"),
        (["b.heic", "c", ".hidden"], "2 other files skipped (.heic, no suffix)"),
        ([f"b.{letter}" for letter in "abcdef"], "6 other files skipped (.a, .b, .c, .d, .e, …)"),
    ],
)
def test_other_files_are_counted(tmp_path: Path, files: list[str], remark: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    ((_, reason),) = find_images([tmp_path]).problems
    assert reason.endswith(remark)
    (tmp_path / "a.png").touch()
    found = find_images([tmp_path])
    assert found.skipped == [(tmp_path, remark)] and not found.problems


def test_an_empty_name_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").touch()
    monkeypatch.chdir(tmp_path)
    found = find_images([""])
    assert not found.images and "empty name" in found.problems[0][1]
    assert find_images(["."]).images == [Path("a.png")]


def test_links_that_go_round_in_circles(tmp_path: Path) -> None:
    try:
        (tmp_path / "a.png").symlink_to("b.png")
        (tmp_path / "b.png").symlink_to("a.png")
    except OSError:
        pytest.skip("no symbolic links here")
    found = find_images([tmp_path, tmp_path / "a.png"])
    assert set(found.images) == {tmp_path / "a.png", tmp_path / "b.png"} and not found.problems
    for path in found.images:
        with pytest.raises(UnreadableImage, match="a.png|b.png"):
            read_image(path)


def write_pictures(folder: Path, *names: str) -> list[bytes]:
    """Writes pictures that all differ, and gives their bytes."""
    contents = []
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(path)
        contents.append(path.read_bytes())
    return contents


def test_lists_name_files_from_here_or_beside_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, "here/a.png", "lists/b.png", "lists/c/d.png")
    here, listed = tmp_path / "here", tmp_path / "lists"
    (listed / "faces.txt").write_text(
        f"\ufeffa.png\nb.png\r\n\n{listed / 'c'}\ngone.png\nfaces.txt\n", encoding="utf-8"
    )
    monkeypatch.chdir(here)
    found = find_images([listed / "faces.txt"])
    assert found.images == [Path("a.png"), listed / "b.png", listed / "c" / "d.png", listed / "faces.txt"]
    assert [path for path, _ in found.problems] == [listed / "gone.png"]


def test_patterns(tmp_path: Path) -> None:
    write_pictures(tmp_path, "1/a.png", "1/b.jpg", "2/c.png", "2/3/d.png", "[x].png")
    assert find_images([tmp_path / "*" / "*.png"]).images == [tmp_path / "1" / "a.png", tmp_path / "2" / "c.png"]
    assert len(find_images([tmp_path / "**" / "*.png"]).images) == 4
    assert find_images([tmp_path / "[x].png"]).images == [tmp_path / "[x].png"]  # a file of that name is no pattern
    assert "no such" in find_images([tmp_path / "*.gif"]).problems[0][1]


def test_folders_of_folders(tmp_path: Path) -> None:
    """As torchvision unpacks CelebA, and as FFHQ comes; masks and hidden files are no faces."""
    write_pictures(tmp_path, *(f"celeba/img_align_celeba/00000{i}.jpg" for i in (2, 1)))
    (tmp_path / "celeba" / "list_attr_celeba.txt").write_text("2")
    write_pictures(tmp_path, "celeba/.trash/1.jpg", "celeba/CelebAMask-HQ-mask-anno/0/00000_skin.png")
    for root in (tmp_path, tmp_path / "celeba"):
        found = find_images([root])
        assert [path.name for path in found.images] == ["000001.jpg", "000002.jpg"] and not found.problems


@pytest.mark.parametrize("kind", ["zip", "parquet", "plain parquet"])
def test_archives(kind: str, tmp_path: Path) -> None:
    names = ["00000/img1.png", "00000/img2.png", "00001/img1.png"]
    contents = write_pictures(tmp_path, *names)
    path = tmp_path / f"faces.{kind.split()[-1]}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in zip(names, contents, strict=True):
                archive.writestr(name, content)
            archive.writestr("dataset.json", "{}")
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        column = [{"bytes": content, "path": name} for name, content in zip(names, contents, strict=True)]
        table = {"label": [1, 2, 3], "image": contents if kind.startswith("plain") else column}
        parquet.write_table(arrow.table(table), path, row_group_size=2)
    found = find_images([path, path])
    assert not found.problems and len(found.images) == 3
    for image, content in zip(found.images, contents, strict=True):
        assert isinstance(image, Member) and image.open().getvalue() == content
        assert np.array_equal(read_image(image.open()), read_image(BytesIO(content)))
    plain = kind.startswith("plain")
    assert folder_names(found.images) == (["00000000", "00000001", "00000002"] if plain else ["img1", "img2", "img1-2"])
    assert str(found.images[2]) == f"{path}/{'00000002' if plain else '00001/img1.png'}"


@pytest.mark.parametrize("name", ["faces.zip", "faces.parquet"])
def test_archives_that_are_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"nothing")
    ((path, reason),) = find_images([tmp_path / name]).problems
    assert path == tmp_path / name and ("complete zip" in reason or "Parquet" in reason)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faces.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    ((_, reason),) = find_images([tmp_path / "faces.parquet"]).problems
    assert "pip install pyarrow" in reason
