"""The standard splits: against the published checksum and sizes, and on tiny made-up data sets."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.contents import find_data
from data.datamodule import FaceData
from data.faces import Faces
from data.splits import (
    CELEBA_ENDS,
    MAPPING,
    SIZES,
    celeba_part,
    check_sizes,
    ffhq_part,
    main,
    read_mapping,
    split_names,
)

CODES = {"train": 0, "val": 1, "test": 2}
# CelebA-HQ's picture, CelebA's picture, and where CelebA puts it: around both borders.
ROWS = [(0, 162_771, "val"), (1, 162_770, "train"), (2, 1, "train"), (3, 182_638, "test"), (4, 182_637, "val"),
        (10, 202_599, "test"), (11, 77, "train")]  # fmt: skip
HEADER = "idx          orig_idx   orig_file\n"
incomplete = pytest.mark.filterwarnings("ignore:.*is not complete", "ignore:.*not the published one")


def mapping_text() -> str:
    return HEADER + "".join(f"{i:<12} {n - 1:<10} {n:06d}.jpg\n" for i, n, _ in ROWS)


def write_picture(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path)


def value_of(face: torch.Tensor) -> int:
    return int(face.float().mean().round())


@pytest.fixture
def celebahq(tmp_path) -> Path:
    """CelebAMask-HQ as it comes: pictures, masks that must not be taken for faces, and the mapping."""
    root = tmp_path / "CelebAMask-HQ"
    for index, _, _ in ROWS:
        write_picture(root / "CelebA-HQ-img" / f"{index}.png", 10 * index)
        write_picture(root / "CelebAMask-HQ-mask-anno" / "0" / f"{index:05d}_hair.png", 255)
    (root / MAPPING).write_text(mapping_text())
    return root


def zipped(folder: Path) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path


# --- facts ---


def test_celeba_s_partition_is_the_published_file() -> None:
    """The list that these borders make, in the file's own format, has the MD5 that CelebA's users check it by."""
    lines = [f"{n:06d}.jpg {CODES[celeba_part(n)]}\r\n" for n in range(1, CELEBA_ENDS[-1] + 1)]
    assert hashlib.md5("".join(lines).encode()).hexdigest() == "d32c9cbf5e040fd4025c592c306e6668"
    sizes = [sum(line.endswith(f" {code}\r\n") for line in lines) for code in CODES.values()]
    assert sizes == [SIZES["celeba"][part] for part in CODES]


def test_ffhq_s_parts() -> None:
    assert [ffhq_part(n) for n in (0, 59_999, 60_000, 69_999)] == ["train", "train", "val", "val"]


@pytest.mark.parametrize(("part_of", "number"), [(celeba_part, 0), (celeba_part, 202_600), (ffhq_part, 70_000)])
def test_numbers_that_no_picture_has_are_refused(part_of, number) -> None:
    with pytest.raises(ValueError, match=f"got {number}"):
        part_of(number)


def test_published_mapping_gives_the_published_sizes(recwarn) -> None:
    try:
        path = find_data(MAPPING)
    except FileNotFoundError:
        pytest.skip(f"{MAPPING} is not here")
    names = [f"{i}.jpg" for i in range(30_000)]
    parts = split_names("celebahq", names, lambda _: path.read_bytes())
    assert {part: len(chosen) for part, chosen in parts.items()} == {"train": 24_183, "val": 2_993, "test": 2_824}
    assert not recwarn.list  # its checksum is the known one


# --- the mapping ---


@pytest.mark.parametrize("header", ["", HEADER, "idx orig_idx orig_file\n"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_mapping_is_read_with_and_without_header(header, end) -> None:
    text = mapping_text().replace(HEADER, header).replace("\n", end)
    with pytest.warns(UserWarning, match="not the published one"):
        assert read_mapping(text) == {i: n for i, n, _ in ROWS}


@pytest.mark.parametrize(
    ("text", "reason"),
    [("<html>", "line 1, got '<html>'"), (HEADER + "0 1\n", "line 2"), ("0 0 000001.jpg\n0 1 000002.jpg", "twice")],
)
def test_other_files_are_refused(text, reason) -> None:
    with pytest.raises(ValueError, match=f"{MAPPING}.*{reason}"):
        read_mapping(text)


# --- data sets ---


@incomplete
@pytest.mark.parametrize("kind", ["folder", "zip", "pictures"])
@pytest.mark.parametrize("part", CODES)
def test_celebahq_by_the_part_of_celeba(celebahq, kind, part) -> None:
    source = {"folder": celebahq, "zip": zipped(celebahq), "pictures": celebahq / "CelebA-HQ-img"}[kind]
    faces = Faces(source, 8, split="celebahq", part=part)
    assert {value_of(face) for face in faces} == {10 * i for i, _, p in ROWS if p == part}


def test_what_is_missing_of_a_standard_split_is_said(celebahq) -> None:
    with pytest.warns(UserWarning) as said:
        Faces(celebahq, 8, split="celebahq", part="val")
    assert any("celebahq, val: 2 pictures of 2993" in str(w.message) for w in said)


def test_missing_mapping_says_which_file_to_put_where(celebahq, monkeypatch) -> None:
    (celebahq / MAPPING).unlink()
    monkeypatch.setattr("data.contents.data_folders", lambda: [Path("/no/such/place")])
    with pytest.raises(FileNotFoundError, match=rf"Expected {MAPPING}.*datasets.*CelebAMask-HQ"):
        Faces(celebahq, 8, split="celebahq")


def test_pictures_counted_from_one_are_refused(celebahq) -> None:
    folder = celebahq / "CelebA-HQ-img"
    (folder / "0.png").rename(folder / "30000.png")
    with pytest.raises(ValueError, match="count from 1 to 30000"):
        Faces(celebahq, 8, split="celebahq")


@incomplete
def test_picture_that_the_mapping_lacks_is_named(celebahq) -> None:
    write_picture(celebahq / "CelebA-HQ-img" / "12.png", 0)
    with pytest.raises(ValueError, match=r"12\.png does not fit the split celebahq"):
        Faces(celebahq, 8, split="celebahq")


@incomplete
@pytest.mark.parametrize("name", ["{n:05d}.png", "img{n:08d}.png"])
def test_ffhq_by_number(tmp_path, name) -> None:
    for n in (0, 59_999, 60_000, 69_999):
        write_picture(tmp_path / f"{n - n % 1000:05d}" / name.format(n=n), n // 1000)
    parts = {
        part: {value_of(face) for face in Faces(tmp_path, 8, split="ffhq", part=part)} for part in ("train", "val")
    }
    assert parts == {"train": {0, 59}, "val": {60, 69}}
    with pytest.raises(ValueError, match="no picture for test"):
        Faces(tmp_path, 8, split="ffhq", part="test")


def test_two_sizes_of_one_picture_are_refused(tmp_path) -> None:
    for size in ("images1024x1024", "thumbnails128x128"):
        write_picture(tmp_path / size / "00000.png", 0)
    with pytest.raises(ValueError, match=r"images1024x1024.*thumbnails128x128.*one size"):
        Faces(tmp_path, 8, split="ffhq")


@incomplete
def test_celeba_by_number_without_the_further_faces_of_a_photo(tmp_path) -> None:
    for name in ("000001", "162771", "000001_face2", "notes"):
        write_picture(tmp_path / f"{name}.png", 7)
    assert Faces(tmp_path, 8, split="celeba").names == ["000001.png"]
    assert Faces(tmp_path, 8, split="celeba", part="val").names == ["162771.png"]


# --- lists ---


@incomplete
def test_written_lists_are_the_same_split(celebahq, tmp_path, capsys) -> None:
    assert main(["celebahq", str(celebahq), "--out", str(tmp_path / "lists")]) == 1  # not complete, and says so
    captured = capsys.readouterr()
    assert "train: 3 pictures" in captured.out and "train: 3 pictures of 24183" in captured.err
    for part in CODES:
        expected = Faces(celebahq, 8, split="celebahq", part=part).names
        assert Faces(celebahq, 8, split=str(tmp_path / "lists"), part=part).names == expected


def test_complete_data_set_gives_status_0(tmp_path, monkeypatch, capsys) -> None:
    write_picture(tmp_path / "faces" / "00000.png", 0)
    monkeypatch.setitem(SIZES, "ffhq", {"train": 1, "val": 0, "test": 0})
    assert main(["ffhq", str(tmp_path / "faces"), "--out", str(tmp_path / "lists")]) == 0
    assert (tmp_path / "lists/train.txt").read_text() == "00000.png\n"
    assert not (tmp_path / "lists/val.txt").exists() and not capsys.readouterr().err


def test_command_names_what_is_wrong(tmp_path, capsys) -> None:
    assert main(["ffhq", str(tmp_path / "nothing"), "--out", str(tmp_path / "lists")]) == 1
    assert "nothing" in capsys.readouterr().err and not (tmp_path / "lists").exists()


def write_lists_by_hand(folder: Path, **parts: str) -> str:
    folder.mkdir()
    for part, text in parts.items():
        (folder / f"{part}.txt").write_text(text)
    return str(folder)


def test_lists_of_one_s_own_take_stems_names_and_paths(celebahq, tmp_path) -> None:
    lists = write_lists_by_hand(tmp_path / "own", train="CelebA-HQ-img/2.png\n\n3.png\n", val="4")
    assert [Path(name).name for name in Faces(celebahq, 8, split=lists).names] == ["2.png", "3.png"]
    assert [Path(name).name for name in Faces(celebahq, 8, split=lists, part="val").names] == ["4.png"]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [({"train": "2\nno\n"}, r"train\.txt: 1 pictures.*'no'"), ({"train": "2\n3\n", "val": "3.png\n"}, "another list")],
)
def test_lists_that_do_not_fit_are_refused(celebahq, tmp_path, parts, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        Faces(celebahq, 8, split=write_lists_by_hand(tmp_path / "own", **parts))


def test_unknown_split_and_part_are_refused(celebahq) -> None:
    with pytest.raises(FileNotFoundError, match="celeba, celebahq, ffhq or a folder"):
        Faces(celebahq, 8, split="celbahq")
    with pytest.raises(ValueError, match="train, val, test, got 'training'"):
        Faces(celebahq, 8, split="ffhq", part="training")


def test_splits_of_one_s_own_have_no_size() -> None:
    assert check_sizes("lists", {"train": ["a"]}) == []


# --- training ---


@incomplete
@pytest.mark.parametrize("val_part", ["val", "test"])
def test_face_data_takes_both_parts_from_one_place(celebahq, val_part) -> None:
    data = FaceData(str(celebahq), str(celebahq), resolution=8, batch_size=2, split="celebahq", val_part=val_part)
    data.setup("fit")
    assert {value_of(face) for face in data.train_faces} == {10, 20, 110}
    assert {value_of(face) for face in data.val_faces} == {10 * i for i, _, p in ROWS if p == val_part}
