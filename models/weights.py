"""Reads and writes generators: the project's own safetensors, and `.pt` files with StyleGAN2-ADA tensor names.

Every shape comes from the tensors themselves, and no code that a file may hold is executed.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.generator import Generator

FORMAT = "amortized-pulse/generator/1"
FORMATS = (
    "Supported are the project's own .safetensors, and .pt files with StyleGAN2-ADA tensor names under 'G_ema'; "
    "rosinality's .pt and NVIDIA's .pkl are not read yet."
)


def sha256_of(path: str | Path) -> str:
    """Gives the sha256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_generator(generator: Generator, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a generator in float16.

    Args:
        generator: What to write.
        path: Target, ends in .safetensors. It is replaced as a whole, so a kill leaves the old file.
        metadata: Notes kept in the file's header.

    Raises:
        ValueError: If the path has another suffix, or a tensor is not finite or too large for float16; nothing is
            written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"Expected a path that ends in .safetensors, by which it is read again, got {path}.")
    broken = [name for name, tensor in generator.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"Expected finite tensors, got some that are not finite (NaN or ∞): {', '.join(broken)}.")
    tensors = {name: tensor.detach().half().cpu().contiguous() for name, tensor in generator.state_dict().items()}
    overflow = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if overflow:
        raise ValueError(f"Expected tensors within float16's range (65504), got larger ones in {', '.join(overflow)}.")
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


def load_generator(path: str | Path, device: torch.device | str = "cpu") -> Generator:
    """Reads a generator in float32, ready for inference.

    Args:
        path: The project's own `.safetensors`, or a `.pt` with StyleGAN2-ADA tensor names under `G_ema`. Rosinality's
            `.pt` (`g_ema`) and NVIDIA's `.pkl` are not read yet.
        device: Where to put it.

    Returns:
        The generator, in eval mode, without gradients on its parameters.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not one of these, or its tensors do not make a StyleGAN2 generator.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a generator's weights at {path}, found no such file.")
    tensors = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pt(path)
    # Filters are the same in every network, and ours are built where they are used.
    tensors = {name: t.float() for name, t in tensors.items() if not name.endswith("resample_filter")}
    generator = Generator(**infer_config(tensors, path))
    wanted = {name: t.shape for name, t in generator.state_dict().items()}
    found = {name: t.shape for name, t in tensors.items()}
    wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if wrong:
        raise ValueError(f"{path}: tensors do not make a StyleGAN2 generator; missing, surplus or misshaped: {wrong}.")
    generator.load_state_dict(tensors)
    return generator.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def infer_config(tensors: dict[str, Tensor], path: str | Path) -> dict:
    """Reads the shape of a generator off its tensors.

    Args:
        tensors: Tensors by their StyleGAN2-ADA names.
        path: Named in errors.

    Returns:
        The arguments of `Generator`.

    Raises:
        ValueError: If names or dimensions are not those of a StyleGAN2 generator.
    """
    try:
        depth = sum(bool(re.fullmatch(r"mapping\.fc\d+\.weight", name)) for name in tensors)
        sizes = sorted(int(m[1]) for name in tensors if (m := re.fullmatch(r"synthesis\.b(\d+)\.conv1\.weight", name)))
        kernels = [f"synthesis.b{size}.conv1.weight" for size in sizes]
        for name, ndim in [("mapping.fc0.weight", 2), *((name, 4) for name in kernels)]:
            if tensors[name].ndim != ndim or 0 in tensors[name].shape:
                shape = tuple(tensors[name].shape)
                raise ValueError(f"{path}: expected {name} with {ndim} dimensions, none of them 0, got {shape}.")
        channels = [tensors[name].shape[0] for name in kernels]
        w_dim, z_dim = tensors["mapping.fc0.weight"].shape
        return {
            "resolution": sizes[-1],
            "channels": channels,
            "z_dim": z_dim,
            "w_dim": w_dim,
            "mapping_layers": depth,
        }
    except (KeyError, IndexError) as error:
        raise ValueError(
            f"{path}: expected tensors named as in StyleGAN2-ADA (mapping.fc0.weight, synthesis.b4.conv1.weight, …), "
            f"got {sorted(tensors)[:5]} … {FORMATS}"
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            kind = (file.metadata() or {}).get("format")
            if kind != FORMAT:
                raise ValueError(f"{path}: expected a generator (format {FORMAT!r}), got format {kind!r}. {FORMATS}")
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}); copy or download it again.") from error


def _read_pt(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path}: not a plain file of tensors ({reason}); nothing in it was executed. {FORMATS}"
        ) from error
    tensors = content.get("G_ema") if isinstance(content, dict) else None
    if not isinstance(tensors, dict):
        found = sorted(map(str, content))[:5] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: expected a dictionary with tensors under 'G_ema', got {found}. {FORMATS}")
    strange = [f"{name!r} ({type(t).__name__})" for name, t in tensors.items() if not _is_named_tensor(name, t)]
    if strange:
        raise ValueError(f"{path}: expected named tensors of real numbers under 'G_ema', got {', '.join(strange[:5])}.")
    return tensors


def _is_named_tensor(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and not (value.is_complex() or value.is_quantized or value.is_meta)
    )
