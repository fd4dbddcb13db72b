"""The data side of every training: shuffled training faces that resume exactly, and validation faces."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from data.augment import AUGMENTATIONS, ColourJitter
from data.contents import find_data
from data.faces import Faces
from data.shared_memory import affordable_workers

STEPS_PER_EPOCH = 100_000  # more than any training takes


class ResumableSampler(DistributedSampler):
    """Shuffles by seed and epoch, and can start in the middle of an epoch.

    Args:
        dataset: What to sample from.
        seed: Together with the epoch it determines the order.
        rank: This process among `world_size`.
        world_size: Number of processes that share an epoch.
        skip: Samples of this process already seen in the first epoch.
        multiple: An epoch has a multiple of so many samples for each process, so that all its steps are whole.
        epochs: Give pairs (epoch, index) in place of indices, for data sets that change a picture in every epoch: in
            the workers, whose copy of the data set nobody tells the epoch, the key is the only way to learn it.
    """

    def __init__(
        self,
        dataset: Dataset,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        skip: int = 0,
        epochs: bool = False,
        multiple: int = 1,
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, seed=seed, drop_last=True)
        self.num_samples -= self.num_samples % multiple
        self.total_size = self.num_samples * world_size
        self.skip = skip
        self.epochs = epochs

    def __iter__(self) -> Iterator[Any]:
        """Gives the indices of one epoch; after a resume, those that are left of it."""
        indices = list(super().__iter__())[self.skip :]
        self.skip = 0
        return iter([(self.epoch, index) for index in indices] if self.epochs else indices)


def progress(trainer: Trainer) -> tuple[int, int]:
    """Gives the epoch that a run resumes with, and the batches of it that are done."""
    loop = trainer.fit_loop
    batches, epochs = loop.epoch_loop.batch_progress, loop.epoch_progress.current.ready
    if batches.is_last_batch:
        return epochs, 0
    # A checkpoint is made within the hooks of its last batch, which is processed then, but not yet "completed".
    return max(0, epochs - 1), batches.current.processed


class FaceData(LightningDataModule):
    """Training and validation faces.

    Args:
        train: Zip or folder of training faces, or what `data.pack` wrote, see `data.contents.find_data`.
        val: Zip or folder of validation faces: other people. With a split it may be that of the training faces.
        resolution: Size R in pixels.
        batch_size: Faces per step and process.
        num_workers: Decoding processes; 0 decodes in the training process, which is best when the decoded faces fit
            into memory.
        val_limit: Use only the first so many validation faces; None for all.
        train_limit: Use only the first so many training faces; None for all.
        seed: Determines the order of the training faces, and their changes.
        split: Train on the "train" part of this split of `train`, and validate on the `val_part` of this split of
            `val`: "celeba", "celebahq", "ffhq", or a folder of lists, see `data.splits`; None to use all pictures.
        val_part: The part for validation, "val" or "test".
        augment: "flip": training mirrors every second face, by chance (`training.batches.faces_from_bytes`);
            "flip-colour": colours change a little as well (`data.augment`), which wants `num_workers`.
        cache_gib: Decoded faces are kept in memory, once a process, if all of them fit into so many GiB: 3 N R² bytes,
            4.5 GiB for CelebA-HQ's training faces at 256 px. Faces that `data.pack` wrote are kept once a machine.
    """

    def __init__(
        self,
        train: str = "celeba128_train.zip",
        val: str = "celeba128_val.zip",
        resolution: int = 64,
        batch_size: int = 32,
        num_workers: int = 0,
        val_limit: int | None = None,
        train_limit: int | None = None,
        seed: int = 0,
        split: str | None = None,
        val_part: Literal["val", "test"] = "val",
        augment: Literal["flip", "flip-colour"] = "flip",
        cache_gib: float = 4.0,
    ) -> None:
        super().__init__()
        if augment not in AUGMENTATIONS:
            raise ValueError(f"Expected augment to be one of {', '.join(AUGMENTATIONS)}, got {augment!r}.")
        self.save_hyperparameters()
        self.train_faces: Faces
        self.val_faces: Faces

    def setup(self, stage: str) -> None:
        """Opens the datasets that the stage needs."""
        h = self.hparams
        if stage == "fit":
            if h.split is None and find_data(h.train) == find_data(h.val):
                warnings.warn(
                    f"{h.val} is trained on and validated on, whole: what validation measures are faces of the "
                    "training. Name a --data.split, or other faces for --data.val.",
                    stacklevel=2,
                )
            self.train_faces = Faces(h.train, h.resolution, h.train_limit, part="train", **self._options())
            needed = self._step_size() * (self.trainer.world_size if self.trainer else 1)
            if len(self.train_faces) < needed:
                raise ValueError(f"Expected {needed} training faces or more, a step, got {len(self.train_faces)}.")
        self.val_faces = Faces(h.val, h.resolution, h.val_limit, part=h.val_part, **self._options())

    def _options(self) -> dict[str, Any]:
        h = self.hparams
        shared, cache = h.num_workers > 0, int(h.cache_gib * 2**30)
        return {"cache_bytes": cache, "shared": shared, "split": h.split, "replace_broken": True}

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Gives batches of uint8 (B, 3, R, R), from where an interrupted epoch stopped."""
        h, trainer = self.hparams, self.trainer
        assert trainer is not None
        epoch, seen = progress(trainer)
        coloured = h.augment == "flip-colour"
        faces = ColourJitter(self.train_faces, h.seed) if coloured else self.train_faces
        sampler = ResumableSampler(
            faces, h.seed, trainer.global_rank, trainer.world_size, seen * h.batch_size,
            epochs=coloured or not isinstance(faces, Faces), multiple=self._step_size(),
        )  # fmt: skip
        sampler.set_epoch(epoch)  # Lightning sets it too, but only after workers have taken their first batches.
        return self._loader(faces, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Gives the validation faces in order, uint8 (B, 3, R, R)."""
        return self._loader(self.val_faces)

    def _step_size(self) -> int:
        """Faces of a step in each process, all its micro-batches together."""
        return self.hparams.batch_size * (self.trainer.accumulate_grad_batches if self.trainer else 1)

    def _loader(self, faces: Dataset, **options: Any) -> DataLoader:
        """Loads batches, by as many workers as shared memory has room for; they stay from epoch to epoch."""
        h = self.hparams
        workers = affordable_workers(h.num_workers, h.batch_size * 3 * h.resolution**2)
        return DataLoader(faces, h.batch_size, num_workers=workers, persistent_workers=workers > 0, **options)


class Steps(LightningDataModule):
    """Gives the size of a batch, as a tensor with nothing in it; what is in the batch follows from the step.

    Args:
        batch_size: Samples per step and process.
        val_batches: Batches per validation.
        seed: Not used: the training samples by its own seed.
    """

    def __init__(self, batch_size: int = 256, val_batches: int = 20, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def _batches(self, count: int) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(torch.empty(count, self.hparams["batch_size"], 0)), batch_size=None)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Gives tensors (B, 0), one per step."""
        return self._batches(STEPS_PER_EPOCH)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Gives tensors (B, 0), one per batch of validation."""
        return self._batches(self.hparams["val_batches"])
