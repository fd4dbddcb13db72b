"""Makes a generator of any file that holds a StyleGAN2, and writes the project's own.

Every shape comes from the tensors themselves, and no code that a file may hold is executed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data.files import atomic_write
from data.signatures import describe_file
from models.checkpoints.layouts import FORMATS, Checkpoint, find_generator
from models.checkpoints.unpickler import safe_load
from models.generator import Generator

FORMAT = "amortized-pulse/generator/1"
MEAN_SAMPLES = 100_000


def load_generator(path: str | Path, device: torch.device | str = "cpu") -> Generator:
    """Reads a generator in float32, ready for inference.

    A mean latent that the file lacks is computed from 100,000 latents, the same ones every time.

    Args:
        path: A StyleGAN2 of this project, NVIDIA, rosinality, BasicSR, GFPGAN, pSp or e4e, in whatever common wrapping;
            see `models.checkpoints.layouts`.
        device: Where to put it.

    Returns:
        The generator, in eval mode, without gradients on its parameters.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not one of these, is not safe to read, or its tensors do not make a StyleGAN2
            generator.
    """
    return make_generator(read_checkpoint(path), path).to(device)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads what a file says about a generator, whatever its layout; what it is follows from its content.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of no known layout, or not safe to read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a generator's weights at {path}, found no such file.")
    with open(path, "rb") as file:
        start = file.read(9)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        try:
            content = safe_load(path)
        except ValueError as error:
            raise ValueError(f"{error} {FORMATS}") from error
        return find_generator(content, path)
    if start[8:9] == b"{" or (path.suffix == ".safetensors" and not describe_file(path)):
        return _read_safetensors(path)
    what = describe_file(path) or f"not a file of weights, by its first bytes {start!r}"
    raise ValueError(f"{path}: {what}. {FORMATS}")


def make_generator(checkpoint: Checkpoint, path: str | Path) -> Generator:
    """Builds the generator of a checkpoint on the CPU, float32, in eval mode, without gradients on its parameters.

    Raises:
        ValueError: If the tensors do not make a StyleGAN2 generator.
    """
    tensors = checkpoint.tensors
    config = {**infer_config(tensors, path), "conv_clamp": checkpoint.conv_clamp}
    try:
        with torch.device("meta"):  # shapes alone: a small file cannot ask for much memory
            wanted = {name: t.shape for name, t in Generator(**config).state_dict().items()}
    except ValueError as error:  # of sizes that no StyleGAN2 has
        raise ValueError(f"{path}: {error}") from error
    has_mean = "mapping.w_avg" in tensors
    if not has_mean:
        del wanted["mapping.w_avg"]
    found = {name: t.shape for name, t in tensors.items()}
    wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if wrong:
        raise ValueError(f"{path}: tensors do not make a StyleGAN2 generator; missing, surplus or misshaped: {wrong}.")
    generator = Generator(**config).eval().requires_grad_(False)
    generator.load_state_dict({name: t.float() for name, t in tensors.items()}, strict=has_mean)
    if not has_mean:
        generator.mapping.w_avg.copy_(mean_latent(generator))
    return generator.to(memory_format=torch.channels_last)


@torch.no_grad()
def mean_latent(generator: Generator, samples: int = MEAN_SAMPLES) -> Tensor:
    """Estimates the mean of w (D,) from latents z that are the same every time."""
    rng = torch.Generator().manual_seed(0)
    total = torch.zeros(generator.w_dim, dtype=torch.float64)
    for start in range(0, samples, 10_000):
        z = torch.randn(min(10_000, samples - start), generator.z_dim, generator=rng)
        total += generator.mapping(z)[:, 0].double().sum(dim=0)  # (D,)
    return (total / samples).float()


def infer_config(tensors: dict[str, Tensor], path: str | Path) -> dict:
    """Reads the arguments of `Generator` off its tensors by their StyleGAN2-ADA names.

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


def to_half(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turns floating-point tensors into float16 on the CPU; ValueError if one is not finite or too large for it."""
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
    """Writes tensors so that the same content gives the same bytes; the file is replaced as a whole."""
    content = save(tensors, notes)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    # The library writes the notes in random order.
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the tensors to 8 bytes
    with atomic_write(path) as partial:
        partial.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def is_our_tensors(path: Path) -> bool:
    """Says whether a training of ours wrote a file of tensors, by its header: a generator, a classifier, a flow."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
        return notes.get("format", "").startswith("amortized-pulse/") or "generator_sha256" in notes
    except (SafetensorError, OSError, RecursionError):
        return False


def is_generator_file(path: str | Path) -> bool:
    """Says whether a file is one that `save_generator` wrote, by its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError, RecursionError):
        return False


def _read_safetensors(path: Path) -> Checkpoint:
    """Reads what `save_generator` wrote, or other people's tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, RecursionError) as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error}); copy or download it again.") from error
    if notes.get("format", "").startswith("amortized-pulse/"):
        if notes["format"] != FORMAT:
            raise ValueError(f"{path}: expected a generator ({FORMAT}), got {notes['format']}. {FORMATS}")
        own = {name: note for name, note in notes.items() if name not in ("format", "config")}
        return Checkpoint("amortized-pulse", tensors, _conv_clamp(notes, path), own)
    return find_generator(tensors, path)


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
