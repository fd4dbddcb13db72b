"""Whether exported models compute what torch computes: the largest difference, per model and batch size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data.operator import Downscale
from export.passes import feedback_inputs
from export.session import Models
from models.bundle import Bundle

BATCHES = (1, 2, 5)
SAMPLES = 2  # further candidates for each face
TOLERANCE = 1e-4
TOLERANCE_1024 = 1e-3  # for images of 1024 px, whose layers add up more of the rounding


class ParityError(ValueError):
    """An exported model differs from torch by more than is allowed."""


def tolerances(resolution: int) -> dict[str, float]:
    """Gives the largest difference allowed for each model, for a generator of a resolution."""
    images = TOLERANCE_1024 if resolution >= 1024 else TOLERANCE
    return {"encoder": TOLERANCE, "feedback": TOLERANCE, "generator": images, "generator_with_noise": images}


def largest_differences(bundle: Bundle, models: Models, seed: int = 0) -> dict[str, dict[str, float]]:
    """Compares exported models with their bundle, on faces that the generator draws.

    Args:
        bundle: What was exported, on the CPU.
        models: What came out.
        seed: Of the faces and the noise.

    Returns:
        The largest absolute difference for "encoder" (codes), "generator" and "generator_with_noise" (pixels in units
        of [-1, 1]), by batch size as text; and for "feedback" (codes that one pass moves) where the bundle has it.
        Whole runs of passes are not compared: where a pass neither helps nor harms, rounding decides if it is taken.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, dict[str, float]] = {name: {} for name in tolerances(bundle.resolution)}
    if bundle.encoder.feedback is None:
        del found["feedback"]
    for batch in BATCHES:
        with torch.inference_mode():
            z = torch.from_numpy(rng.standard_normal((batch, bundle.generator.z_dim), dtype=np.float32))
            ws = bundle.generator.mapping(z)  # (B, L, D)
            images = bundle.generate(ws)  # (B, 3, R, R)
            noise = [
                torch.from_numpy(rng.standard_normal((batch, *layer.noise_const[None].shape), dtype=np.float32))
                for layer in bundle.generator.synthesis.layers
            ]
            noisy = bundle.generator.synthesis(ws, noise=noise)
        drawn = models.generate(ws.numpy())
        drawn_noisy = models.generate(ws.numpy(), [maps.numpy() for maps in noise])
        found["encoder"][str(batch)] = _encoder_difference(bundle, models, images, rng)
        if "feedback" in found:
            found["feedback"][str(batch)] = _feedback_difference(bundle, models, images)
        found["generator"][str(batch)] = _largest(images, drawn)
        found["generator_with_noise"][str(batch)] = _largest(noisy, drawn_noisy)
    return found


def check(found: dict[str, dict[str, float]], resolution: int) -> None:
    """Refuses models that differ too much.

    Args:
        found: From `largest_differences`.
        resolution: Size R of the generator's faces in pixels.

    Raises:
        ParityError: If a difference is above its tolerance, or not a number.
    """
    for name, allowed in tolerances(resolution).items():
        for batch, difference in found.get(name, {}).items():
            if not difference <= allowed:  # NaN is not
                raise ParityError(
                    f"Expected the exported {name} to differ from torch by at most {allowed:g}, found {difference:.2e} "
                    f"at batch {batch}; nothing was written. Report it with the versions of torch and onnxruntime."
                )


def _encoder_difference(bundle: Bundle, models: Models, faces: Tensor, rng: np.random.Generator) -> float:
    """Encodes one batch of faces of several LR sizes at once by ONNX, and one by one by torch."""
    sizes = _spread(bundle.lr_sizes, len(faces))
    wanted, canvas, noise = [], [], []
    for face, size in zip(faces, sizes, strict=True):
        lr = Downscale(int(size))(face[None])
        own = int(rng.integers(2**31))
        wanted.append(bundle.encode(lr, 1 + SAMPLES, np.random.default_rng(own), passes=0))
        canvas.append(bundle.encoder.on_canvas(lr))
        noise.append(np.random.default_rng(own).standard_normal((1, SAMPLES, models.about.noise_dim), dtype=np.float32))
    ws = models.encode_canvas(torch.cat(canvas).numpy(), sizes.astype(np.float32), np.concatenate(noise))
    alone = models.encode(lr.numpy(), 1, passes=0)  # the best guess, and the canvas made by numpy
    return max(_largest(torch.cat(wanted), ws), _largest(wanted[-1][:, :1], alone))


@torch.inference_mode()
def _feedback_difference(bundle: Bundle, models: Models, faces: Tensor) -> float:
    """Corrects the best guesses for faces of several LR sizes: one batch by ONNX, one by one by torch."""
    wanted, inputs = [], []
    for face, size in zip(faces, _spread(bundle.lr_sizes, len(faces)), strict=True):
        lr = Downscale(int(size))(face[None])
        ws = bundle.encode(lr, 1, passes=0)[:, 0]
        images = bundle.generate(ws)
        wanted.append(bundle.encoder.correct(lr, images, ws))
        inputs.append(feedback_inputs(lr.numpy(), images.numpy(), ws.numpy(), models.about.feedback_canvas))
    moved = models.correct_canvas({name: np.concatenate([row[name] for row in inputs]) for name in inputs[0]})
    return _largest(torch.cat(wanted), moved)


def _spread(lr_sizes: tuple[int, int], count: int) -> np.ndarray:
    """Spreads LR sizes in pixels over their range (count,), the smallest first."""
    return np.geomspace(*lr_sizes, count).round().astype(int) if count > 1 else np.array(lr_sizes[:1])


def _largest(wanted: Tensor, got: np.ndarray) -> float:
    if tuple(wanted.shape) != got.shape:
        raise ParityError(f"Expected the exported model to give {tuple(wanted.shape)}, got {got.shape}.")
    return float(np.abs(wanted.numpy() - got).max())
