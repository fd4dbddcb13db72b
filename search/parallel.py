"""Batches of a search in several threads of a processor, each with its share of torch's threads.

A batch's tensors are small, and torch's threads wait for each other after every operation. Batches are independent of
each other, so that their threads need not wait.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")


def run_in_order(work: Callable[[T], None], parts: Sequence[T]) -> None:
    """Does the work on the parts, one after the other."""
    for part in parts:
        work(part)


def run_in_threads(work: Callable[[T], None], parts: Sequence[T], stopped: threading.Event) -> None:
    """Does the work on the parts, as many at a time as torch has threads, in any order; raises what the work raises.

    `stopped` is set once a part has failed or the user has interrupted: no part begins after that, and the work may
    look at it, to end sooner.
    """
    threads = torch.get_num_threads()
    rounds = math.ceil(len(parts) / threads)
    workers = math.ceil(len(parts) / max(rounds, 1))  # no more than it takes for so many rounds
    if workers <= 1:
        return run_in_order(work, parts)
    autocast = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")
    ready = threading.Barrier(workers + 1)

    def begin() -> None:
        torch.set_num_threads(threads // workers)
        torch.get_num_threads()  # a thread takes over what is set when torch first looks, and that is now
        ready.wait()

    def guarded(part: T) -> None:
        if stopped.is_set():
            return
        try:
            with torch.autocast("cpu", *autocast):
                work(part)
        except BaseException:
            stopped.set()
            raise

    with ThreadPoolExecutor(workers, initializer=begin) as pool:
        try:
            futures = [pool.submit(guarded, part) for part in parts]
            ready.wait()
            # The number belongs to the thread that sets it, but a thread that is new to torch takes the last one set.
            torch.set_num_threads(threads)
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stopped.set()
            ready.abort()  # of threads that have not begun yet
            raise
