"""Measures other people's results: pictures in folders, whatever made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.faces import Faces
from data.image_io import IMAGE_SUFFIXES, from_uint8, read_image
from data.operator import Downscale
from evaluation.metrics import MetricSuite, Values, eight_bit, summarize

INPUT = "input.png"
BATCH = 16


def find_samples(folder: Path, name: str) -> list[Path]:
    """Finds the samples of a face: NAME/1.png, NAME/2.png …, as infer.py writes them, or NAME.png alone."""
    own = folder / name
    numbered = own.iterdir() if own.is_dir() else iter(())
    found = sorted((p for p in numbered if p.stem.isdigit() and p.suffix.lower() in IMAGE_SUFFIXES), key=_number)
    found = found or [path for suffix in sorted(IMAGE_SUFFIXES) if (path := folder / f"{name}{suffix}").is_file()][:1]
    if not found:
        raise FileNotFoundError(f"Expected samples of {name} at {own}/1.png … or {own}.png, found none.")
    return found


def _number(path: Path) -> int:
    return int(path.stem)


def measure_folders(
    truth: Path | str, samples: Path | str, suite: MetricSuite, lr_size: int | None = None, **part: Any
) -> dict[str, Any]:
    """Measures samples in a folder against the truth in another.

    Args:
        truth: Folder or zip of faces; resized to the samples' size.
        samples: Folder of samples, see `find_samples`.
        suite: Measures.
        lr_size: Size in pixels of the inputs, which are then downscaled from the truth; None reads NAME/input.png.
        part: Which faces, `limit`, `split` and `part` of `data.faces.Faces`.

    Returns:
        `faces`, `k`, `resolution`, `lr_size`, and `means`, see `evaluation.metrics.summarize`.

    Raises:
        FileNotFoundError: If a face has no samples, or no input.
        ValueError: If faces have different numbers of samples, or these have different sizes.
    """
    folder = Path(samples)
    stems = [Path(name).stem for name in Faces(truth, 8, cache_bytes=0, **part).names]
    paths = [find_samples(folder, stem) for stem in stems]
    k, size = len(paths[0]), read_image(paths[0][0]).shape[-1]
    faces = Faces(truth, size, cache_bytes=0, **part)
    parts: list[Values] = []
    for start in range(0, len(faces), BATCH):
        rows = range(start, min(start + BATCH, len(faces)))
        batch = from_uint8(torch.stack([faces[i] for i in rows]))
        images = torch.stack([_read(paths[i], k, size) for i in rows])
        lr = torch.stack([_read_input(folder / stems[i] / INPUT, batch[i - start], lr_size) for i in rows])
        parts.append(suite.measure(batch, images, lr))
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {"faces": len(faces), "k": k, "resolution": size, "lr_size": lr.shape[-1], "means": summarize(values)}


def _read(paths: list[Path], k: int, size: int) -> Tensor:
    """Reads the samples (k, 3, R, R) of one face."""
    if len(paths) != k:
        raise ValueError(f"Expected {k} samples of each face, found {len(paths)} in {paths[0].parent}.")
    images = [torch.from_numpy(read_image(path)) for path in paths]
    for path, image in zip(paths, images, strict=True):
        if image.shape != (3, size, size):
            raise ValueError(f"Expected samples of {size} x {size} px, {path} has {image.shape[2]} x {image.shape[1]}.")
    return torch.stack(images)


def _read_input(path: Path, face: Tensor, lr_size: int | None) -> Tensor:
    """Reads the input (3, s, s) of one face, or makes it."""
    if lr_size is not None:
        return eight_bit(Downscale(lr_size)(face[None]))[0]
    if not path.is_file():
        raise FileNotFoundError(f"Expected the input of a face at {path}, found none; name its size with --lr.")
    return torch.from_numpy(read_image(path))
