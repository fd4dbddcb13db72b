"""The synthesis network in the form that is exported: the same images, with fewer passes over the features.

Most of onnxruntime's time is that of its convolutions, which leave little to gain. Between them come passes over the
features, and copies into and out of the convolutions' layout; here are fewer of both:

- bias and noise become one map before they meet the features, which for noise that all images share is small beside
  those of a batch;
- the styles of a colour output scale its 3 x C kernel in place of the C features, and its 1x1 convolution is a matrix
  product, which takes the features as they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from models.generator import SynthesisLayer, SynthesisNetwork, ToRGB
from models.layers import SQRT2, upsample_2x


def draw(synthesis: SynthesisNetwork, ws: Tensor, noise: Sequence[Tensor]) -> Tensor:
    """Draws what `SynthesisNetwork.forward` draws.

    Args:
        synthesis: The network.
        ws: Style codes (B, L, D).
        noise: One map (B or 1, 1, H, W) per layer, coarse to fine.

    Returns:
        Images (B, 3, R, R), about [-1, 1] but not clamped.
    """
    codes, maps = ws.unbind(dim=1), iter(noise)
    x = synthesis.blocks[0].const.expand(ws.shape[0], -1, -1, -1)
    rgb: Tensor | None = None
    used = 0  # codes; that of a colour output is also that of the next block's first layer
    for block in synthesis.blocks:
        for layer in block.layers:
            x = _features(layer, x, codes[used], next(maps))
            used += 1
        y = _colour(block.torgb, x, codes[used])
        rgb = y if rgb is None else upsample_2x(rgb, block.upsampling_filter) + y
    assert rgb is not None
    return rgb


def _features(layer: SynthesisLayer, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
    """Draws the next features (B, C_out, H', W'), see `SynthesisLayer.forward`."""
    x, demodulation = layer.modulate(x, w)
    shift = noise * (layer.noise_strength * SQRT2) + (layer.bias * SQRT2)[:, None, None]  # (B or 1, C_out, H', W')
    return _clamp(F.leaky_relu(x * demodulation + shift, 0.2), layer.conv_clamp)


def _colour(torgb: ToRGB, x: Tensor, w: Tensor) -> Tensor:
    """Maps features (B, C, H, W) to colour (B, 3, H, W), see `ToRGB.forward`."""
    y = (torgb.kernels(w) @ x.flatten(2)).unflatten(2, x.shape[2:]) + torgb.bias[:, None, None]
    return _clamp(y, torgb.conv_clamp)


def _clamp(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else x.clamp(-limit, limit)
