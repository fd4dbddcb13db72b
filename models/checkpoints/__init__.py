"""Reads and writes generators."""

from data.files import sha256_of
from models.checkpoints.generators import (
    load_generator,
    mean_latent,
    read_checkpoint,
    save_generator,
    to_half,
    write_safetensors,
)

__all__ = [
    "load_generator",
    "mean_latent",
    "read_checkpoint",
    "save_generator",
    "sha256_of",
    "to_half",
    "write_safetensors",
]
