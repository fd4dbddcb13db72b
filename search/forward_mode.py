"""Forward-mode derivatives from several threads at once.

torch has one level of dual numbers for the whole process, and refuses to open a second. Tensors carry their own
tangents, so that threads can share it: the first opens it, the last closes it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.autograd.forward_ad as forward_ad

_lock = threading.Lock()
_inside = 0


@contextmanager
def dual_level() -> Iterator[None]:
    """As `torch.autograd.forward_ad.dual_level`, for any number of threads."""
    global _inside
    with _lock:
        if _inside == 0:
            forward_ad.enter_dual_level()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                forward_ad.exit_dual_level()
