"""Trains every network of the project, each by its own recipe.

Examples:
    python train.py fit --config configs/stylegan2_128.yaml       # the generator
    python train.py fit --config configs/amortized_64.yaml        # the encoder, on top of a generator
    python train.py fit --config configs/stylegan2_64.yaml --data.train my.zip --trainer.logger.init_args.name mine
    python train.py validate --config configs/stylegan2_128.yaml  # measure the last checkpoint
    tensorboard --logdir runs                                     # losses, grids of faces, distances

A recipe names the class of the model and of the data and their arguments; every argument can be overridden on the
command line, and `python train.py fit --config RECIPE --help` lists them. A run that was interrupted goes on exactly
where its last checkpoint was made when the same command is given again.
"""

from __future__ import annotations

import warnings

import torch
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI


class CommandLine(LightningCLI):
    """Lightning's command line with one seed for everything."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Hands `seed_everything` on to the model and the data."""
        for target in ("model", "data"):
            parser.link_arguments("seed_everything", f"{target}.init_args.seed", compute_fn=int)


def main(args: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: Arguments in place of those of the process.
    """
    torch.set_float32_matmul_precision("high")
    # Both are wrong here: the data resumes exactly, and checkpoints are meant to hold the state after a step.
    warnings.filterwarnings("ignore", message=".*not resumable. This can cause.*")
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization.*")
    CommandLine(
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        args=args,
    )


if __name__ == "__main__":
    main()
