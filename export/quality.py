"""What smaller models cost: LPIPS and identity of the best guess, before and after, on the same faces."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data.faces import Faces
from data.image_io import from_uint8, to_uint8
from data.taps import downscaling_errors, resize
from export.passes import feedback_inputs, take_passes
from export.session import Models
from models.bundle import Bundle

if TYPE_CHECKING:
    from pathlib import Path

CALIBRATED_ON = 128  # faces; twice as many moved LPIPS by less than 1e-4
MEASURED_ON = 64  # other faces
LPIPS_ALLOWED = 0.01  # what a smaller model may lose
ERROR_ALLOWED = 1.1  # times the downscaling error that feedback with float16 weights leaves, for int8 feedback
SIZES = (8, 16, 32)  # px, at which the loss is measured, where the bundle takes them
_BATCH = 16
_ROUNDS = 7


class QualityError(ValueError):
    """A smaller model loses more than is allowed."""


def sharp_faces(bundle: Bundle, source: str | Path | None, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Gets faces to calibrate on, and others to measure with.

    Args:
        bundle: On the CPU.
        source: A zip or a folder of square faces, see `data.faces.Faces`; None lets the bundle's generator draw them.
        seed: Of what the generator draws.

    Returns:
        Two sets of faces (N, 3, R, R) in [-1, 1]: CALIBRATED_ON and MEASURED_ON, in the same proportion if there are
        fewer pictures.

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: If it holds fewer than three pictures, or something else.
    """
    wanted = CALIBRATED_ON + MEASURED_ON
    if source is None:
        faces = _drawn(bundle, wanted, np.random.default_rng(seed))
    else:
        pictures = Faces(source, bundle.resolution, limit=wanted)
        if len(pictures) < 3:
            raise ValueError(f"{source}: expected at least 3 faces to calibrate on, found {len(pictures)}")
        faces = pictures.images()
    split = len(faces) * CALIBRATED_ON // wanted
    return faces[:split].numpy(), faces[split:].numpy()


def calibration(models: Models, faces: np.ndarray, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Makes the encoder's inputs from faces, their LR sizes spread evenly over the octaves.

    Args:
        models: What is calibrated; says the canvas and the sizes.
        faces: Sharp faces (N, 3, R, R) in [-1, 1].
        seed: Of the sizes and the noise.

    Yields:
        The inputs for one face, by name.
    """
    rng = np.random.default_rng(seed)
    smallest, largest = models.about.lr_sizes
    for face in faces:
        size = round(2 ** rng.uniform(np.log2(smallest), np.log2(min(largest, face.shape[-1]))))
        yield {
            "canvas": resize(_low_resolution(face[None], size), models.about.canvas),
            "lr_size": np.array([size], np.float32),
            "noise": rng.standard_normal((1, 2, models.about.noise_dim), dtype=np.float32),
        }


def feedback_calibration(models: Models, faces: np.ndarray, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Makes the feedback's inputs from faces: all that its passes see on the way from the encoder's codes.

    Args:
        models: What is calibrated.
        faces: Sharp faces (N, 3, R, R) in [-1, 1].
        seed: Of the LR sizes.

    Yields:
        The inputs for one pass of one face, by name.
    """
    rng = np.random.default_rng(seed)
    smallest, largest = models.about.lr_sizes
    for face in faces:
        size = round(2 ** rng.uniform(np.log2(smallest), np.log2(min(largest, face.shape[-1]))))
        seen: list[dict[str, np.ndarray]] = []

        def correct(
            lr: np.ndarray, images: np.ndarray, ws: np.ndarray, seen: list[dict[str, np.ndarray]] = seen
        ) -> np.ndarray:
            seen.append(feedback_inputs(lr, images, ws, models.about.feedback_canvas))
            return models.correct_canvas(seen[-1])

        lr = _low_resolution(face[None], size)
        take_passes(correct, models.generate, lr, models.encode(lr, 1, passes=0)[:, 0], models.about.passes)
        yield from seen


def compare(before: Models, after: Models, faces: np.ndarray) -> dict[str, Any]:
    """Measures the best guesses of two pairs of models against the faces that they come from.

    Args:
        before: The float32 models.
        after: The smaller ones.
        faces: Sharp faces (N, 3, R, R) in [-1, 1].

    Returns:
        "faces"; "lr_sizes"; "lpips" (lower is better) and "identity" (cosine, higher is better), each with "fp32",
        "this" and "loss" (positive is worse), means over faces and sizes, or None with "missing" where a network to
        measure with is not there; "pixels_rms", the difference between both results in units of [0, 1];
        "downscaling_error", the means of both.
    """
    smallest, largest = before.about.lr_sizes
    sizes = [size for size in SIZES if smallest <= size <= largest] or [smallest]
    drawn: dict[str, list[np.ndarray]] = {"fp32": [], "this": []}
    errors: dict[str, list[np.ndarray]] = {"fp32": [], "this": []}
    for size in sizes:
        lr = _low_resolution(faces, size)
        for name, models in (("fp32", before), ("this", after)):
            parts = [models.generate(models.encode(lr[i : i + _BATCH], 1)[:, 0]) for i in range(0, len(lr), _BATCH)]
            drawn[name].append(np.concatenate(parts).clip(-1, 1))
            errors[name].append(downscaling_errors(drawn[name][-1], lr))
    results = {name: np.concatenate(parts) for name, parts in drawn.items()}
    truth = np.concatenate([faces] * len(sizes))
    found: dict[str, Any] = {"faces": len(faces), "lr_sizes": sizes}
    found["pixels_rms"] = float(np.sqrt(np.square((results["fp32"] - results["this"]) / 2).mean()))
    found["downscaling_error"] = {name: float(np.concatenate(parts).mean()) for name, parts in errors.items()}
    return found | _judge(results, truth)


def feedback_holds(half: Mapping[str, Any], this: Mapping[str, Any]) -> bool:
    """Whether int8 feedback does as well as feedback with float16 weights.

    Args:
        half: From `compare`, with float16 weights in the feedback.
        this: The same with int8.

    Returns:
        False if the faces downscale to the input clearly worse, or LPIPS loses more than is allowed.
    """
    if not this["downscaling_error"]["this"] <= ERROR_ALLOWED * half["downscaling_error"]["this"]:
        return False
    return this["lpips"] is None or this["lpips"]["loss"] <= LPIPS_ALLOWED


def check_quality(found: Mapping[str, Any], precision: str) -> None:
    """Refuses models that lose too much.

    Args:
        found: From `compare`.
        precision: Their precision, for the message.

    Raises:
        QualityError: If LPIPS grows by more than LPIPS_ALLOWED, or is not a number.
    """
    if found["lpips"] is not None and not found["lpips"]["loss"] <= LPIPS_ALLOWED:
        raise QualityError(
            f"Expected --precision {precision} to cost at most {LPIPS_ALLOWED} of LPIPS, found "
            f"{found['lpips']['loss']:.4f}; nothing was written. Give faces like those it is for by --faces, or take "
            "--precision fp16."
        )


def seconds_per_face(before: Models, after: Models) -> dict[str, dict[str, float]]:
    """Times one face in turns, so that the ratio holds even where the times do not.

    Args:
        before: The float32 models.
        after: The smaller ones.

    Returns:
        The median seconds of "encode" (no passes) and "generate", each with "fp32" and "this"; and of "correct", one
        pass of feedback, where there is any.
    """
    size = before.about.lr_sizes[0]
    lr = np.random.default_rng(0).uniform(-1, 1, (1, 3, size, size)).astype(np.float32)
    calls = ("encode", "generate") if before.feedback is None else ("encode", "generate", "correct")
    times: dict[str, dict[str, list[float]]] = {n: {"fp32": [], "this": []} for n in calls}
    for _ in range(_ROUNDS + 1):
        for name, models in (("fp32", before), ("this", after)):
            start = time.perf_counter()
            ws = models.encode(lr, 1, passes=0)[:, 0]
            encoded = time.perf_counter()
            images = models.generate(ws)
            generated = time.perf_counter()
            times["encode"][name].append(encoded - start)
            times["generate"][name].append(generated - encoded)
            if "correct" in times:
                models.correct(lr, images, ws)
                times["correct"][name].append(time.perf_counter() - generated)
    return {part: {name: float(np.median(t[1:])) for name, t in by.items()} for part, by in times.items()}


@torch.inference_mode()
def _drawn(bundle: Bundle, count: int, rng: np.random.Generator) -> Tensor:
    z = torch.from_numpy(rng.standard_normal((count, bundle.generator.z_dim), dtype=np.float32))
    ws = bundle.generator.mapping(z)
    return torch.cat([bundle.generate(part).clamp(-1, 1) for part in ws.split(_BATCH)])


def _low_resolution(faces: np.ndarray, size: int) -> np.ndarray:
    return from_uint8(to_uint8(resize(faces, size)))


def _judge(results: Mapping[str, np.ndarray], truth: np.ndarray) -> dict[str, Any]:
    """Measures with the networks that are there."""
    found: dict[str, Any] = {"lpips": None, "identity": None}
    missing: list[str] = []
    for name, measure in (("lpips", _lpips), ("identity", _identity)):
        try:
            fp32, this = measure(results["fp32"], truth), measure(results["this"], truth)
        except FileNotFoundError as error:
            missing.append(f"{name}: {error}")
            continue
        found[name] = {"fp32": fp32, "this": this, "loss": this - fp32 if name == "lpips" else fp32 - this}
    return found | ({"missing": missing} if missing else {})


@torch.inference_mode()
def _lpips(images: np.ndarray, truth: np.ndarray) -> float:
    from losses.perceptual import LPIPS

    network = LPIPS()
    pairs = zip(torch.from_numpy(images).split(_BATCH), torch.from_numpy(truth).split(_BATCH), strict=True)
    return float(torch.cat([network(a, b) for a, b in pairs]).mean())


@torch.inference_mode()
def _identity(images: np.ndarray, truth: np.ndarray) -> float:
    from models.identity import Identity

    network = Identity()
    pairs = zip(torch.from_numpy(images).split(_BATCH), torch.from_numpy(truth).split(_BATCH), strict=True)
    return float(torch.cat([(network(a) * network(b)).sum(dim=1) for a, b in pairs]).mean())
