"""Whether an exported model computes what torch computes: the largest difference over sizes, batches and options."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data.operator import Downscale, back_project
from editing.apply import edited_target
from export.onnxruntime_backend import OnnxBackend
from export.quantise import FP16, FP32, INT8
from models.bundle import Bundle
from models.encoder_base import Encoding

CASES = ((1, 1), (2, 3), (5, 2))  # faces and samples of each
# Of 255, root mean square over all pictures: what an 8-bit file cannot show, and what nobody sees.
PIXELS_ALLOWED = {FP32: 0.05, FP16: 0.1, INT8: 2.0}


@torch.inference_mode()
def upsample(
    bundle: Bundle, lr: Tensor, noise: Tensor, fidelity: float, sigma: Tensor, edit: Tensor, preserve_lr: bool
) -> tuple[Tensor, Tensor]:
    """Computes in torch what `export.graph.UpsamplerGraph` computes: images (B, k, 3, R, R) and codes (B, k, L, D)."""
    k = noise.shape[1]
    encoding = bundle.encoder(lr, noise, sigma)
    edited = Encoding(encoding.ws + edit[:, None], encoding.details)
    raw, start = (bundle.generate(e).flatten(0, 1) for e in (encoding, edited))
    target = lr.repeat_interleave(k, dim=0)
    goal = target if preserve_lr else edited_target(target, raw, start)
    images = back_project(start, goal, fidelity, bundle.encoder.noise_ratio(sigma).repeat_interleave(k))
    return images.unflatten(0, (-1, k)), edited.ws


def differences(bundle: Bundle, backend: OnnxBackend, seed: int = 0) -> dict[str, float]:
    """Compares an exported model with its bundle on the CPU, on faces, noise and edits of a seed.

    Returns:
        "pixels" and "pixels_rms", the largest difference of images and its root mean square, of 255; "ws", the largest
        difference of codes.
    """
    rng = torch.Generator().manual_seed(seed)
    about, pixels, ws = backend.about, [], [0.0]
    smallest, largest = bundle.lr_sizes
    for (batch, k), size in zip(CASES, (smallest, min(16, largest), largest), strict=True):
        with torch.inference_mode():
            z = torch.randn(batch, bundle.generator.z_dim, generator=rng)
            lr = Downscale(size)(bundle.generate(bundle.generator.mapping(z)).clamp(-1, 1))
        noise = torch.randn(batch, k, about.noise_dim, generator=rng)
        edit = torch.randn(batch, about.num_ws, about.w_dim, generator=rng) * 0.1
        for fidelity, sigma, strength, preserve in ((1.0, 0.0, 0, False), (0.5, 10.0, 1, False), (1.0, 10.0, 1, True)):
            noisy = torch.full((batch,), sigma)
            wanted = upsample(bundle, lr, noise, fidelity, noisy, edit * strength, preserve)
            arrays = (lr.numpy(), noise.numpy(), fidelity, sigma, (edit * strength).numpy(), preserve)
            got = backend.sample(*arrays)
            pixels.append(np.abs(wanted[0].numpy() - got.images).ravel() * 127.5)
            ws.append(float(np.abs(wanted[1].numpy() - got.ws).max()))
    every = np.concatenate(pixels)
    return {"pixels": float(every.max()), "pixels_rms": float(np.sqrt(np.square(every).mean())), "ws": max(ws)}


def check(found: dict[str, float], precision: str) -> None:
    """Refuses a model whose `differences` exceed `PIXELS_ALLOWED`.

    Raises:
        ValueError: If they do, or are not finite.
    """
    allowed = PIXELS_ALLOWED[precision]
    if not found["pixels_rms"] <= allowed:
        raise ValueError(
            f"Expected the exported model to differ from torch by at most {allowed:g} of 255 (root mean square), found "
            f"{found['pixels_rms']:.3g}; nothing was written. Report it with the versions of torch and onnxruntime."
        )
