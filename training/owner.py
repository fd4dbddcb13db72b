"""A run belongs to what it was begun on: a generator, or a bundle. A checkpoint goes on with no other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning import LightningModule


@dataclass(frozen=True)
class Owner:
    """The generator or the bundle that a run is about.

    Attributes:
        key: Where checkpoints keep its hash: "generator_sha256" or "bundle_hash".
        hash: Its hash when the run began.
        path: Where it lies.
    """

    key: str
    hash: str
    path: str

    def check_unchanged(self, present: str) -> None:
        """Refuses to write a result beside something else than it was trained for.

        Args:
            present: The hash of what lies there now.

        Raises:
            ValueError: If it is another one.
        """
        if present != self.hash:
            raise ValueError(f"Expected {self.path} to stay as it was; it changed during the training.")


class OwnedTraining(LightningModule):
    """A training whose checkpoints remember their owner; a subclass sets `owner` when it is made."""

    owner: Owner

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes the owner's hash."""
        checkpoint[self.owner.key] = self.owner.hash

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with another generator or bundle.

        Raises:
            ValueError: If the checkpoint was made with another one.
        """
        if checkpoint[self.owner.key] != self.owner.hash:
            raise ValueError(
                f"Expected the {self.owner.key.partition('_')[0]} that this run began with, {self.owner.path} has "
                "changed since; put the old one back, or start a new run under another "
                "--trainer.logger.init_args.name."
            )
