"""Batches without content, for networks that learn from what another network makes, such as the flow over W."""

from __future__ import annotations

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

STEPS_PER_EPOCH = 100_000  # more than any training takes


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
