"""Same command, same bytes: what torch must be told for that."""

from __future__ import annotations

import torch


def use_deterministic_kernels() -> None:
    """Keeps cuDNN from convolutions that add up in any order, and from choosing among them by a race.

    The order of additions decides the last bits, and choosing by speed decides it anew in every process. On a CPU
    nothing changes. A program calls this once, at its start.
    """
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
