"""The pipeline in torch: encode, synthesize, project."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.operator import Downscale, back_project
from models.bundle import Bundle, load_bundle
from models.determinism import use_deterministic_kernels
from models.device import choose_device
from models.encoder_base import Encoding
from pipeline.about import About
from pipeline.samples import Samples, psnr


class TorchBackend:
    """A bundle on a device.

    Args:
        path: The bundle's folder.
        device: "auto", "cpu", "cuda", "cuda:1" …, or "mps".
        precision: "float32", or "bf16" for an encoder that computes in bfloat16.

    Raises:
        FileNotFoundError: If a part of the bundle is missing.
        ValueError: If the bundle is damaged, or there is no such device.
    """

    def __init__(self, path: str | Path, device: str = "auto", precision: str = "float32") -> None:
        use_deterministic_kernels()  # the same command is to write the same bytes
        self.bundle: Bundle = load_bundle(path, choose_device(device), precision)
        bundle = self.bundle
        self.about = About(bundle.name, bundle.hash, bundle.resolution, bundle.lr_sizes, bundle.device.type)

    def sample(self, lr: np.ndarray, k: int, seed: int, fidelity: float, sigma: np.ndarray | None) -> Samples:
        """Samples k faces for each input; see `pipeline.Upsampler.__call__`."""
        y = torch.from_numpy(lr)
        level = self.noise_level(y) if sigma is None else torch.from_numpy(sigma)
        encoding = self.bundle.encode(y, k, seed, level)
        return self.finish(y, encoding, self.bundle.generate(encoding), fidelity, level)

    @torch.inference_mode()
    def noise_level(self, lr: Tensor) -> Tensor:
        """Estimates the noise in faces (B, 3, s, s), in grey levels (B,)."""
        self.bundle.check_faces(lr)
        return self.bundle.encoder.noise_level(lr.to(self.bundle.device)).cpu()

    @torch.inference_mode()
    def finish(self, lr: Tensor, encoding: Encoding, raw: Tensor, fidelity: float, sigma: Tensor) -> Samples:
        """Projects faces onto their inputs, rounds them to 8 bits and measures them.

        Args:
            lr: Low-resolution faces (B, 3, s, s) in [-1, 1].
            encoding: Where the faces come from.
            raw: The generator's faces (B, k, 3, R, R).
            fidelity: λ of `data.operator.back_project`.
            sigma: Noise of the inputs in grey levels (B,).

        Returns:
            The samples, as arrays.
        """
        k, operator = raw.shape[1], Downscale(lr.shape[-1])
        target = lr.to(raw).repeat_interleave(k, dim=0)
        ratio = self.bundle.noise_ratio(sigma)
        rows = raw.flatten(0, 1)
        images = back_project(rows, target, fidelity, None if ratio is None else ratio.repeat_interleave(k))
        images = ((images + 1) * 127.5).round() / 127.5 - 1
        errors = [((operator(x) - target) / 2).square().mean(dim=(1, 2, 3)).view(-1, k) for x in (images, rows)]
        final, before = (error.cpu().numpy() for error in errors)
        return Samples(
            images.unflatten(0, (-1, k)).cpu().numpy(), encoding.ws.cpu().numpy(), psnr(final), before, sigma.numpy()
        )
