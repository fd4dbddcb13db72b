"""The data side of every training: shuffled training faces that resume exactly, and validation faces."""

from __future__ import annotations

from collections.abc import Iterator

from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from data.faces import Faces


class ResumableSampler(DistributedSampler):
    """Shuffles by seed and epoch, and can start in the middle of an epoch.

    Args:
        dataset: What to sample from.
        seed: Together with the epoch it determines the order.
        rank: This process among `world_size`.
        world_size: Number of processes that share an epoch.
        skip: Samples of this process already seen in the first epoch.
    """

    def __init__(self, dataset: Dataset, seed: int = 0, rank: int = 0, world_size: int = 1, skip: int = 0) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, seed=seed, drop_last=True)
        self.skip = skip

    def __iter__(self) -> Iterator[int]:
        """Gives the indices of one epoch; after a resume, those that are left of it."""
        indices = list(super().__iter__())[self.skip :]
        self.skip = 0
        return iter(indices)


class FaceData(LightningDataModule):
    """Training and validation faces.

    Args:
        train: Zip or folder of training faces, see `data.faces.find_data`.
        val: Zip or folder of validation faces: other people.
        resolution: Size R in pixels.
        batch_size: Faces per step and process.
        num_workers: Decoding processes; 0 decodes in the training process, which is best when the decoded faces fit
            into memory.
        val_limit: Use only the first so many validation faces; None for all.
        train_limit: Use only the first so many training faces; None for all.
        seed: Determines the order of the training faces.
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
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.train_faces: Faces
        self.val_faces: Faces

    def setup(self, stage: str) -> None:
        """Opens the datasets that the stage needs."""
        h = self.hparams
        if stage == "fit":
            self.train_faces = Faces(h.train, h.resolution, h.train_limit, shared=h.num_workers > 0)
            if len(self.train_faces) < h.batch_size:
                raise ValueError(
                    f"Expected {h.batch_size} training faces or more, a batch, got {len(self.train_faces)}."
                )
        self.val_faces = Faces(h.val, h.resolution, h.val_limit, shared=h.num_workers > 0)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Gives batches of uint8 (B, 3, R, R), from where an interrupted epoch stopped."""
        h, trainer = self.hparams, self.trainer
        assert trainer is not None
        epoch, seen = self._progress()
        sampler = ResumableSampler(
            self.train_faces, h.seed, trainer.global_rank, trainer.world_size, skip=seen * h.batch_size
        )
        sampler.set_epoch(epoch)  # Lightning sets it too, but only after workers have drawn their first batches.
        return DataLoader(
            self.train_faces, h.batch_size, sampler=sampler, num_workers=h.num_workers, drop_last=True,
            persistent_workers=h.num_workers > 0,
        )  # fmt: skip

    def _progress(self) -> tuple[int, int]:
        """Gives the epoch to go on with, and the batches of it that are done."""
        assert self.trainer is not None
        loop = self.trainer.fit_loop
        batches, epochs = loop.epoch_loop.batch_progress, loop.epoch_progress.current.ready
        if batches.is_last_batch:
            return epochs, 0
        # A checkpoint is made within the hooks of its last batch, which is processed then, but not yet "completed".
        return max(0, epochs - 1), batches.current.processed

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Gives the validation faces in order, uint8 (B, 3, R, R)."""
        return DataLoader(self.val_faces, self.hparams.batch_size, num_workers=self.hparams.num_workers)
