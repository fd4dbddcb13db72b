"""Where the training of a generator starts from: weights of its own size, or of half its size, which it grows from.

A generator grows by one block. The blocks below and the mapping network are taken over, and the new block's colour
output starts at zero, so that the first pictures are the old ones, enlarged.
"""

from __future__ import annotations

from safetensors.torch import load_file
from torch import nn

from models import load_generator
from models.discriminator import Discriminator
from models.generator import Generator


def start_generator(generator: Generator, path: str) -> bool:
    """Copies the weights of a generator of the same size or of half of it.

    Args:
        generator: Takes the weights.
        path: A file that `models.load_generator` reads.

    Returns:
        Whether the generator has grown: the file's was of half the size.

    Raises:
        ValueError: If the file's generator is neither the same nor this one without its last block.
    """
    loaded = load_generator(path)
    own = generator.config
    half = {**own, "resolution": generator.resolution // 2, "channels": list(generator.channels[:-1])}
    if loaded.config not in (own, half):
        raise ValueError(
            f"Expected a generator of shape {own} in {path}, or one without the last block, {half}, got "
            f"{loaded.config}; set channels, z_dim, w_dim and mapping_layers of the recipe accordingly."
        )
    generator.load_state_dict(generator.state_dict() | loaded.state_dict())
    grown = loaded.config != own
    if grown:
        for parameter in (generator.synthesis.blocks[-1].torgb.weight, generator.synthesis.blocks[-1].torgb.bias):
            nn.init.zeros_(parameter)
    return grown


def start_discriminator(discriminator: Discriminator, path: str) -> None:
    """Copies the weights of a discriminator of the same shape.

    Args:
        discriminator: Takes the weights.
        path: A safetensors file of its state dict, in any float type.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds a discriminator of another shape.
    """
    tensors = load_file(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in discriminator.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if got != shapes:
        different = sorted(name for name in shapes.keys() | got.keys() if shapes.get(name) != got.get(name))
        raise ValueError(
            f"Expected a discriminator of {len(discriminator.blocks)} blocks and the recipe's widths in {path}, got "
            f"another one: {', '.join(different[:3])} differ; set resolution and channels accordingly."
        )
    discriminator.load_state_dict(tensors)
