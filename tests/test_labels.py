"""Labels of faces: CelebA's own file and the table say the same, and crops follow from the seed alone."""

from __future__ import annotations

import gzip
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.faces import Faces
from data.labels import ATTRIBUTES, LabelledFaces, random_crops, read_labels

NAMES = ("Smiling", "Male")
VALUES = {"000001": (1, 0), "000002": (0, 0), "000003": (0, 1)}


def sign(value: int) -> str:
    return "1" if value else "-1"


def celeba_text() -> str:
    rows = [f"{stem}.jpg  {sign(a)}  {sign(b)}" for stem, (a, b) in VALUES.items()]
    return "\n".join([str(len(rows)), " ".join(NAMES), *rows]) + "\n"


def table_text() -> str:
    rows = [f"{stem}.webp,train,{sign(a)},{sign(b)}" for stem, (a, b) in VALUES.items()]
    return "\n".join(["file,split,Smiling,Male", *rows]) + "\n"


def write(kind: str, folder: Path) -> Path:
    path = folder / {"celeba": "list_attr_celeba.txt", "csv": "labels.csv", "csv.gz": "labels.csv.gz"}[kind]
    text = (celeba_text() if kind == "celeba" else table_text()).encode()
    path.write_bytes(gzip.compress(text) if kind == "csv.gz" else text)
    return path


@pytest.fixture
def faces(tmp_path) -> Faces:
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as archive:
        for stem in VALUES:
            with BytesIO() as buffer:
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "png")
                archive.writestr(f"{stem}.png", buffer.getvalue())
    return Faces(tmp_path / "faces.zip", 32)


@pytest.mark.parametrize("kind", ["celeba", "csv", "csv.gz"])
def test_labels_are_read(kind, tmp_path) -> None:
    labels = read_labels(write(kind, tmp_path))
    assert labels.names == NAMES
    assert {stem: tuple(values.tolist()) for stem, values in labels.values.items()} == VALUES


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no number\nSmiling\n", "begins with a number"),
        ("2\nSmiling\n1.jpg 1\n", "2 pictures"),
        ("1\nSmiling\n1.jpg 7\n", "1 or -1"),
        ("1\nSmiling Male\n1.jpg 1\n", "expected 2 times"),
    ],
)
def test_broken_files_are_refused(text, words, tmp_path) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_labels(tmp_path / "list.txt")


def test_missing_labels_are_named(faces, tmp_path) -> None:
    labels = read_labels(write("csv", tmp_path))
    labels.values.pop("000002")
    with pytest.raises(ValueError, match="1 of 3, such as 000002.png"):
        LabelledFaces(faces, labels)
    with pytest.raises(FileNotFoundError, match="list_attr_celeba.txt"):
        read_labels(tmp_path / "nothing.csv")


def test_faces_come_with_their_labels(faces, tmp_path) -> None:
    dataset = LabelledFaces(faces, read_labels(write("celeba", tmp_path)))
    face, labels = dataset[2]
    assert torch.equal(face, faces[2]) and labels.tolist() == [0, 1] and len(dataset) == 3


def test_crops_follow_from_seed_epoch_and_face(faces, tmp_path) -> None:
    labels = read_labels(write("celeba", tmp_path))

    def crop(seed: int, epoch: int, index: int) -> torch.Tensor:
        return LabelledFaces(faces, labels, 0.5, seed)[epoch, index][0]

    assert torch.equal(crop(0, 3, 1), crop(0, 3, 1))
    assert not torch.equal(crop(0, 3, 1), crop(1, 3, 1)) and not torch.equal(crop(0, 3, 1), crop(0, 4, 1))
    assert crop(0, 3, 1).dtype == torch.uint8 and crop(0, 0, 0).shape == (3, 32, 32)


@pytest.mark.parametrize("crop", [0.0, 1.5])
def test_impossible_crops_are_refused(crop) -> None:
    with pytest.raises(ValueError, match="in \\(0, 1\\]"):
        random_crops(32, crop)


def test_the_attributes_are_forty_in_order() -> None:
    assert len(set(ATTRIBUTES)) == 40 and list(ATTRIBUTES) == sorted(ATTRIBUTES)
