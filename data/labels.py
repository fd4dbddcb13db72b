"""Faces with their attributes, as CelebA labels them: smiling or not, blond or not, forty such questions.

The labels come in CelebA's own file list_attr_celeba.txt or in a table with a column `file` (.csv, .csv.gz). A face is
found by its name without suffix, so that the same labels serve 000001.jpg and 000001.webp.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.contents import Contents, find_data
from data.datamodule import FaceData
from data.faces import Faces

ATTRIBUTES = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses",
    "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes",
    "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling",
    "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace",
    "Wearing_Necktie", "Young",
)  # fmt: skip
"""CelebA's forty attributes, in the order of its file."""


@dataclass(frozen=True)
class Labels:
    """The attributes of pictures."""

    names: tuple[str, ...]  # of the attributes
    values: dict[str, np.ndarray]  # by the name without suffix, 1 where it has an attribute, else 0, uint8 (A,)

    def of(self, pictures: list[str], source: Path | str) -> np.ndarray:
        """Gives the labels of pictures by their file names, uint8 (N, A); ValueError if one has none."""
        stems = [Path(name).stem for name in pictures]
        missing = [name for name, stem in zip(pictures, stems, strict=True) if stem not in self.values]
        if missing:
            raise ValueError(
                f"Expected labels for every picture in {source}, found none for {len(missing)} of {len(pictures)}, "
                f"such as {missing[0]}; name the labels of these faces, or remove the faces."
            )
        return np.stack([self.values[stem] for stem in stems])


def read_labels(path: str | Path, contents: Contents | None = None) -> Labels:
    """Reads CelebA's list_attr_celeba.txt, or a table (.csv, .csv.gz) with a column `file`.

    In a table, the columns whose names are CelebA's attributes count, others are skipped.

    Args:
        path: The file, see `data.contents.find_data`.
        contents: A data set in which, or next to which, the file may lie instead, as in CelebAMask-HQ.zip.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is neither, or holds something else than 1 and -1 (or 0).
    """
    path, raw = Path(path), None
    try:
        path = find_data(path)
        raw = path.read_bytes()
    except FileNotFoundError:
        raw = _companion(path.name, contents)
    if raw is None:
        raise FileNotFoundError(
            f"Expected the labels of the faces at {path}, not found. Put list_attr_celeba.txt, which comes with "
            "CelebA, into datasets/, or name its folder in AMORTIZED_PULSE_DATA."
        )
    try:
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
        text = content.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text ({error}); copy it again.") from error
    names, rows = _table(text, path) if ".csv" in path.suffixes else _celeba(text, path)
    values = {}
    for number, (file, cells) in enumerate(rows, start=1):
        if len(cells) != len(names) or not set(cells) <= {"1", "-1", "0"}:
            raise ValueError(f"{path}: expected {len(names)} times 1 or -1 for picture {number} ({file}), got {cells}.")
        values[Path(file).stem] = np.array([cell == "1" for cell in cells], np.uint8)
    return Labels(tuple(names), values)


def _companion(name: str, contents: Contents | None) -> bytes | None:
    try:
        return None if contents is None else contents.companion(name)
    except FileNotFoundError:
        return None


def _celeba(text: str, path: Path) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Reads the lines of list_attr_celeba.txt: a count, the names, then a file and its values in each line."""
    lines = text.splitlines()
    if len(lines) < 3 or not lines[0].strip().isdecimal():
        raise ValueError(f"{path}: expected list_attr_celeba.txt, which begins with a number and a line of names.")
    rows = [line.split() for line in lines[2:] if line.strip()]
    if len(rows) != int(lines[0]):
        raise ValueError(f"{path}: expected {lines[0].strip()} pictures as its first line says, found {len(rows)}.")
    return lines[1].split(), [(row[0], row[1:]) for row in rows]


def _table(text: str, path: Path) -> tuple[list[str], list[tuple[str, list[str]]]]:
    reader = csv.DictReader(io.StringIO(text))
    names = [name for name in reader.fieldnames or () if name in ATTRIBUTES]
    if "file" not in (reader.fieldnames or ()) or not names:
        raise ValueError(f"{path}: expected the column 'file' and CelebA's attributes, got {reader.fieldnames}.")
    return names, [(row["file"], [row[name] or "" for name in names]) for row in reader]


class LabelledFaces(Dataset[tuple[Tensor, Tensor]]):
    """Faces with labels, cropped and mirrored by chance if wanted.

    What happens to a face follows from seed, epoch and face alone: it is the same after an interruption, and on any
    number of processes.

    Args:
        faces: The faces.
        labels: Theirs.
        crop: The smallest part of a face's area that a random crop keeps, in (0, 1]; None leaves the faces as they are.
        seed: Of the crops.
    """

    def __init__(self, faces: Faces, labels: Labels, crop: float | None = None, seed: int = 0) -> None:
        self.faces, self.seed = faces, seed
        self.names = labels.names
        self.labels = torch.from_numpy(labels.of(faces.names, faces.source))  # (N, A), uint8
        self._transform = None if crop is None else random_crops(faces.resolution, crop)

    def __len__(self) -> int:
        """The number of faces."""
        return len(self.faces)

    def fingerprint(self) -> str:
        """Gives a hash over faces and labels, see `Faces.fingerprint`."""
        return hashlib.sha256(self.faces.fingerprint().encode() + self.labels.numpy().tobytes()).hexdigest()

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Gives a face, uint8 (3, R, R), and its labels, uint8 (A,), by epoch and index, or by the index alone."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index, face = self.faces.load(index)
        if self._transform is not None:
            # Albumentations keeps to small seeds.
            seeds = np.random.SeedSequence((self.seed, epoch, index))
            self._transform.set_random_seed(int(seeds.generate_state(1)[0]))
            image = self._transform(image=face.permute(1, 2, 0).numpy())["image"]
            face = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return face, self.labels[index]


def random_crops(resolution: int, crop: float) -> Any:
    """Makes the change of training faces, uint8 (R, R, 3): mirrored every second time, and cropped a little.

    Args:
        resolution: Size R of the faces in pixels, before and after.
        crop: The smallest part of the area that is kept, in (0, 1].
    """
    if not 0 < crop <= 1:
        raise ValueError(f"Expected a crop that keeps a part of the area in (0, 1], got {crop}.")
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for newer releases otherwise
    import albumentations  # late: it takes a second

    return albumentations.Compose(
        [
            albumentations.HorizontalFlip(p=0.5),
            albumentations.RandomResizedCrop((resolution, resolution), scale=(crop, 1.0), ratio=(0.95, 1.05)),
        ]
    )


class LabelledFaceData(FaceData):
    """Training and validation faces with labels.

    Args:
        train: Zip or folder of training faces, see `data.contents.find_data`.
        val: Zip or folder of validation faces: other people.
        labels: Labels of both, see `read_labels`.
        resolution: Size R in pixels.
        batch_size: Faces per step and process.
        num_workers: Decoding processes; 0 decodes in the training process, which is best when the decoded faces fit
            into memory.
        val_limit: Use only the first so many validation faces; None for all.
        train_limit: Use only the first so many training faces; None for all.
        crop: The smallest part of a training face's area that a random crop keeps; None switches crops and mirroring
            off.
        seed: Determines the order of the training faces, and their crops.
        split: Of the pictures, see `data.datamodule.FaceData`; None to use all.
        val_part: The part of it for validation, "val" or "test".
        cache_gib: See `data.datamodule.FaceData`.
    """

    train_faces: LabelledFaces  # type: ignore[assignment]
    val_faces: LabelledFaces  # type: ignore[assignment]

    def __init__(
        self,
        train: str = "celeba128_train.zip",
        val: str = "celeba128_val.zip",
        labels: str = "celeba128_labels.csv.gz",
        resolution: int = 64,
        batch_size: int = 64,
        num_workers: int = 0,
        val_limit: int | None = None,
        train_limit: int | None = None,
        crop: float | None = 0.8,
        seed: int = 0,
        split: str | None = None,
        val_part: Literal["val", "test"] = "val",
        cache_gib: float = 4.0,
    ) -> None:
        super().__init__(
            train, val, resolution, batch_size, num_workers, val_limit, train_limit, seed, split, val_part,
            cache_gib=cache_gib,
        )  # fmt: skip
        self.save_hyperparameters()
        self.hparams["augment"] = "flip"  # what FaceData asks for; these faces are changed by their dataset

    def setup(self, stage: str) -> None:
        """Opens the datasets that the stage needs."""
        super().setup(stage)
        labels, h = read_labels(self.hparams["labels"], self.val_faces.contents), self.hparams  # type: ignore[attr-defined]
        if stage == "fit":
            self.train_faces = LabelledFaces(self.train_faces, labels, h["crop"], h["seed"])  # type: ignore[arg-type]
        self.val_faces = LabelledFaces(self.val_faces, labels)  # type: ignore[arg-type]
