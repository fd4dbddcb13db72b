"""Makes a generator of any file that holds a StyleGAN2.

Every shape comes from the tensors themselves, and no code that a file may hold is executed.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from models.generator import Generator
from models.weights.checkpoint import FORMATS, Checkpoint
from models.weights.layouts import checkpoint_from_dictionary
from models.weights.nvidia import checkpoint_from_pickle
from models.weights.pickles import read_pickle
from models.weights.safetensors_files import read_safetensors
from models.weights.torch_files import read_torch_file

MEAN_SAMPLES = 100_000
_LEGACY_TORCH = bytes.fromhex("80028a0a6cfc9c46f9")  # the magic number that torch.save wrote before its zip files


def load_generator(path: str | Path, device: torch.device | str = "cpu") -> Generator:
    """Reads a generator in float32, ready for inference.

    A mean latent that the file lacks is computed from 100,000 latents, the same ones every time.

    Args:
        path: The project's own `.safetensors`; NVIDIA's `.pkl` (StyleGAN2-ADA-PyTorch, StyleGAN3 repository); a `.pt`
            or `.pth` of rosinality, BasicSR/GFPGAN, pSp or e4e, or with StyleGAN2-ADA names under `G_ema`.
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

    Args:
        path: The file.

    Returns:
        The checkpoint, its tensors on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is of no known layout, or not safe to read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a generator's weights at {path}, found no such file.")
    with open(path, "rb") as file:
        start = file.read(16)
    if start.startswith((b"PK", _LEGACY_TORCH)):
        return checkpoint_from_dictionary(read_torch_file(path), path)
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return read_safetensors(path)
    if start.startswith(b"\x80"):
        return checkpoint_from_pickle(read_pickle(path), path)
    raise ValueError(f"{path}: expected a file of weights, found none by its first bytes {start!r}. {FORMATS}")


def make_generator(checkpoint: Checkpoint, path: str | Path) -> Generator:
    """Builds the generator of a checkpoint.

    Args:
        checkpoint: What the file says.
        path: Named in errors.

    Returns:
        The generator on the CPU, float32, in eval mode, without gradients on its parameters.

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
    """Estimates the mean of w.

    Args:
        generator: The generator.
        samples: Number of latents z that are mapped; the same ones every time.

    Returns:
        w̄ (D,).
    """
    rng = torch.Generator().manual_seed(0)
    total = torch.zeros(generator.w_dim, dtype=torch.float64)
    for start in range(0, samples, 10_000):
        z = torch.randn(min(10_000, samples - start), generator.z_dim, generator=rng)
        total += generator.mapping(z)[:, 0].double().sum(dim=0)  # (D,)
    return (total / samples).float()


def infer_config(tensors: dict[str, Tensor], path: str | Path) -> dict:
    """Reads the shape of a generator off its tensors.

    Args:
        tensors: Tensors by their StyleGAN2-ADA names.
        path: Named in errors.

    Returns:
        The arguments of `Generator` that the tensors tell.

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
