"""The device that a command line names."""

from __future__ import annotations

import re

import torch


def choose_device(name: str) -> torch.device:
    """Finds the device by its name, and checks that it can be used.

    Args:
        name: "auto" (a CUDA GPU if there is one, else the CPU), "cpu", "cuda", "cuda:1" …, or "mps".

    Returns:
        The device.

    Raises:
        ValueError: If the name is another one, or there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # torch knows more kinds, but on "meta", for one, everything runs and nothing is computed.
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", name):
        raise ValueError(f"expected auto, cpu, cuda, cuda:N or mps, got {name!r}")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ValueError(f"{name!r} cannot be used here ({reason}); auto and cpu always can") from error
    return torch.device(name)
