"""Checkpoints that a kill, a full disk, a small $TMPDIR or NaN cannot damage, and that resume with their own generator.

Two files lie in `checkpoints/` of a run's folder: `last.ckpt`, and `previous.ckpt` from the save before. A save streams
tensor by tensor into a third file in the same folder, flushes it to the disk, and only then renames.
"""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch.optim import Optimizer

from training.run import RunRefused, check_export_target, check_same_run, describe_run

LAST, PREVIOUS, PARTIAL = "last.ckpt", "previous.ckpt", "partial.ckpt"


class Checkpoints(Checkpoint):
    """Saves the state of a run every so many steps, and after its last step.

    Args:
        every_n_steps: Steps of the optimisers between two saves: what a kill costs at most.
        accept_changes: Go on although data, seed, batches or recipe are not those that the run began with.
    """

    def __init__(self, every_n_steps: int = 100, accept_changes: bool = False) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Expected a checkpoint every 1 step or more, got every_n_steps {every_n_steps}.")
        self.every_n_steps, self.accept_changes = every_n_steps, accept_changes
        self.last_model_path = ""  # `NonFiniteGuard` names it, as it would that of Lightning's ModelCheckpoint
        self.began_at: int | None = None  # step that this call went on from, if it trained at all
        self._saved_step = 0
        self._made_of: dict[str, str] = {}
        self._exported: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Makes all saves of the trainer durable, and sweeps what a killed save left behind."""
        trainer.strategy.checkpoint_io = DurableIO(partial(self._check, trainer, pl_module))
        folder = checkpoint_folder(trainer)
        if stage == "fit" and trainer.is_global_zero:
            (folder / PARTIAL).unlink(missing_ok=True)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notes what the run is made of."""
        self._made_of = self._made_of or describe_run(trainer, pl_module)
        checkpoint["run"] = self._made_of

    def _check(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with another run; before its weights are looked at."""
        target = module.hparams.get("export_to")
        self._exported = checkpoint.get("hyper_parameters", {}).get("export_to", target)
        if not self.accept_changes and trainer.state.fn == "fit":
            check_same_run(checkpoint.get("run", {}), describe_run(trainer, module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses to export over what this run did not write."""
        target = pl_module.hparams.get("export_to")
        if target is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_export_target(checkpoint_folder(trainer).parent / target, ours=self._exported == target)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes where the run resumes."""
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
    """Writes a checkpoint completely or not at all, and reads it without a second copy in memory.

    Args:
        check: Sees what was read, and refuses it by an error.
    """

    def __init__(self, check: Callable[[dict[str, Any]], None] | None = None) -> None:
        self._check = check

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Streams next to the target, flushes, and renames; what lay there becomes `previous.ckpt`.

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
        checkpoint = read_checkpoint(path, map_location)
        if self._check is not None:
            self._check(checkpoint)
        return checkpoint


def checkpoint_folder(trainer: Trainer) -> Path:
    """Gives the folder of a run's checkpoints; all processes of a run must ask."""
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Reads what a training saved; no code that the file may hold is executed, and its tensors stay in the file.

    Raises:
        FileNotFoundError: If there is no such file.
        RunRefused: If it is something else.
    """
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise RunRefused(f"{path}: expected a checkpoint of a training, found something else ({error}).") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "loops"} <= checkpoint.keys():
        raise RunRefused(f"{path}: expected a checkpoint of a training, found other content; name another file.")
    return checkpoint


def is_checkpoint(path: Path) -> bool:
    """Says whether a training saved a file."""
    try:
        return bool(read_checkpoint(path))
    except (RunRefused, OSError):
        return False


def newest_checkpoint(folder: Path) -> Path | None:
    """Finds the newest checkpoint that can be read to its end, and warns of those that cannot; None if there is none.

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


class NonFiniteGuard(Callback):
    """Looks at the gradients of every step, and stops at the first NaN or infinity.

    No checkpoint ever holds NaN: most optimisers are looked at before they step, and those that a training steps past
    Lightning's wrapper before anything is saved. Losses that are scaled (16-mixed) overflow on purpose now and then;
    use bf16-mixed or 32-true with this guard.

    Raises:
        FloatingPointError: In the training, at the step whose gradients are not finite.
    """

    def __init__(self) -> None:
        self._wrapped: set[int] = set()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Checks an optimiser before its step."""
        self._wrapped.add(id(optimizer))
        self._check(trainer, pl_module, optimizer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Checks the other optimisers; Lightning's order of callbacks puts those that save behind this one."""
        for optimizer in trainer.optimizers:
            if id(optimizer) not in self._wrapped:
                self._check(trainer, pl_module, optimizer)

    def _check(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return
        norms = torch.stack(torch._foreach_norm(gradients, torch.inf))
        if not norms.isfinite().all():
            raise FloatingPointError(self._message(trainer, pl_module))

    def _message(self, trainer: Trainer, module: LightningModule) -> str:
        names = [n for n, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        losses = {n: float(v) for n, v in trainer.callback_metrics.items() if "loss" in n and "val" not in n}
        kept = getattr(trainer.checkpoint_callback, "last_model_path", "") if trainer.checkpoint_callback else ""
        parts: list[Any] = [
            f"Expected finite gradients, got NaN or infinite ones at step {trainer.global_step}, first in {names[0]} "
            f"({len(names)} tensors in all). Losses logged last: {losses}.",
            f"The last good checkpoint is {kept}." if kept else "There is no checkpoint yet.",
            "Nothing of this step was saved. Lower --model.learning_rate, or train with --trainer.precision 32-true; "
            "the same command with that goes on from the last checkpoint.",
        ]
        return " ".join(parts)


@dataclass(frozen=True)
class Owner:
    """The generator or the bundle that a run is about."""

    key: str  # where checkpoints keep its hash: "generator_sha256" or "bundle_hash"
    hash: str  # when the run began
    path: str  # where it lies

    def check_unchanged(self, present: str) -> None:
        """Raises RunRefused if a result would be written next to something else than it was trained for."""
        if present != self.hash:
            raise RunRefused(f"Expected {self.path} to stay as it was; it changed during the training.")


class OwnedTraining(LightningModule):
    """A training whose checkpoints remember their owner; a subclass sets `owner` when it is made."""

    owner: Owner

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes the owner's hash."""
        checkpoint[self.owner.key] = self.owner.hash

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises RunRefused for a checkpoint of another generator or bundle."""
        if checkpoint[self.owner.key] != self.owner.hash:
            raise RunRefused(
                f"Expected the {self.owner.key.partition('_')[0]} that this run began with, {self.owner.path} has "
                "changed since; put the old one back, or start a new run under another "
                "--trainer.logger.init_args.name."
            )
