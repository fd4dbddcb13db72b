"""The exported graph run by onnxruntime: arrays in, arrays out. Needs onnxruntime and numpy, no torch.

Example:
    >>> backend = OnnxBackend("upsampler.onnx")
    >>> samples = backend.sample(lr, face_noise(lr, 4, backend.about.noise_dim, seed=0))  # lr (B, 3, s, s) in [-1, 1]
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime

FORMAT = "amortized-pulse/onnx/2"
CPU = "CPUExecutionProvider"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelInfo:
    """What an exported model says of itself."""

    name: str
    bundle_sha256: str  # the bundle's hash
    generator_sha256: str  # by which edit directions know it
    licence: str  # what the weights may be used for
    training_data: str
    resolution: int  # size R of the samples in pixels
    lr_sizes: tuple[int, int]  # smallest and largest size in pixels of the inputs
    noise_dim: int  # width E of the noise of one sample
    num_ws: int  # number of styles L
    w_dim: int  # width D of a style
    edits: tuple[str, ...]  # names of the bundle's edit directions


class OnnxSamples(NamedTuple):
    """What the graph gives, see `export.graph.UpsamplerGraph`."""

    images: np.ndarray  # faces (B, k, 3, R, R) in [-1, 1], not yet rounded to 8 bit
    ws: np.ndarray  # style codes (B, k, L, D)
    lr_psnr: np.ndarray  # of the 8-bit pictures, in dB (B, k)
    residual: np.ndarray  # mean square of y − D(G(w)) on [0, 1] before the projection (B, k)
    sigma: np.ndarray  # noise of the inputs as it was used, in grey levels (B,)


class OnnxBackend:
    """An exported model.

    Args:
        path: What `python -m export.onnx` wrote.
        provider: Execution provider of onnxruntime by its name or its short form, such as "cuda".
        threads: Of one operation; 0 means one per core.

    Attributes:
        about: What the model says of itself.
        provider: The execution provider that runs: the one asked for, or the CPU's where that one cannot start.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or none of ours, or the installed onnxruntime has no such provider.
    """

    def __init__(self, path: str | Path, provider: str = "cpu", threads: int = 0) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"Expected a model at {path}, found no such file; python -m export.onnx makes it.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3  # errors alone
        asked = find_provider(provider)
        providers: list[Any] = [CPU]
        if asked == "CUDAExecutionProvider":  # TF32 has the mantissa of float16, and would change pixels
            providers.insert(0, (asked, {"use_tf32": "0"}))
        elif asked != CPU:
            providers.insert(0, asked)
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers)
        except Exception as error:  # onnxruntime has a dozen exceptions of its own, without a common base
            raise ValueError(f"{path}: onnxruntime cannot open it ({error}); export the bundle again.") from error
        self.provider = self._session.get_providers()[0]
        if self.provider != asked:
            _log.warning("%s cannot start here; %s runs in its place", asked, self.provider)
        self.about = read_info(self._session.get_modelmeta().custom_metadata_map, path)

    def sample(
        self,
        lr: np.ndarray,
        noise: np.ndarray,
        fidelity: float | np.ndarray = 1.0,
        sigma: float | np.ndarray | None = None,
        edit: np.ndarray | None = None,
        preserve_lr: bool = False,
    ) -> OnnxSamples:
        """Samples k faces for each input.

        Args:
            lr: Low-resolution faces (B, 3, s, s) in [-1, 1].
            noise: Noise (B, k, E), see `data.noise.face_noise`.
            fidelity: λ of `data.operator.back_project`, for all or for each (B,).
            sigma: Standard deviation of the noise in the inputs in grey levels, for all or for each (B,); None or a
                negative one to estimate it.
            edit: What is added to the styles, see `editing.direction.EditPlan.offset`, (L, D) or (B, L, D); None for no
                edit.
            preserve_lr: Whether edited faces are to downscale to the input, too.

        Returns:
            The samples.

        Raises:
            ValueError: If an array is not of such a form, or what comes out is not finite.
        """
        self._check(lr, noise)
        batch = len(lr)
        styles = (batch, self.about.num_ws, self.about.w_dim)
        inputs = {
            "lr": lr.astype(np.float32, copy=False),
            "noise": noise.astype(np.float32, copy=False),
            "fidelity": _each(fidelity, (batch,)),
            "sigma": _each(-1.0 if sigma is None else sigma, (batch,)),
            "edit": _each(0.0 if edit is None else edit, styles),
            "preserve_lr": np.full(batch, preserve_lr),
        }
        samples = OnnxSamples(*self._session.run(None, inputs))
        if not np.isfinite(samples.images).all():
            raise ValueError(
                f"{self.about.name!r} gives NaN or infinite values: its weights are broken; export it anew."
            )
        return samples

    def _check(self, lr: np.ndarray, noise: np.ndarray) -> None:
        smallest, largest = self.about.lr_sizes
        if lr.ndim != 4 or lr.shape[1] != 3 or lr.shape[2] != lr.shape[3] or not np.issubdtype(lr.dtype, np.floating):
            raise ValueError(f"Expected floating-point faces (B, 3, s, s) in [-1, 1], got {lr.dtype} {lr.shape}.")
        if not smallest <= lr.shape[3] <= largest:
            raise ValueError(f"Expected faces of {smallest} to {largest} px, got {lr.shape[3]} px; resize them first.")
        if not np.isfinite(lr).all():
            raise ValueError("Expected faces in [-1, 1], got NaN or infinite values; look at where they were made.")
        if noise.shape != (len(lr), noise.shape[1], self.about.noise_dim) or not noise.shape[1]:
            raise ValueError(f"Expected noise ({len(lr)}, k, {self.about.noise_dim}), got {noise.shape}.")


def _each(value: float | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(np.asarray(value, np.float32), shape))


def read_info(props: dict[str, str], path: str | Path) -> ModelInfo:
    """Reads the metadata of a model; ValueError if it is none of ours, or of another version."""
    if props.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected a model of the format {FORMAT!r}, found {props.get('format')!r}; make it anew with "
            "python -m export.onnx."
        )
    values: dict[str, Any] = {}
    for f in fields(ModelInfo):
        value = props[f.name] if f.type == "str" else json.loads(props[f.name])
        values[f.name] = tuple(value) if isinstance(value, list) else value
    return ModelInfo(**values)


def find_provider(name: str) -> str:
    """Finds an execution provider of the installed onnxruntime by its name or its short form, such as "cuda"."""
    suffix = "executionprovider"
    available = {p.lower().removesuffix(suffix): p for p in onnxruntime.get_available_providers()}
    short = name.lower().removesuffix(suffix)
    if short not in available:
        raise ValueError(
            f"Expected one of the providers {', '.join(available)}, got {name!r}; others come with other packages of "
            "onnxruntime, such as onnxruntime-gpu."
        )
    return available[short]
