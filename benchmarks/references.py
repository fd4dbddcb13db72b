"""Imports generators of other people's checkouts, to compare with; nothing of theirs is part of this project."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rosinality_module(folder: Path) -> ModuleType:
    """Imports rosinality's `model.py` with its own plain PyTorch operations, which it uses on the CPU.

    Args:
        folder: A checkout of rosinality/stylegan2-pytorch.

    Returns:
        The module.
    """
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
    """Imports the StyleGAN2 networks of NVIDIA's StyleGAN2-ADA-PyTorch or StyleGAN3 repository.

    Args:
        folder: The checkout.

    Returns:
        The module.
    """
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


def psp_modules(folder: Path) -> dict[str, ModuleType]:
    """Imports what pSp trains with, its two CUDA operations replaced by plain PyTorch.

    Args:
        folder: A checkout of eladrich/pixel2style2pixel.

    Returns:
        Its modules by name.
    """
    names = (
        "models.encoders.psp_encoders", "models.encoders.model_irse", "models.stylegan2.model",
        "criteria.lpips.networks", "training.ranger",
    )  # fmt: skip
    packages = ("models", "criteria", "training")
    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] in packages}
    forget(*packages)
    operations = ModuleType("models.stylegan2.op")
    operations.__dict__.update(
        FusedLeakyReLU=_BiasedLeakyReLU, fused_leaky_relu=_biased_leaky_relu, upfirdn2d=_filter_up_or_down
    )
    sys.path.insert(0, str(folder))
    try:
        with mock.patch.dict(sys.modules, {"models.stylegan2.op": operations}):
            return {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(folder))
        forget(*packages)
        sys.modules.update(ours)


class _BiasedLeakyReLU(nn.Module):
    def __init__(self, channel: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channel))

    def forward(self, x: Tensor) -> Tensor:
        return _biased_leaky_relu(x, self.bias)


def _biased_leaky_relu(x: Tensor, bias: Tensor, negative_slope: float = 0.2, scale: float = 2**0.5) -> Tensor:
    return F.leaky_relu(x + bias.view(1, -1, *[1] * (x.ndim - 2)), negative_slope) * scale


def _filter_up_or_down(x: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
    """Inserts zeros, pads, filters and drops pixels (B, C, H, W)."""
    batch, channels, height, width = x.shape
    if up > 1:
        spaced = x.new_zeros(batch, channels, height, up, width, up)
        spaced[:, :, :, 0, :, 0] = x
        x = spaced.view(batch, channels, height * up, width * up)
    x = F.pad(x, (*pad, *pad))
    weight = kernel.flip(0, 1).to(x).expand(channels, 1, *kernel.shape)
    return F.conv2d(x, weight, stride=down, groups=channels)
