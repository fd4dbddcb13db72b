"""The pipeline in onnxruntime: one exported graph does all of it. Nothing here needs torch."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data.files import ROOT
from data.image_io import from_uint8, to_uint8
from data.noise import face_noise
from export.onnxruntime_backend import FORMAT
from export.onnxruntime_backend import OnnxBackend as Model
from pipeline.about import About
from pipeline.samples import Samples
from pipeline.wanted import Wanted

if TYPE_CHECKING:
    from search.loop import Callback, SearchResult
    from search.plan import SearchPlan
CACHE = ROOT / ".cache" / "onnx"
_log = logging.getLogger(__name__)


class OnnxBackend:
    """A bundle that was exported.

    Args:
        path: A model, or a bundle's folder, which is exported at the first call; see `find_model`.
        provider: Execution provider of onnxruntime, such as "cpu" or "cuda".

    Raises:
        FileNotFoundError: If there is neither.
        ValueError: If one is damaged, or there is no such provider.
    """

    def __init__(self, path: str | Path, provider: str = "cpu") -> None:
        self.model = Model(find_model(Path(path)), provider)
        about = self.model.about
        self.about = About(
            name=about.name,
            hash=about.bundle_sha256,
            resolution=about.resolution,
            lr_sizes=about.lr_sizes,
            device=self.model.provider.removesuffix("ExecutionProvider").lower(),
            generator_sha256=about.generator_sha256,
            styles=(about.num_ws, about.w_dim),
        )

    def sample(self, lr: np.ndarray, wanted: Wanted) -> Samples:
        """Samples faces for inputs (B, 3, s, s) in [-1, 1]."""
        noise = face_noise(lr, wanted.k, self.model.about.noise_dim, wanted.seed)
        how = wanted.fidelity, wanted.noise_sigma, wanted.edit, wanted.preserve_lr
        found = self.model.sample(lr, noise, *how)
        return Samples(from_uint8(to_uint8(found.images)), found.ws, found.lr_psnr, found.residual, found.sigma)

    def search(
        self, lr: np.ndarray, wanted: Wanted, plan: SearchPlan, callback: Callback | None = None
    ) -> tuple[Samples, SearchResult]:
        """Refuses: a search needs gradients.

        Raises:
            ValueError: Always.
        """
        raise ValueError("Expected the runtime torch for a search, which needs gradients; got onnx.")


def find_model(path: Path, cache: Path = CACHE) -> Path:
    """Finds the model of a bundle, and exports it at the first call, which needs torch.

    Args:
        path: A model, a folder with an upsampler.onnx, or a bundle's folder.
        cache: Where models of bundles are kept.

    Raises:
        FileNotFoundError: If there is nothing of the kind.
        ValueError: If the bundle cannot be exported.
    """
    for candidate in (path, path / "upsampler.onnx"):
        if candidate.is_file():
            return candidate
    info = path / "bundle.json"
    if not info.is_file():
        raise FileNotFoundError(
            f"Expected a model or a bundle at {path}, found neither upsampler.onnx nor bundle.json."
        )
    found = cache / f"{FORMAT.rpartition('/')[2]}-{hashlib.sha256(info.read_bytes()).hexdigest()[:16]}.onnx"
    if not found.is_file():
        from export.onnx import write_model

        _log.info("exporting %s to ONNX, once", path)
        write_model(path, found, overwrite=True)  # another process may have been faster
    return found
