"""Masked linear layers as they are stored: the weights that a mask lets through, and the mask as bits.

A masked autoregressive network (`zuko.nn.MaskedLinear`) holds about as many weights that never count, and a byte for
every one of them that says so.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

MASK, WEIGHT = ".mask", ".weight"


def pack_masked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Makes the weights of masked layers smaller.

    Args:
        tensors: A state: weights "NAME.weight", and of masked layers "NAME.mask", bool of the same shape.

    Returns:
        The same names: of masked layers the weights that count (n,), and the mask in bits, uint8 (⌈size / 8⌉,).
    """
    packed = dict(tensors)
    for name, mask in tensors.items():
        if name.endswith(MASK) and mask.dtype == torch.bool:
            weight = name.removesuffix(MASK) + WEIGHT
            packed[weight] = tensors[weight][mask]
            packed[name] = torch.from_numpy(np.packbits(mask.cpu().numpy()))
    return packed


def unpack_masked(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Gives back a state that `pack_masked` made smaller; one that is not stays as it is.

    Args:
        tensors: The state.
        shapes: Of all its tensors as they were.

    Returns:
        The state, zero where no weight counts.

    Raises:
        ValueError: If the numbers of bits or weights do not fit.
    """
    whole = dict(tensors)
    for name, bits in tensors.items():
        if name.endswith(MASK) and bits.dtype == torch.uint8 and name in shapes:
            weight, shape = name.removesuffix(MASK) + WEIGHT, shapes[name]
            if len(bits) != -(-shape.numel() // 8):
                raise ValueError(f"expected a mask of {shape.numel()} bits as {name}, found {len(bits)} bytes")
            mask = torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel())).bool().view(shape)
            if tensors[weight].shape != (int(mask.sum()),):
                raise ValueError(
                    f"expected {int(mask.sum())} numbers as {weight}, found {tuple(tensors[weight].shape)}"
                )
            whole[name] = mask
            whole[weight] = tensors[weight].new_zeros(shape).masked_scatter_(mask, tensors[weight])
    return whole
