"""Compilation that a machine without a compiler does without."""

from __future__ import annotations

import shutil
import warnings

import torch
from torch import nn


def compile_if_possible(module: nn.Module, device: torch.device) -> bool:
    """Compiles a module in place; its tensors keep their names.

    Args:
        module: What to compile, for one batch size.
        device: Where it will run; only a CPU needs a compiler of its own.

    Returns:
        Whether it was compiled.
    """
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        warnings.warn("No C++ compiler found: training runs uncompiled, and slower.", stacklevel=2)
        return False
    torch._dynamo.config.suppress_errors = True  # A graph that fails to compile runs as it is.
    module.compile()
    return True
