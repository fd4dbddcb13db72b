"""Checkpoints that a kill, a full disk or a small $TMPDIR cannot damage.

Two files lie in `checkpoints/` of a run's folder: `last.ckpt`, and `previous.ckpt` from the save before. A save streams
tensor by tensor into a third file in the same folder, flushes it to the disk, and only then renames.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

LAST, PREVIOUS, PARTIAL = "last.ckpt", "previous.ckpt", "partial.ckpt"


class Checkpoints(Checkpoint):
    """Saves the state of a run every so many steps, and after its last step.

    Args:
        every_n_steps: Steps of the optimisers between two saves: what a kill costs at most.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Expected a checkpoint every 1 step or more, got every_n_steps {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self.last_model_path = ""  # `training.guard` names it, as it would that of Lightning's ModelCheckpoint
        self.began_at: int | None = None  # step that this call went on from, if it trained at all
        self._saved_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes all saves of the trainer durable, and sweeps what a killed save left behind."""
        trainer.strategy.checkpoint_io = DurableIO()
        folder = checkpoint_folder(trainer)
        if stage == "fit" and trainer.is_global_zero:
            (folder / PARTIAL).unlink(missing_ok=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes where the run goes on."""
        self.began_at = self._saved_step = trainer.global_step
        self.last_model_path = str(trainer.ckpt_path or "")

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Saves, at most once a step however many micro-batches it has."""
        step, every = trainer.global_step, self.every_n_steps
        due = step // every > self._saved_step // every or (step >= trainer.max_steps > 0 and step > self._saved_step)
        if due and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._saved_step = step
            self.last_model_path = str(checkpoint_folder(trainer) / LAST)
            trainer.save_checkpoint(self.last_model_path)


class DurableIO(TorchCheckpointIO):
    """Writes a checkpoint completely or not at all, and reads it without a second copy in memory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Streams beside the target, flushes, and renames; what lay there becomes `previous.ckpt`.

        Args:
            checkpoint: What to save.
            path: The file.
            storage_options: Not used.

        Raises:
            OSError: If it cannot be written, as on a full disk; earlier checkpoints stay as they are.
        """
        target = Path(path)
        partial = target.with_name(PARTIAL)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            reason = error.__context__ if isinstance(error.__context__, OSError) else error  # torch hides the first one
            kept = f"{target} stays as it was" if target.exists() else "there is no earlier checkpoint"
            raise OSError(
                f"Expected to write the checkpoint {target}, got: {reason}; {kept}. Make room, then give the same "
                "command again."
            ) from error
        if target.exists():
            target.replace(target.with_name(PREVIOUS))
        partial.replace(target)
        _flush_folder(target.parent)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint; its tensors are mapped from the file, which is copied nowhere as a whole."""
        return torch.load(path, map_location=map_location, weights_only=weights_only, mmap=True)


def checkpoint_folder(trainer: Trainer) -> Path:
    """Gives the folder of a run's checkpoints; all processes of a run must ask."""
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"


def newest_checkpoint(folder: Path) -> Path | None:
    """Finds the newest checkpoint that can be read to its end, and warns of those that cannot.

    Args:
        folder: Where the checkpoints of a run lie.

    Returns:
        The file; None if the run has none yet.

    Raises:
        ValueError: If there are checkpoints, all of them damaged: the run would start from zero.
    """
    damaged: list[str] = []
    for path in (folder / LAST, folder / PREVIOUS):
        if path.exists():
            problem = _damage(path)
            if problem is None:
                if damaged:
                    warnings.warn(f"{'; '.join(damaged)}. The run goes on from {path}.", stacklevel=2)
                return path
            damaged.append(f"{path} is damaged ({problem})")
    if damaged:
        raise ValueError(
            f"Expected a checkpoint that can be read: {'; '.join(damaged)}. Put an intact copy there, or delete "
            f"{folder} to start from zero."
        )
    return None


def _damage(path: Path) -> str | None:
    """Says what is wrong with a checkpoint, by the checksums of all its parts; None if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
        return None if part is None else f"{part} has another checksum"
    except (OSError, zipfile.BadZipFile, RuntimeError) as error:
        return str(error) or type(error).__name__


def _flush_folder(folder: Path) -> None:
    """Makes the renames in a folder durable, where a folder can be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
