"""One training in a run's folder at a time."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


def lock_run(folder: Path) -> IO[str]:
    """Takes a run's folder for this process, until the file is closed or the process ends, however it ends.

    Args:
        folder: Of the run; made if need be.

    Returns:
        The open lock, to be kept.

    Raises:
        ValueError: If another process trains there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("a+")
    try:
        if fcntl is not None:
            # The lock of a process, not of an open file: workers that outlive a kill do not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise ValueError(
            f"Expected nobody else to train in {folder}, {owner} does. Wait for it, or name another run: "
            "--trainer.logger.init_args.name NAME."
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
