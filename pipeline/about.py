"""What the pipeline tells of the bundle it runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class About:
    """What a program needs to know of a bundle."""

    name: str
    hash: str  # its sha256
    resolution: int  # size R of the samples in pixels
    lr_sizes: tuple[int, int]  # smallest and largest size in pixels of the inputs
    device: str  # kind of device that it is on
    generator_sha256: str  # by which edit directions know it
    styles: tuple[int, int]  # number and width (L, D) of the styles that its codes have
