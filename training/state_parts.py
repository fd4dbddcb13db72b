"""A training's state in files of at most 16 MB, for ways that take no larger ones.

The weights of the networks stay float32. Their averages become float16, and Adam keeps the root of its second moment in
bfloat16; its first moment is left out, which for β₁ = 0 is no loss: a training goes on as it was, if not to the last
bit. Two thirds of a checkpoint's bytes go.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.files import atomic_write

PART_BYTES = 16 * 10**6
NOTES = "state.json"
# Order of a moment's numbers in memory, which must be that of its weights: fused Adam goes through both in one stride.
CONTIGUOUS, CHANNELS_LAST = "root", "root_channels_last"


def write_parts(checkpoint: dict[str, Any], folder: str | Path) -> list[Path]:
    """Writes a checkpoint in parts; those of an earlier state are replaced.

    Args:
        checkpoint: What Lightning saves: `state_dict`, `optimizer_states` of Adam with β₁ = 0, and its counters.
        folder: Where to; made if need be.

    Returns:
        The files.

    Raises:
        ValueError: If the optimisers are others, whose state would not survive.
    """
    folder = Path(folder)
    tensors = {f"weights/{name}": _short(name, tensor) for name, tensor in checkpoint["state_dict"].items()}
    groups = []
    for i, optimizer in enumerate(checkpoint["optimizer_states"]):
        if any(group.get("betas", (None,))[0] != 0 for group in optimizer["param_groups"]):
            raise ValueError("Expected the state of Adam with β₁ = 0, whose first moment may be left out.")
        groups.append(optimizer["param_groups"])
        for j, state in optimizer["state"].items():
            root = state["exp_avg_sq"].sqrt().bfloat16()
            last = root.ndim == 4 and not root.is_contiguous()
            tensors[f"adam/{i}/{j}/{CHANNELS_LAST if last else CONTIGUOUS}"] = root
            tensors[f"adam/{i}/{j}/step"] = state["step"]
    kept = ("epoch", "global_step", "loops", "pytorch-lightning_version")
    notes = {"groups": groups, **{name: checkpoint[name] for name in kept}}
    paths = [folder / f"part{i:02d}.safetensors" for i, _ in enumerate(_filled(tensors))]
    for path, names in zip(paths, _filled(tensors), strict=True):
        with atomic_write(path) as partial:
            save_file({name: tensors[name].contiguous() for name in names}, partial)
    for path in set(folder.glob("part*.safetensors")) - set(paths):
        path.unlink()
    with atomic_write(folder / NOTES) as partial:
        partial.write_text(json.dumps(notes))
    return [*paths, folder / NOTES]


def read_parts(folder: str | Path) -> dict[str, Any]:
    """Reads what `write_parts` wrote.

    Args:
        folder: Where the parts lie.

    Returns:
        A checkpoint for `Trainer.fit(ckpt_path=…)`, once it is saved.

    Raises:
        FileNotFoundError: If there is no state.
    """
    folder = Path(folder)
    notes = json.loads((folder / NOTES).read_text())
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("part*.safetensors")):
        tensors |= load_file(path)
    state_dict = {name[len("weights/") :]: _long(t) for name, t in tensors.items() if name.startswith("weights/")}
    optimizers = []
    for i, groups in enumerate(notes.pop("groups")):
        groups = [{**group, "betas": tuple(group["betas"])} for group in groups]
        optimizers.append({"state": _adam(tensors, f"adam/{i}/"), "param_groups": groups})
    return {**notes, "state_dict": state_dict, "optimizer_states": optimizers, "lr_schedulers": [], "callbacks": {}}


def _adam(tensors: dict[str, Tensor], prefix: str) -> dict[int, dict[str, Tensor]]:
    state = {}
    for name in (n for n in tensors if n.startswith(prefix) and not n.endswith("/step")):
        number, order = name.removeprefix(prefix).split("/")
        second = tensors[name].float().square()
        if order == CHANNELS_LAST:
            second = second.contiguous(memory_format=torch.channels_last)
        step = tensors[f"{prefix}{number}/step"]
        state[int(number)] = {"step": step, "exp_avg": torch.zeros_like(second), "exp_avg_sq": second}
    return state


def _short(name: str, tensor: Tensor) -> Tensor:
    return tensor.half() if name.startswith("generator_ema") and tensor.is_floating_point() else tensor


def _long(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _filled(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Deals names out to parts, in order, each as full as it may be."""
    parts: list[list[str]] = [[]]
    left = PART_BYTES - 200_000  # for the header
    for name, tensor in tensors.items():
        left -= tensor.nbytes
        if left < 0:
            parts.append([])
            left = PART_BYTES - 200_000 - tensor.nbytes
        parts[-1].append(name)
    return parts
