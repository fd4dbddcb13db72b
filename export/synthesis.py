"""The synthesis network in the form that is exported: the same images, with fewer passes over the features.

Most of onnxruntime's time is that of its convolutions, which leave little to gain. Between them come passes over the
features, and copies into and out of the convolutions' layout; here are fewer of both:

- bias and noise become one map before they meet the features, which is small next to those of a batch;
- the styles of a colour output scale its 3 x C kernel in place of the C features, and its 1x1 convolution is a matrix
  product, which takes the features as they lie.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from models.generator import SynthesisNetwork
from models.layers import SQRT2, SynthesisLayer, ToRGB, upsample_2x


def synthesize(synthesis: SynthesisNetwork, ws: Tensor, details: Mapping[int, Tensor]) -> Tensor:
    """Synthesizes what `SynthesisNetwork.forward` does with its stored noise maps; same arguments, same images."""
    codes = ws.unbind(dim=1)
    x = synthesis.blocks[0].const.expand(ws.shape[0], -1, -1, -1)
    rgb: Tensor | None = None
    used = 0  # codes; that of a colour output is also that of the next block's first layer
    for size, block in zip(synthesis.resolutions, synthesis.blocks, strict=True):
        for layer in block.layers:
            x = _features(layer, x, codes[used])
            used += 1
        x = x + details[size] if size in details else x
        y = _colour(block.torgb, x, codes[used])
        rgb = y if rgb is None else upsample_2x(rgb, block.upsampling_filter) + y
    assert rgb is not None
    return rgb


def _features(layer: SynthesisLayer, x: Tensor, w: Tensor) -> Tensor:
    """Computes the next features (B, C_out, H', W'), see `SynthesisLayer.forward`."""
    x, demodulation = layer.modulate(x, w)
    shift = layer.noise_const * (layer.noise_strength * SQRT2) + (layer.bias * SQRT2)[:, None, None]  # (C_out, H', W')
    return _clamp(F.leaky_relu(x * demodulation + shift, 0.2), layer.conv_clamp)


def _colour(torgb: ToRGB, x: Tensor, w: Tensor) -> Tensor:
    """Maps features (B, C, H, W) to colour (B, 3, H, W), see `ToRGB.forward`."""
    y = (torgb.kernels(w) @ x.flatten(2)).unflatten(2, x.shape[2:]) + torgb.bias[:, None, None]
    return _clamp(y, torgb.conv_clamp)


def _clamp(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else x.clamp(-limit, limit)
