"""Where a run puts what it leaves behind."""

from __future__ import annotations

from pathlib import Path

from lightning import Trainer


def export_folder(trainer: Trainer, target: str | None) -> Path | None:
    """Says where the process that calls it should export to, at the end of a run. All processes of a run must ask.

    Args:
        trainer: Lightning's.
        target: Name of the export, relative to the run's folder, or an absolute path.

    Returns:
        The path; None where there is nothing to do: on all processes but the first, where no name was given, after runs
        that trained nothing, and where a finished run, called again, has left its export before.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # `log_dir` waits for all processes
    idle = trainer.global_step == 0 or trainer.fast_dev_run  # type: ignore[attr-defined]
    if target is None or trainer.global_rank != 0 or idle:
        return None
    finished = getattr(trainer.checkpoint_callback, "began_at", 0) is None and (folder / target).exists()
    return None if finished else folder / target
