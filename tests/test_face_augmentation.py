"""Changes of colour: mild, new in every epoch, the same whoever makes them and after an interruption."""

from __future__ import annotations

import ast
import zipfile
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import data.augment
from data.augment import ColourJitter
from data.datamodule import FaceData, ResumableSampler
from data.faces import Faces

COUNT, SIZE = 12, 16


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Twelve smooth pictures in middle tones, where a change of colour clips nothing."""
    path = tmp_path_factory.mktemp("data") / "faces.zip"
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as file:
        for i in range(COUNT):
            picture = Image.fromarray(rng.integers(70, 180, (4, 4, 3), np.uint8)).resize((SIZE, SIZE))
            buffer = BytesIO()
            picture.save(buffer, "png")
            file.writestr(f"{i:02d}.png", buffer.getvalue())
    return path


@pytest.fixture(scope="module")
def faces(archive):
    return Faces(archive, SIZE)


def test_change_is_mild_and_in_place(faces) -> None:
    jittered = ColourJitter(faces, seed=1)
    for i in range(COUNT):
        before, after = faces[i].float(), jittered[0, i].float()
        assert jittered[0, i].dtype == torch.uint8 and after.shape == (3, SIZE, SIZE)
        assert 0 < (after - before).abs().mean() < 30  # of 255
        brightness = torch.corrcoef(torch.stack([before.mean(dim=0).flatten(), after.mean(dim=0).flatten()]))[0, 1]
        mirrored = torch.corrcoef(torch.stack([before.mean(0).flip(1).flatten(), after.mean(0).flatten()]))[0, 1]
        assert brightness > 0.98 > mirrored  # no pixel moves: mirroring is training's


def test_change_follows_seed_epoch_and_picture_alone(faces) -> None:
    one, other = ColourJitter(faces, seed=1), ColourJitter(faces, seed=1)
    first = one[0, 3]
    for key in [(0, 5), (7, 3), (2, 2)]:
        other[key]  # draws in another order leave no trace
    assert torch.equal(other[0, 3], first)
    assert not torch.equal(one[1, 3], first) and not torch.equal(ColourJitter(faces, seed=2)[0, 3], first)
    changes = [(one[0, i].float() - faces[i].float()).mean().item() for i in range(COUNT)]
    assert np.std(changes) > 1  # each picture its own


def test_the_picture_itself_stays(faces) -> None:
    before = faces[2].clone()
    ColourJitter(faces)[4, 2]
    assert torch.equal(faces[2], before)


def batches(archive, epoch: int, skip: int = 0, workers: int = 0) -> list[torch.Tensor]:
    """What training sees of an epoch, from where a run goes on."""
    module = FaceData(
        str(archive), str(archive), SIZE, batch_size=4, num_workers=workers, seed=3, augment="flip-colour"
    )
    progress = SimpleNamespace(is_last_batch=False, current=SimpleNamespace(processed=skip))
    loop = SimpleNamespace(batch_progress=progress)
    epochs = SimpleNamespace(current=SimpleNamespace(ready=epoch + 1))
    fit = SimpleNamespace(epoch_loop=loop, epoch_progress=epochs)
    module.trainer = SimpleNamespace(fit_loop=fit, global_rank=0, world_size=1, accumulate_grad_batches=1)
    module.setup("fit")
    return list(module.train_dataloader())


def test_resumed_and_in_workers_an_epoch_is_the_same(archive) -> None:
    whole = batches(archive, epoch=1)
    assert len(whole) == COUNT // 4 and whole[0].dtype == torch.uint8
    assert torch.equal(torch.cat(batches(archive, epoch=1, skip=1)), torch.cat(whole[1:]))
    assert torch.equal(torch.cat(batches(archive, epoch=1, workers=2)), torch.cat(whole))
    assert not torch.equal(torch.cat(batches(archive, epoch=0)).float().sort(0)[0], torch.cat(whole).float().sort(0)[0])


def test_persistent_workers_learn_the_next_epoch(faces) -> None:
    jittered = ColourJitter(faces, seed=3)
    sampler = ResumableSampler(jittered, seed=3, epochs=True)
    loader = DataLoader(jittered, 4, sampler=sampler, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert torch.equal(torch.cat(list(loader)), torch.stack([jittered[epoch, index] for _, index in keys]))


def test_order_is_that_of_training_without_it() -> None:
    plain, with_epochs = (
        ResumableSampler(range(9), seed=4, skip=2),
        ResumableSampler(range(9), seed=4, skip=2, epochs=True),
    )
    for sampler in (plain, with_epochs):
        sampler.set_epoch(3)
    assert list(with_epochs) == [(3, index) for index in plain]


def test_unknown_augmentation_is_refused(archive) -> None:
    with pytest.raises(ValueError, match="flip, flip-colour, got 'colour'"):
        FaceData(str(archive), str(archive), augment="colour")


def test_albumentations_is_imported_late() -> None:
    """Its import takes seconds, and it asks the network for releases unless told not to before."""
    at_import = ast.parse(Path(data.augment.__file__).read_text()).body
    names = {alias.name for node in at_import if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in at_import if isinstance(node, ast.ImportFrom)}
    assert "numpy" in names and not any(name.startswith("albumentations") for name in names)
