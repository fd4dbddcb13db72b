"""Starts the processes of a run, one for each device; each takes its share of the inputs without communicating."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from data.console import number_option, print_error


def add_process_options(group: argparse._ArgumentGroup) -> None:
    """Adds --devices and --num-nodes to a group of options."""
    group.add_argument(
        "--devices",
        type=number_option,
        default=1,
        metavar="N",
        help="processes on this machine, one a GPU (default: 1)",
    )
    group.add_argument(
        "--num-nodes",
        type=number_option,
        default=1,
        metavar="M",
        help="machines that run this command, each with its number from 0 in NODE_RANK or SLURM_NODEID, all with one "
        "folder of results (default: 1)",
    )


def launch(devices: int, nodes: int, command: Sequence[str]) -> int | None:
    """Starts a command on several devices, and waits for it.

    Args:
        devices: Processes on this machine.
        nodes: Machines.
        command: Program and arguments, for Python.

    Returns:
        The largest exit status; None where this process is to do the work: there is one alone, or it was started.

    Raises:
        ValueError: If another launcher started other processes, or this machine's number is out of range.
    """
    count = devices * nodes
    started = os.environ.get("WORLD_SIZE")
    if count == 1 or started is not None:
        if count > 1 and started != str(count):
            raise ValueError(
                f"--devices, --num-nodes: expected {started} processes in all, as WORLD_SIZE says that so many were "
                f"started, got {count}; leave the options out"
            )
        return None
    node = int(os.environ.get("NODE_RANK", os.environ.get("SLURM_NODEID", "0")))
    if not 0 <= node < nodes:
        raise ValueError(f"--num-nodes: expected NODE_RANK from 0 to {nodes - 1}, got {node}")
    threads = str(max(1, (os.cpu_count() or 1) // devices))
    children = []
    for local in range(devices):
        own = {"RANK": str(node * devices + local), "LOCAL_RANK": str(local), "WORLD_SIZE": str(count)}
        environment = {"OMP_NUM_THREADS": threads, **os.environ, **own}
        children.append(subprocess.Popen([sys.executable, *command], env=environment))
    return _wait(children)


def _wait(children: Sequence[subprocess.Popen]) -> int:
    """Waits for processes, whatever becomes of single ones; what ends this process ends them."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        codes = [child.wait() for child in children]
    except KeyboardInterrupt:  # which they got, too
        codes = [child.wait() for child in children]
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        for child in children:
            if child.poll() is None:
                child.terminate()
    for number, code in enumerate(codes):
        if code < 0:
            print_error(f"process {number} was ended by signal {-code}; the same command does what it left undone")
    return max(code if code >= 0 else 1 for code in codes)
