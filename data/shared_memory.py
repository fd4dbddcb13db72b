"""Shared memory, through which the workers of a data loader hand over their batches: containers have little of it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
IN_FLIGHT = 3  # batches of a worker that lie there at once: two made ahead, one in use
ADVICE = "give it more (docker run --shm-size 8g)"


def free_shared_memory() -> float:
    """Gives the free bytes of /dev/shm; infinity where there is no such limit."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else float("inf")


def affordable_workers(workers: int, batch_bytes: int) -> int:
    """Gives as many workers as shared memory has room for, with a warning if fewer; 0 means none.

    Too many of them would be killed by a bus error.
    """
    free = free_shared_memory()
    affordable = min(workers, int(min(free, 2.0**62)) // (IN_FLIGHT * batch_bytes))
    if affordable < workers:
        warnings.warn(
            f"{SHARED_MEMORY} has {free / 2**20:,.0f} MiB free, room for {affordable} of {workers} data workers with "
            f"batches of {batch_bytes / 2**20:,.1f} MiB; training may wait for data. To have all of them {ADVICE}.",
            stacklevel=3,
        )
    return affordable
