"""The processes that share a run, as torchrun or `--devices` start them."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Processes:
    """This process among those that share a run."""

    rank: int = 0  # this one's number
    count: int = 1  # how many there are
    meets: bool = False  # whether they can wait for each other; `cli.launch` waits for those that it started

    @classmethod
    def join(cls) -> Processes:
        """Finds out who this is, and meets the others if torchrun started this process."""
        rank, count = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        meets = count > 1 and "MASTER_ADDR" in os.environ
        if meets:
            import torch.distributed as dist

            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=datetime.timedelta(days=2))  # a slow one is waited for
        return cls(rank, count, meets)

    def wait(self) -> None:
        """Waits for all."""
        if self.meets:
            import torch.distributed as dist

            dist.barrier()

    def leave(self) -> None:
        """Ends the meeting."""
        if self.meets:
            import torch.distributed as dist

            dist.destroy_process_group()

    def share(self, total: int, batch: int) -> Iterator[slice]:
        """Gives this process's batches of `total` faces; the last one is as long as it is."""
        for start in range(self.rank * batch, total, self.count * batch):
            yield slice(start, min(start + batch, total))
