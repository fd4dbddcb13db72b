"""What the pipeline tells of the bundle it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """What a program needs to know of a bundle.

    Attributes:
        name: Its name.
        hash: Its sha256.
        resolution: Size R of the samples in pixels.
        lr_sizes: Smallest and largest size in pixels of the inputs.
        device: Kind of device that it is on.
        generator_sha256: Hash of its generator, by which edit directions know it.
        styles: Number and width (L, D) of the styles that its codes have.
    """

    name: str
    hash: str
    resolution: int
    lr_sizes: tuple[int, int]
    device: str
    generator_sha256: str
    styles: tuple[int, int]
