"""Synthesizes the large blocks of the synthesis network band by band: the same picture, in less time and memory.

On a CPU a 1024 px layer spends most of its time on memory, not on arithmetic: 134 MB of features are fetched anew from
the system for every intermediate result, and pass through the caches several times. Here

- a band of rows goes through the whole block (both convolutions, noise, activation, colour) while it is in the cache;
- style and demodulation go into one kernel per picture, which costs nothing at these sizes, since a kernel is small
  next to the features, and saves a pass over the features for each;
- the last block's features are never stored: only its colour is wanted.

For inference alone, since it works in place. The exported and the trained network use the blocks' own `forward`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers import SQRT2, SynthesisBlock, SynthesisLayer, upsample_2x

SMALLEST = 128  # blocks below have more kernel than features, and lose by a kernel per picture
BAND_BYTES = 8 * 2**20  # of one intermediate result: a few of them fit into the cache


def pays(ws: Tensor) -> bool:
    """Tells whether bands may be used: for inference on a CPU, outside of tracing and compiling."""
    return (
        ws.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
    )


def band_rows(channels: int, size: int, itemsize: int) -> int:
    """Gives the height of a band in rows, even, for features of this many channels, this width, and bytes a number."""
    return max(8, BAND_BYTES // (channels * size * itemsize) // 2 * 2)


def synthesize_blocks(
    blocks: Sequence[SynthesisBlock],
    x: Tensor,
    rgb: Tensor,
    styles: Sequence[Sequence[Tensor]],
    noise: Sequence[Sequence[Tensor | None]],
) -> Tensor:
    """Synthesizes the last blocks of the synthesis network, one picture after the other.

    Args:
        blocks: The blocks, coarse to fine.
        x: Features of the block below (B, C, H, W).
        rgb: Its colour (B, 3, H, W).
        styles: Three style codes (B, D) per block: two convolutions and the colour output.
        noise: Two noise maps (B or 1, 1, H', W') or None per block.
    """
    images = []
    for i in range(x.shape[0]):
        features, colour = x[i : i + 1], rgb[i : i + 1]
        for block, codes, maps in zip(blocks, styles, noise, strict=True):
            own = [None if n is None else n[min(i, n.shape[0] - 1)][None] for n in maps]
            features, colour = _synthesize_block(
                block, features, colour, [code[i : i + 1] for code in codes], own, block is not blocks[-1]
            )
        images.append(colour)
    return torch.cat(images)


def _synthesize_block(
    block: SynthesisBlock, x: Tensor, rgb: Tensor, ws: Sequence[Tensor], noise: Sequence[Tensor | None], keep: bool
) -> tuple[Tensor, Tensor]:
    """Synthesizes one block for one picture; returns its features (empty unless they are to be kept) and its colour."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    x = x.to(dtype)
    up, same = block.conv0, block.conv1
    size, channels = same.resolution, same.weight.shape[0]
    kernels = [_kernel(layer, w).to(dtype) for layer, w in zip((up, same), ws[:2], strict=True)]
    kernels[0] = kernels[0].transpose(0, 1).contiguous(memory_format=torch.channels_last)  # (C_in, C, 3, 3)
    maps = [
        None if n is None else (n * (layer.noise_strength * SQRT2)).to(dtype)
        for layer, n in zip((up, same), noise, strict=True)
    ]
    colour_kernel = block.torgb.kernels(ws[2])[0, :, :, None, None].to(dtype)  # (3, C, 1, 1)
    with torch.autocast("cpu", enabled=False):
        image = upsample_2x(rgb, block.upsampling_filter)  # (1, 3, R, R)
        features = torch.empty((1, channels if keep else 0, size, size), dtype=dtype, memory_format=torch.channels_last)
        rows = band_rows(channels, size, x.element_size())
        for top in range(0, size, rows):
            bottom = min(top + rows, size)
            # One row more on each side for the second convolution, one more again to begin at an even row.
            first, last = max(top - 2, 0), min(bottom + 2, size)
            y = _up(up, _rows(x, first // 2 - 1, last // 2 + 1), kernels[0], maps[0], first, last)
            y = _rows(y, top - 1 - first, bottom + 1 - first)
            y = F.conv2d(y, kernels[1], (same.bias * SQRT2).to(dtype), padding=(0, 1))
            y = _finish(same, y, maps[1], top, bottom)
            if keep:
                features[:, :, top:bottom] = y
            colour = F.conv2d(y, colour_kernel).float() + block.torgb.bias[:, None, None]
            if block.torgb.conv_clamp is not None:
                colour.clamp_(-block.torgb.conv_clamp, block.torgb.conv_clamp)
            image[:, :, top:bottom] += colour
    return features, image


def _kernel(layer: SynthesisLayer, w: Tensor) -> Tensor:
    """Gives the kernel (C_out, C_in, 3, 3) of one picture, with style, demodulation and the gain √2."""
    with torch.autocast("cpu", enabled=False):
        style = layer.affine(w.float())  # (1, C_in); float also where autocast has made the codes bfloat16
        kernel = layer.weight * style[:, :, None, None]  # (C_out, C_in, 3, 3)
        demodulation = (kernel.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).rsqrt()
        return kernel * (demodulation * SQRT2)


def _rows(x: Tensor, top: int, bottom: int) -> Tensor:
    """Cuts rows out of features (1, C, H, W); those beyond the edges are zero."""
    above, below = max(-top, 0), max(bottom - x.shape[2], 0)
    cut = x[:, :, top + above : bottom - below]
    return F.pad(cut, (0, 0, above, below)) if above or below else cut


def _up(layer: SynthesisLayer, x: Tensor, kernel: Tensor, noise: Tensor | None, top: int, bottom: int) -> Tensor:
    """Computes rows [top, bottom), both even, of an upsampling layer, from rows top/2 − 1 … bottom/2 of its input."""
    x = F.conv_transpose2d(x, kernel, stride=2, padding=(1, 0))  # rows top − 1 … bottom + 1
    taps = layer.upsampling_filter.to(x.dtype).expand(x.shape[1], 1, 4, 4)
    x = F.conv2d(x, taps, (layer.bias * SQRT2).to(x.dtype), padding=(0, 1), groups=x.shape[1])
    return _finish(layer, x, noise, top, bottom)


def _finish(layer: SynthesisLayer, x: Tensor, noise: Tensor | None, top: int, bottom: int) -> Tensor:
    """Adds the noise of these rows, activates and clamps, in place."""
    if noise is not None:
        x.add_(noise[:, :, top:bottom])
    F.leaky_relu_(x, 0.2)
    if layer.conv_clamp is not None:
        x.clamp_(-layer.conv_clamp, layer.conv_clamp)
    return x
