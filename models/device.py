"""The device: which one, how it computes, and how many faces fit on it."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from models.generator import Generator

# The memory of a face is a multiple of the features C_r r² of its resolutions: of their sum where a backward pass
# follows, of the largest where none does. Measured on a CPU at 256 and 1024 px (`benchmarks/generator.py`).
KEPT, PEAK = 4.3, 5.7  # tensors of the size of a resolution's features: kept for its backward pass, alive during it
ALIVE = 6.0  # tensors of the size of the largest features that are alive at once without a gradient
SHARE = 0.25  # of the memory, which others use as well
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def choose_device(name: str) -> torch.device:
    """Finds a device by name: "auto" (a CUDA GPU if there is one, else the CPU), "cpu", "cuda", "cuda:1" … or "mps".

    Where a launcher started a process for each GPU, "cuda" is this one's.

    Raises:
        ValueError: If the name is another one, or there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    # torch knows more kinds, but on "meta", for one, everything runs and nothing is computed.
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", name):
        raise ValueError(f"expected auto, cpu, cuda, cuda:N or mps, got {name!r}")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ValueError(f"{name!r} cannot be used here ({reason}); auto and cpu always can") from error
    return torch.device(name)


def use_deterministic_kernels() -> None:
    """Keeps cuDNN from convolutions that add up in any order, and from choosing among them by a race.

    The order of additions decides the last bits, and choosing by speed decides it anew in every process. On a CPU
    nothing changes. A program calls this once, at its start.
    """
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def memory_of(device: torch.device) -> int:
    """Gives the memory of a device in bytes, all of it, so that the same machine always gives the same number."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(Path, CGROUP_LIMITS):  # of a container
        if path.is_file() and path.read_text().strip().isdecimal():
            limits.append(int(path.read_text()))
    return min(limits)


def bytes_per_face(generator: Generator, gradient: bool) -> float:
    """Estimates the bytes that the synthesis of one face takes in float32, with a backward pass or without."""
    synthesis = generator.synthesis
    features = [
        width * size**2
        for size, width in zip(synthesis.resolutions, generator.config["channels"], strict=True)  # type: ignore[arg-type]
    ]
    if not gradient:
        return 4 * ALIVE * features[-1]
    first = len(features) - synthesis.checkpointed
    if first == len(features):
        return 4 * PEAK * sum(features)
    return 4 * (KEPT * sum(features[:first]) + PEAK * max(features[first:]) + sum(features[first - 1 : -1]))


def faces_at_once(generator: Generator, gradient: bool = False, most: int = 64) -> int:
    """Says how many faces to synthesize at once: 1 to `most`, the same on every call on the same machine."""
    fitting = SHARE * memory_of(generator.w_avg.device) / bytes_per_face(generator, gradient)
    return max(1, min(most, int(fitting)))


def compile_if_possible(module: nn.Module, device: torch.device) -> bool:
    """Compiles a module in place for one batch size; its tensors keep their names."""
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        warnings.warn("No C++ compiler found: training runs uncompiled, and slower.", stacklevel=2)
        return False
    torch._dynamo.config.suppress_errors = True  # A graph that fails to compile runs as it is.
    module.compile()
    return True
