"""The pipeline in torch: encode, synthesize, project."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.operator import Downscale, back_project
from editing.apply import edited_target
from models.bundle import Bundle, load_bundle
from models.device import choose_device, use_deterministic_kernels
from pipeline.about import About
from pipeline.samples import Samples, psnr
from pipeline.wanted import Wanted
from search.loop import Callback, SearchResult
from search.plan import SearchPlan
from search.samples import find_samples, synthesize


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
        self.about = About(
            name=bundle.name,
            hash=bundle.hash,
            resolution=bundle.resolution,
            lr_sizes=bundle.lr_sizes,
            device=bundle.device.type,
            generator_sha256=bundle.info["parts"]["generator.safetensors"],
            styles=(bundle.generator.num_ws, bundle.generator.w_dim),
        )

    def sample(self, lr: np.ndarray, wanted: Wanted) -> Samples:
        """Samples faces for inputs (B, 3, s, s) in [-1, 1]."""
        y = torch.from_numpy(lr)
        sigma = self.noise_level(y, wanted.noise_sigma)
        encoding = self.bundle.encode(y, wanted.k, wanted.seed, sigma)
        edited = None
        if wanted.edit is not None:
            edited = encoding._replace(ws=encoding.ws + torch.from_numpy(wanted.edit).to(encoding.ws))
        raw = self.bundle.generate(encoding)
        made = raw if edited is None else self.bundle.generate(edited)
        return self._finish(y, (edited or encoding).ws, raw, made, wanted, sigma)

    def search(
        self, lr: np.ndarray, wanted: Wanted, plan: SearchPlan, callback: Callback | None = None
    ) -> tuple[Samples, SearchResult]:
        """Searches for samples, and edits, projects and measures what was found; see `Backend.search`."""
        y, k = torch.from_numpy(lr), wanted.k
        sigma = self.noise_level(y, wanted.noise_sigma)
        found = find_samples(self.bundle, y, k, plan, callback, sigma)
        offset = None if wanted.edit is None else torch.from_numpy(wanted.edit)
        raw = synthesize(self.bundle, found).unflatten(0, (-1, k))
        made = raw if offset is None else synthesize(self.bundle, found, offset).unflatten(0, (-1, k))
        ws = found.ws if offset is None else found.ws + offset.to(found.ws)
        return self._finish(y, ws.unflatten(0, (-1, k)), raw, made, wanted, sigma), found

    @torch.inference_mode()
    def noise_level(self, lr: Tensor, known: float | None = None) -> Tensor:
        """Estimates the noise in faces (B, 3, s, s), in grey levels (B,), unless it is known."""
        self.bundle.check_faces(lr)
        if known is not None:
            return torch.full((len(lr),), float(known))
        return self.bundle.encoder.noise_level(lr.to(self.bundle.device)).cpu()

    @torch.inference_mode()
    def _finish(self, lr: Tensor, ws: Tensor, raw: Tensor, made: Tensor, wanted: Wanted, sigma: Tensor) -> Samples:
        """Projects faces, rounds them to 8 bits and measures them.

        Args:
            lr: Low-resolution faces (B, 3, s, s) in [-1, 1].
            ws: Their codes (B, k, L, D).
            raw: The generator's faces before any edit (B, k, 3, R, R).
            made: The faces that are wanted (B, k, 3, R, R), `raw` itself where nothing was edited.
            wanted: What is wanted.
            sigma: Noise of the inputs in grey levels (B,).
        """
        k, operator = raw.shape[1], Downscale(lr.shape[-1])
        target = lr.to(raw).repeat_interleave(k, dim=0)
        ratio = self.bundle.noise_ratio(sigma)
        how = wanted.fidelity, None if ratio is None else ratio.repeat_interleave(k)
        before, images = raw.flatten(0, 1), made.flatten(0, 1)
        goal = target if made is raw or wanted.preserve_lr else edited_target(target, before, images)
        images = back_project(images, goal, *how)
        images = ((images + 1) * 127.5).round() / 127.5 - 1
        errors = [((operator(x) - target) / 2).square().mean(dim=(1, 2, 3)).view(-1, k) for x in (images, before)]
        final, residual = (error.cpu().numpy() for error in errors)
        return Samples(
            images.unflatten(0, (-1, k)).cpu().numpy(), ws.cpu().numpy(), psnr(final), residual, sigma.numpy()
        )
