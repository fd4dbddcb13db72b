"""Imports generators of other people's checkouts, to compare with; nothing of theirs is part of this project."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock


def rosinality_module(folder: Path) -> ModuleType:
    """Imports `model.py` of a checkout of rosinality with its plain PyTorch operations, which it uses on the CPU."""
    forget("op")
    sys.path.insert(0, str(folder))
    try:
        with mock.patch("torch.utils.cpp_extension.load"):  # its CUDA code would be compiled at import
            spec = importlib.util.spec_from_file_location("rosinality_model", folder / "model.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(folder))


def nvidia_networks(folder: Path) -> ModuleType:
    """Imports the StyleGAN2 networks of a checkout of NVIDIA's StyleGAN2-ADA-PyTorch or StyleGAN3."""
    forget("training", "torch_utils", "dnnlib")
    sys.path.insert(0, str(folder))
    try:
        three = (folder / "training" / "networks_stylegan2.py").is_file()
        return importlib.import_module("training.networks_stylegan2" if three else "training.networks")
    finally:
        sys.path.remove(str(folder))


def forget(*packages: str) -> None:
    """Forgets imported packages: those of another checkout, or our own of the same name."""
    for name in [n for n in sys.modules if n.split(".")[0] in packages]:
        del sys.modules[name]
