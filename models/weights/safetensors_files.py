"""The project's own file of a generator: safetensors with a header that says what it holds."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.generator import Generator
from models.weights.checkpoint import FORMATS, Checkpoint

FORMAT = "amortized-pulse/generator/1"


def sha256_of(path: str | Path) -> str:
    """Gives the sha256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns floating-point tensors into float16 on the CPU; others stay as they are.

    Args:
        tensors: Tensors by name.

    Returns:
        The same names.

    Raises:
        ValueError: If a tensor is not finite or too large for float16.
    """
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"Expected finite tensors, got some that are not finite (NaN or ∞): {', '.join(broken)}.")
    half = {
        name: (tensor.detach().half() if tensor.is_floating_point() else tensor.detach()).cpu().contiguous()
        for name, tensor in tensors.items()
    }
    overflow = [name for name, tensor in half.items() if not tensor.isfinite().all()]
    if overflow:
        raise ValueError(f"Expected tensors within float16's range (65504), got larger ones in {', '.join(overflow)}.")
    return half


def save_generator(
    generator: Generator,
    path: str | Path,
    metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes a generator.

    Args:
        generator: What to write.
        path: Target, ends in .safetensors. It is replaced as a whole, so a kill leaves the old file.
        metadata: Notes kept in the file's header.
        dtype: float16, half the size; or float32, exact.

    Raises:
        ValueError: If the path has another suffix, the number type is another one, or a tensor is not finite or too
            large for float16; nothing is written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"Expected a path that ends in .safetensors, by which it is read again, got {path}.")
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"Expected the number type torch.float16 or torch.float32, got {dtype}.")
    tensors = to_half(generator.state_dict())
    if dtype == torch.float32:
        tensors = {name: t.detach().float().cpu().contiguous() for name, t in generator.state_dict().items()}
    notes = {**(metadata or {}), "format": FORMAT, "config": json.dumps(generator.config)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, path, notes)


def write_safetensors(tensors: dict[str, Tensor], path: str | Path, notes: dict[str, str]) -> None:
    """Writes tensors so that the same content gives the same bytes, and thus the same hash.

    Args:
        tensors: Tensors by name.
        path: Target. It is replaced as a whole, so a kill leaves the old file.
        notes: Kept in the file's header.
    """
    content = save(tensors, notes)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    # The library writes the notes in random order.
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    partial = Path(path).with_suffix(".partial")
    partial.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    partial.replace(path)


def read_safetensors(path: Path) -> Checkpoint:
    """Reads what `save_generator` wrote.

    Args:
        path: The file.

    Returns:
        The checkpoint.

    Raises:
        ValueError: If the file is damaged, or is not a generator of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            kind = notes.get("format")
            if kind != FORMAT:
                raise ValueError(f"{path}: expected a generator (format {FORMAT!r}), got format {kind!r}. {FORMATS}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}); copy or download it again.") from error
    own = {name: note for name, note in notes.items() if name not in ("format", "config")}
    return Checkpoint("amortized-pulse", tensors, _conv_clamp(notes, path), own)


def _conv_clamp(notes: dict[str, str], path: Path) -> float | None:
    """Reads the one setting that the tensors do not show."""
    try:
        clamp = json.loads(notes.get("config", "{}")).get("conv_clamp")
        if clamp is None:
            return None
        if isinstance(clamp, int | float) and math.isfinite(clamp) and clamp > 0:
            return float(clamp)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: expected the header's config to be JSON; copy or download it again.") from error
    raise ValueError(f"{path}: expected conv_clamp to be a number above 0 or null, got {clamp!r}.")
