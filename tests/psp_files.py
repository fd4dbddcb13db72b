"""Checkpoints of pSp and e4e with random tensors, and IR-SE50 written out, for the tests of both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = (16, 16, 24, 32, 16)  # stem and stages; the first stage has an identity for its shortcut, as at full size
STAGES = [(2, 16, 16), (6, 16, 24), (20, 24, 32), (23, 32, 16)]  # last unit, channels in, channels out
TYPES = {"psp": "GradualStyleEncoder", "e4e": "Encoder4Editing"}


def normalisation(width: int) -> dict[str, Tensor]:
    return {
        "weight": torch.rand(width) + 0.5,
        "bias": torch.randn(width) * 0.1,
        "running_mean": torch.randn(width) * 0.1,
        "running_var": torch.rand(width) + 0.5,
        "num_batches_tracked": torch.tensor(7),
    }


def tensors_of(num_ws: int, channels: int = 3) -> dict[str, Tensor]:
    """Random tensors with the names of pSp's checkpoints, written down by hand."""
    torch.manual_seed(0)
    parts: dict[str, dict[str, Tensor]] = {}

    def conv(name: str, width_in: int, width_out: int, size: int, bias: bool = False) -> None:
        parts[name] = {"weight": torch.randn(width_out, width_in, size, size) / (width_in * size**2) ** 0.5}
        if bias:
            parts[name]["bias"] = torch.randn(width_out) * 0.1

    conv("input_layer.0", channels, 16, 3)
    parts["input_layer.1"] = normalisation(16)
    parts["input_layer.2"] = {"weight": torch.rand(16)}
    first = 0
    for last, below, width in STAGES:
        for i in range(first, last + 1):
            unit, entry = f"body.{i}", below if i == first else width
            if entry != width:
                conv(f"{unit}.shortcut_layer.0", entry, width, 1)
                parts[f"{unit}.shortcut_layer.1"] = normalisation(width)
            parts[f"{unit}.res_layer.0"] = normalisation(entry)
            conv(f"{unit}.res_layer.1", entry, width, 3)
            parts[f"{unit}.res_layer.2"] = {"weight": torch.rand(width)}
            conv(f"{unit}.res_layer.3", width, width, 3)
            parts[f"{unit}.res_layer.4"] = normalisation(width)
            conv(f"{unit}.res_layer.5.fc1", width, width // 16, 1)
            conv(f"{unit}.res_layer.5.fc2", width // 16, width, 1)
        first = last + 1
    for i in range(num_ws):
        for j in range(4 if i < 3 else 5 if i < 7 else 6):
            conv(f"styles.{i}.convs.{2 * j}", 16, 16, 3, bias=True)
        parts[f"styles.{i}.linear"] = {"weight": torch.randn(16, 16), "bias": torch.randn(16)}
    conv("latlayer1", 32, 16, 1, bias=True)
    conv("latlayer2", 24, 16, 1, bias=True)
    return {f"{name}.{kind}": tensor for name, part in parts.items() for kind, tensor in part.items()}


def checkpoint(num_ws: int, kind: str, **more: object) -> dict:
    state = {f"encoder.{name}": tensor for name, tensor in tensors_of(num_ws).items()}
    options = {"encoder_type": TYPES[kind], "start_from_latent_avg": True, "device": "cuda:0", "test_workers": None}
    content = {"state_dict": state, "opts": options, "latent_avg": torch.randn(16).repeat(num_ws, 1)}
    return {**content, **more}


def irse50_units(t: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """models/encoders/model_irse.py of pSp written out, with mode 'ir_se' and 50 layers: the output of every unit."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = (t[f"{name}.running_{what}"][:, None, None] for what in ("mean", "var"))
        scale, shift = (t[f"{name}.{what}"][:, None, None] for what in ("weight", "bias"))
        return (x - mean) / (variance + 1e-5).sqrt() * scale + shift

    def rectify(x: Tensor, slope: Tensor) -> Tensor:
        return torch.where(x > 0, x, x * slope[:, None, None])

    x = rectify(norm(F.conv2d(x, t["input_layer.0.weight"], padding=1), "input_layer.1"), t["input_layer.2.weight"])
    outputs = []
    for i in range(24):
        unit, stride = f"body.{i}", 2 if i in (0, 3, 7, 21) else 1
        y = F.conv2d(norm(x, f"{unit}.res_layer.0"), t[f"{unit}.res_layer.1.weight"], padding=1)
        y = rectify(y, t[f"{unit}.res_layer.2.weight"])
        y = norm(F.conv2d(y, t[f"{unit}.res_layer.3.weight"], stride=stride, padding=1), f"{unit}.res_layer.4")
        hidden = (y.mean(dim=(2, 3)) @ t[f"{unit}.res_layer.5.fc1.weight"][:, :, 0, 0].T).clamp(min=0)
        y = y * torch.sigmoid(hidden @ t[f"{unit}.res_layer.5.fc2.weight"][:, :, 0, 0].T)[:, :, None, None]
        if f"{unit}.shortcut_layer.0.weight" in t:
            x = norm(F.conv2d(x, t[f"{unit}.shortcut_layer.0.weight"], stride=stride), f"{unit}.shortcut_layer.1")
        else:
            x = x[:, :, ::stride, ::stride]
        x = x + y
        outputs.append(x)
    return outputs
