"""The upsampler: low-resolution faces in, k samples for each out, in torch or onnxruntime."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from models.bundle_info import DEFAULT_BUNDLE
from pipeline.about import About
from pipeline.samples import Samples
from pipeline.wanted import Wanted

if TYPE_CHECKING:
    from search.loop import Callback, SearchResult
    from search.plan import SearchPlan

RUNTIMES = ("torch", "onnx")
PIXELS = {"cpu": 2**18, "cuda": 2**24, "mps": 2**22}  # of all samples of a batch


class Backend(Protocol):
    """What runs the networks."""

    about: About

    def sample(self, lr: np.ndarray, wanted: Wanted) -> Samples:
        """Samples faces for inputs (B, 3, s, s)."""
        ...

    def search(
        self, lr: np.ndarray, wanted: Wanted, plan: SearchPlan, callback: Callback | None = None
    ) -> tuple[Samples, SearchResult]:
        """Searches for samples; needs gradients, so torch."""
        ...


class Upsampler:
    """Turns low-resolution faces into k high-resolution ones each.

    Args:
        backend: What runs the networks.

    Example:
        >>> up = Upsampler.from_pretrained("bundles/celeba64")
        >>> samples = up(torch.rand(1, 3, 16, 16) * 2 - 1, k=4)
        >>> samples.images.shape, samples.lr_psnr.shape
        (torch.Size([1, 4, 3, 64, 64]), torch.Size([1, 4]))
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    @property
    def about(self) -> About:
        """What is known of the bundle."""
        return self.backend.about

    @classmethod
    def from_pretrained(
        cls, path: str | Path | None = None, device: str = "auto", runtime: str = "torch", precision: str = "float32"
    ) -> Upsampler:
        """Loads a bundle.

        Args:
            path: The bundle's folder, or with onnx an exported model; the default bundle if None.
            device: "auto", "cpu", "cuda", "cuda:1" …, or "mps"; with onnx an execution provider, the CPU's if "auto".
            runtime: "torch", or "onnx", which needs no torch once the bundle was exported.
            precision: "float32", or "bf16" for an encoder that computes in bfloat16; torch alone.

        Returns:
            The upsampler.

        Raises:
            FileNotFoundError: If a part of the bundle is missing.
            ValueError: If the bundle is damaged, or an option is unknown.
        """
        if runtime not in RUNTIMES:
            raise ValueError(f"Expected the runtime to be one of {', '.join(RUNTIMES)}, got {runtime!r}.")
        path = DEFAULT_BUNDLE if path is None else path
        if runtime == "onnx":
            if precision != "float32":
                raise ValueError(f"Expected the precision float32 with the runtime onnx, got {precision!r}.")
            from pipeline.onnx_backend import (
                OnnxBackend,  # here, as below: each runtime does without the other's library
            )

            return cls(OnnxBackend(path, "cpu" if device == "auto" else device.partition(":")[0]))
        from pipeline.torch_backend import TorchBackend

        return cls(TorchBackend(path, device, precision))

    def __call__(
        self,
        lr: Any,
        k: int = 4,
        seed: int = 0,
        fidelity: float = 1.0,
        noise_sigma: float | None = None,
        edit: np.ndarray | None = None,
        preserve_lr: bool = False,
    ) -> Samples:
        """Samples k faces for each input.

        Args:
            lr: Low-resolution faces (B, 3, s, s) in [-1, 1], an array or a tensor; many go through in parts.
            k: Samples per face, at least 1; the first is the point estimate.
            seed: Of the samples; together with the face it determines them, whatever k and the batch are.
            fidelity: How far each sample is brought to where it downscales to its input, from 0 (the generator's own
                face) to 1 (exactly).
            noise_sigma: Standard deviation of the noise in the inputs in grey levels, which samples need not follow; 0
                for clean inputs, None to estimate it for each.
            edit: What is added to the codes (L, D), such as a sum of edit directions; None for no edit.
            preserve_lr: Whether edited faces are to downscale to the input as well. If not, they take over what the
                unedited ones were corrected by.

        Returns:
            The samples; tensors on the CPU if `lr` is a tensor, else arrays.

        Raises:
            ValueError: If a number is out of range, or the faces are not of such a form or size.
        """
        wanted = Wanted(k, seed, fidelity, noise_sigma, edit, preserve_lr)
        tensor = hasattr(lr, "detach")
        faces = np.ascontiguousarray(lr.detach().cpu().numpy() if tensor else lr, dtype=np.float32)
        size = batch_size(self.about.resolution, k, self.about.device) if faces.ndim == 4 else 0
        parts = [faces[i : i + size] for i in range(0, len(faces), size)] if size else []
        samples = Samples.join([self.backend.sample(part, wanted) for part in parts or [faces]])
        return _as_tensors(samples) if tensor else samples


def bundle_folder(bundle: str | None) -> Path:
    """Finds the folder of a bundle, the default one if None, or the folder that an exported model lies in."""
    path = DEFAULT_BUNDLE if bundle is None else Path(bundle)
    return path.parent if path.is_file() else path


def batch_size(resolution: int, k: int, device: str = "cpu") -> int:
    """Says how many faces go together; it follows from these alone, so that results do not depend on the machine."""
    return max(1, PIXELS.get(device.partition(":")[0], PIXELS["cpu"]) // (k * resolution**2))


def _as_tensors(samples: Samples) -> Samples:
    import torch

    values = {f.name: torch.from_numpy(getattr(samples, f.name)) for f in dataclasses.fields(samples)}
    return Samples(**values)
