"""Trains every network of the project, each by its own recipe.

Examples:
    python train.py fit --config configs/stylegan2_128.yaml       # the generator
    python train.py fit --config configs/amortized_64.yaml        # the encoder, on top of a generator
    python train.py fit --config configs/stylegan2_64.yaml --data.train my.zip --trainer.logger.init_args.name mine
    python train.py validate --config configs/stylegan2_128.yaml  # measure the last checkpoint
    tensorboard --logdir runs                                     # losses, grids of faces, distances

A recipe names the class of the model and of the data and their arguments; every argument can be overridden on the
command line, and `python train.py fit --config RECIPE --help` lists them. The same command resumes an interrupted run
exactly where its last checkpoint was made; --checkpoint.every_n_steps says how often one
is made. Several processes, started by torchrun or SLURM or by --trainer.devices, train one run.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import IO

import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from data.console import WrongOption, blame
from data.contents import find_data
from training.checkpoints import Checkpoints, NonFiniteGuard, checkpoint_folder, newest_checkpoint
from training.run import RunRefused, check_config, check_followed, find_launch, follow_launch, lock_run


class CommandLine(LightningCLI):
    """Lightning's command line: one seed for everything, one process per folder, checkpoints that survive."""

    begun = False  # From then on a ValueError is no longer a matter of one line.
    _lock: IO[str]

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Hands `seed_everything` on to the model and the data, and adds the options of the checkpoints."""
        for target in ("model", "data"):
            parser.link_arguments("seed_everything", f"{target}.init_args.seed", compute_fn=int)
        parser.add_lightning_class_args(Checkpoints, "checkpoint")

    def before_instantiate_classes(self) -> None:
        """Follows the launcher of this process; before anything is loaded, looks whether the data is there."""
        config = self.config[self.subcommand]
        follow_launch(config["trainer"], find_launch(os.environ))
        given = (config.get("data") or {}).get("init_args") or {}
        for name in ("train", "val"):
            if isinstance(given.get(name), str):
                with blame(f"--data.{name}"):
                    find_data(given[name])

    def before_fit(self) -> None:
        """Locks the run's folder, and resumes from its newest readable checkpoint."""
        trainer, folder = self.trainer, checkpoint_folder(self.trainer).parent
        check_followed(trainer.world_size, os.environ)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_config(folder)
            self._lock = lock_run(folder)
        if trainer.world_size > 1:
            batch = getattr(self.datamodule, "hparams", {}).get("batch_size")
            rank_zero_info(f"Training on {trainer.world_size} processes, each on a batch of {batch}.")
        self._find_checkpoint()

    def before_validate(self) -> None:
        """Finds the newest readable checkpoint; ValueError if there is none. The run's config.yaml stays."""
        self.trainer.callbacks = [c for c in self.trainer.callbacks if not isinstance(c, SaveConfigCallback)]  # type: ignore[attr-defined]
        self._find_checkpoint()
        if self.config_init[self.subcommand].get("ckpt_path") is None:
            raise ValueError(f"Expected a checkpoint in {checkpoint_folder(self.trainer)}, found none; train first.")

    def _find_checkpoint(self) -> None:
        config = self.config_init[self.subcommand]
        if config.get("ckpt_path") == "last":
            config["ckpt_path"] = newest_checkpoint(checkpoint_folder(self.trainer))
        CommandLine.begun = True


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    torch.set_float32_matmul_precision("high")
    # It is wrong here: the data resumes exactly.
    warnings.filterwarnings("ignore", message=".*not resumable. This can cause.*")
    CommandLine(
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"callbacks": NonFiniteGuard()},
        args=args,
    )


def run() -> int:
    """Runs the command line of the process and returns the exit status; mistakes are reported in one line."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        told = isinstance(error, RunRefused | OSError | FloatingPointError) or "DataLoader worker" in str(error)
        if not told and (CommandLine.begun or isinstance(error, RuntimeError)):
            raise
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            print(f"train.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, WrongOption) else 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
