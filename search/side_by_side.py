"""Parts of a search side by side on a processor: each in a thread of its own, with its share of torch's threads.

A part's tensors are small, and torch's threads wait for each other after every operation. Parts know nothing of each
other, so that their threads need not wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")


def side_by_side(work: Callable[[T], None], parts: Sequence[T], device: torch.device, stop: Callable[[], None]) -> None:
    """Does the work on all parts, several at a time where that uses a processor better; one by one elsewhere.

    Args:
        work: Called once with every part; from several threads, in any order.
        parts: The parts.
        device: Where the work is done.
        stop: Called when a part has failed or the user has interrupted: makes the work on the others end soon.

    Raises:
        Exception: Whatever the work raises.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(parts)) if device.type == "cpu" else 1
    if workers <= 1:
        for part in parts:
            work(part)
        return

    def guarded(part: T) -> None:
        try:
            work(part)
        except BaseException:
            stop()
            raise

    # The number that is set belongs to the thread that sets it, but new threads begin with the one that was set last.
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        done, _ = wait([pool.submit(guarded, part) for part in parts], return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BaseException:
        stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
