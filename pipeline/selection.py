"""Keeps samples that are far apart, for those who want to see how different the answers can be."""

from __future__ import annotations

import dataclasses

import numpy as np

from pipeline.samples import Samples


def select_apart(samples: Samples, k: int) -> Samples:
    """Keeps k of the n samples of one face: the point estimate, then always the one farthest from those that are kept.

    Distances are LPIPS on SqueezeNet. What is kept is no random sample of the posterior any more.
    """
    import torch

    from losses.perceptual import LPIPS

    lpips = LPIPS()
    with torch.inference_mode():
        features = lpips.features(torch.from_numpy(samples.images))
        flat = torch.cat([f.flatten(1) / f[0, 0].numel() ** 0.5 for f in features], dim=1)  # (n, F), d = ‖a − b‖²
        rows = farthest_points(torch.cdist(flat, flat).numpy(), k)
    return dataclasses.replace(
        samples, **{name: getattr(samples, name)[rows] for name in ("images", "ws", "lr_psnr", "residual")}
    )


def farthest_points(distances: np.ndarray, k: int) -> list[int]:
    """Chooses k of n points by their distances (n, n): the first, then always the one farthest from those chosen."""
    chosen = [0]
    nearest = distances[0].copy()
    while len(chosen) < k:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, distances[chosen[-1]])
    return chosen
