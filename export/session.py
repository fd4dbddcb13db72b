"""A bundle that was exported, run by onnxruntime: arrays in, arrays out, no torch.

    models = load_models("exported")
    images, ws = models.upsample(lr, k=4)  # lr (B, 3, s, s) in [-1, 1] -> (B, 4, 3, R, R), (B, 4, L, D)

Random numbers come from numpy as in `models.encoder`, so that the same seed gives the same faces as with torch. Where
the bundle has learned feedback, its passes follow the encoder, see `export.passes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime
from data.sampling import check_sampling

from data.taps import resize
from export.metadata import ENCODER, FEEDBACK, GENERATOR, Metadata, from_props
from export.passes import ROWS, feedback_inputs, take_passes

CPU = "CPUExecutionProvider"
_ERRORS_ONLY = 3  # severity; the default warns that the noise maps, being inputs, cannot be folded


@dataclass(frozen=True)
class Models:
    """An encoder and the generator that it was made for, as ONNX models; and learned feedback between them.

    Attributes:
        about: What their files say.
        encoder: From LR faces on the canvas to codes.
        generator: From codes to faces.
        feedback: From faces and codes to better codes; None where the bundle has none.
    """

    about: Metadata
    encoder: onnxruntime.InferenceSession = field(repr=False)
    generator: onnxruntime.InferenceSession = field(repr=False)
    feedback: onnxruntime.InferenceSession | None = field(default=None, repr=False)

    def encode(
        self,
        lr: np.ndarray,
        k: int = 1,
        rng: np.random.Generator | None = None,
        passes: int | None = None,
        temperature: float = 1.0,
    ) -> np.ndarray:
        """Finds codes of faces that downscale to the pictures.

        Args:
            lr: Low-resolution faces (B, 3, s, s) in [-1, 1], s within `about.lr_sizes`.
            k: Candidates per face, at least 1; the first is the best guess, and does not depend on k.
            rng: Source of the others' randomness; a fixed seed if None.
            passes: Passes of learned feedback; None means what the bundle takes by default.
            temperature: How far the others lie from the best guess; 1 is as far as the encoder is unsure.

        Returns:
            Codes (B, k, L, D), float32.

        Raises:
            ValueError: If the pictures are not of this form or size, k is below 1, there is no feedback to take passes
                of, or what comes out is not finite.
        """
        return self._encode(lr, k, rng, passes, temperature)[0]

    def _encode(
        self,
        lr: np.ndarray,
        k: int,
        rng: np.random.Generator | None,
        passes: int | None = None,
        temperature: float = 1.0,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Codes as `encode` gives them, and their faces (B, k, 3, R, R) if passes had to draw them."""
        smallest, largest = self.about.lr_sizes
        if lr.ndim != 4 or lr.shape[1] != 3 or lr.shape[2] != lr.shape[3] or not np.issubdtype(lr.dtype, np.floating):
            raise ValueError(f"Expected floating-point faces (B, 3, s, s) in [-1, 1], got {lr.dtype} {lr.shape}.")
        if not smallest <= lr.shape[-1] <= largest:
            raise ValueError(f"Expected faces of {smallest} to {largest} px, got {lr.shape[-1]} px; resize them first.")
        if k < 1:
            raise ValueError(f"Expected at least 1 candidate per face, got k = {k}.")
        if not np.isfinite(lr).all():
            raise ValueError("Expected faces in [-1, 1], got NaN or infinite values; look at where they were made.")
        check_sampling(passes, temperature)
        sizes = np.full(len(lr), lr.shape[-1], np.float32)
        rng = np.random.default_rng(0) if rng is None else rng
        noise = rng.standard_normal((len(lr), k - 1, self.about.noise_dim), dtype=np.float32)
        ws = self.encode_canvas(resize(lr, self.about.canvas), sizes, noise)  # (B, k, L, D)
        ws[:, 1:] += (np.float32(temperature) - 1) * (ws[:, 1:] - ws[:, :1])
        passes = self.about.passes if passes is None else passes
        return self._take_passes(lr.astype(np.float32, copy=False), ws, passes) if passes else (ws, None)

    def _take_passes(self, lr: np.ndarray, ws: np.ndarray, passes: int) -> tuple[np.ndarray, np.ndarray]:
        """Takes passes of feedback on candidates (B, k, L, D) of LR faces (B, 3, s, s); gives their faces as well."""
        targets, rows = lr.repeat(ws.shape[1], axis=0), ws.reshape(-1, *ws.shape[2:])
        starts = range(0, len(rows), ROWS)
        parts = [
            take_passes(self.correct, self.generate, targets[i : i + ROWS], rows[i : i + ROWS], passes) for i in starts
        ]
        ws, images = (
            np.concatenate(arrays).reshape(*ws.shape[:2], *arrays[0].shape[1:]) for arrays in zip(*parts, strict=True)
        )
        return ws, images

    def correct(self, lr: np.ndarray, images: np.ndarray, ws: np.ndarray) -> np.ndarray:
        """Corrects codes by what their faces, downscaled, lack of the LR pictures: one pass of the learned feedback.

        Args:
            lr: LR faces (B, 3, s, s) in [-1, 1].
            images: The faces that the codes draw (B, 3, R, R), about [-1, 1].
            ws: The codes (B, L, D).

        Returns:
            Better codes (B, L, D).

        Raises:
            ValueError: If there is no feedback, or what comes out is not finite.
        """
        self._check_feedback()
        return self.correct_canvas(feedback_inputs(lr, images, ws, self.about.feedback_canvas))

    def correct_canvas(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Runs one pass of the feedback on faces of any sizes, brought to its canvas.

        Args:
            inputs: See `export.passes.feedback_inputs`.

        Returns:
            Better codes (B, L, D).

        Raises:
            ValueError: If there is no feedback, or what comes out is not finite.
        """
        moved = self._check_feedback().run(["moved"], inputs)[0]
        self._check_weights("feedback", moved)
        return moved

    def encode_canvas(self, canvas: np.ndarray, sizes: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Runs the encoder on faces of any sizes, brought to its canvas.

        Args:
            canvas: Faces (B, 3, C, C) in [-1, 1].
            sizes: The size in pixels that each had before (B,), float32.
            noise: Standard normal (B, k − 1, E), E = `about.noise_dim`.

        Returns:
            Codes (B, k, L, D), before any pass of feedback.

        Raises:
            ValueError: If what comes out is not finite.
        """
        inputs = {"canvas": canvas, "lr_size": sizes, "noise": noise}
        if noise.shape[1] == 0:  # not every execution provider takes empty arrays
            inputs["noise"] = np.zeros((len(canvas), 1, self.about.noise_dim), np.float32)
            ws = self.encoder.run(["best"], inputs)[0][:, None]
        else:
            ws = self.encoder.run(["ws"], inputs)[0]
        self._check_weights("encoder", ws)
        return ws

    def generate(self, ws: np.ndarray, noise: Sequence[np.ndarray] | None = None) -> np.ndarray:
        """Draws the faces of codes.

        Args:
            ws: Codes (B, L, D), or (B, k, L, D) for k candidates each.
            noise: Maps (B or 1, 1, H, W) per layer, coarse to fine, in place of the stored ones; B counts candidates.

        Returns:
            Faces (B, 3, R, R), or (B, k, 3, R, R), float32, about [-1, 1] but not clamped.

        Raises:
            ValueError: If the codes do not have such a shape, or they or the faces are not finite.
        """
        wanted = (self.about.num_ws, self.about.w_dim)
        if ws.ndim not in (3, 4) or ws.shape[-2:] != wanted:
            raise ValueError(f"Expected codes (B, {wanted[0]}, {wanted[1]}), or (B, k, …), got {ws.shape}.")
        if not np.isfinite(ws).all():
            raise ValueError("Expected finite codes, got NaN or infinite values; look at where they were made.")
        inputs = {"ws": ws.reshape(-1, *wanted).astype(np.float32, copy=False)}
        inputs |= {f"noise_{i}": np.asarray(maps, np.float32) for i, maps in enumerate(noise or ())}
        images = self.generator.run(["images"], inputs)[0]
        self._check_weights("generator", images)
        return images.reshape(*ws.shape[:-2], *images.shape[1:])

    def upsample(
        self,
        lr: np.ndarray,
        k: int = 4,
        *,
        rng: np.random.Generator | None = None,
        passes: int | None = None,
        temperature: float = 1.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draws k faces for each low-resolution face: `generate(encode(lr, k, rng, passes, temperature))`.

        Args:
            lr: Low-resolution faces (B, 3, s, s) in [-1, 1].
            k: Candidates per face.
            rng: See `encode`.
            passes: See `encode`.
            temperature: See `encode`.

        Returns:
            Faces (B, k, 3, R, R), about [-1, 1] but not clamped, and their codes (B, k, L, D).

        Raises:
            ValueError: See `encode`.
        """
        ws, images = self._encode(lr, k, rng, passes, temperature)
        return self.generate(ws) if images is None else images, ws

    def _check_feedback(self) -> onnxruntime.InferenceSession:
        if self.feedback is None:
            raise ValueError(f"Expected models with learned feedback, {self.about.name!r} has none; take 0 passes.")
        return self.feedback

    def _check_weights(self, network: str, output: np.ndarray) -> None:
        """Refuses what is not finite: as bytes it would pass for a picture."""
        if not np.isfinite(output).all():
            raise ValueError(
                f"the {network} gives NaN or infinite values: its weights are broken; "
                f"export the bundle {self.about.name!r} again"
            )


def find_provider(name: str) -> str:
    """Finds an execution provider of the installed onnxruntime by its name or its short form, such as "cuda".

    Args:
        name: In any case, with or without "ExecutionProvider".

    Returns:
        Its full name.

    Raises:
        ValueError: If the installed onnxruntime has none of this name.
    """
    available = {_short(provider): provider for provider in onnxruntime.get_available_providers()}
    if _short(name) not in available:
        raise ValueError(
            f"expected one of {', '.join(available)}, got {name!r}; others come with other packages of onnxruntime, "
            "such as onnxruntime-gpu"
        )
    return available[_short(name)]


def _short(provider: str) -> str:
    return provider.lower().removesuffix("executionprovider")


def load_models(folder: str | Path, threads: int = 0, provider: str = "cpu") -> Models:
    """Opens what `python -m export.onnx` wrote.

    Args:
        folder: With encoder.onnx and generator.onnx, and feedback.onnx where the bundle has learned feedback.
        threads: Of one operation; 0 means one per core.
        provider: See `find_provider`. What it cannot do, the CPU does.

    Returns:
        The models.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, none of ours, or the two do not belong together.
    """
    folder = Path(folder)
    chosen = find_provider(provider)
    sessions = [_open(folder / name, threads, chosen) for name in (ENCODER, GENERATOR)]
    first = _about(sessions[0], folder / ENCODER)
    names = [ENCODER, GENERATOR]
    if first.feedback_canvas:
        names.append(FEEDBACK)
        sessions.append(_open(folder / FEEDBACK, threads, chosen))
    for session, name in zip(sessions, names, strict=True):
        about = _about(session, folder / name)
        if about.bundle_sha256 != first.bundle_sha256:
            raise ValueError(
                f"{folder}: expected models of one bundle, found those of {first.name} ({first.bundle_sha256}) and "
                f"{about.name} ({about.bundle_sha256}); export them together."
            )
    return Models(first, *sessions)


def _about(session: onnxruntime.InferenceSession, path: Path) -> Metadata:
    about = from_props(session.get_modelmeta().custom_metadata_map, str(path))
    if f"{about.role}.onnx" != path.name:
        raise ValueError(f"{path}: expected this model, found the {about.role}; export it again.")
    return about


def _open(path: Path, threads: int, provider: str) -> onnxruntime.InferenceSession:
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected a model at {path}, found no such file; python -m export.onnx --out {path.parent} makes it."
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = _ERRORS_ONLY
    # Encoder, feedback and generator take turns: threads that wait busily for more work of the one that is done would
    # take the processor from the next, and halve the speed of all.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers: list[str | tuple[str, dict[str, str]]] = [CPU]
    if provider != CPU:
        # TF32 has the mantissa of float16, and would change pixels.
        providers.insert(0, (provider, {"use_tf32": "0"}) if provider == "CUDAExecutionProvider" else provider)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime has a dozen exceptions of its own, without a common base
        raise ValueError(f"{path}: onnxruntime cannot open it ({error}); export the bundle again.") from error
