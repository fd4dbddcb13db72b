"""Reads and writes generators."""

from models.weights.loading import load_generator, mean_latent, read_checkpoint
from models.weights.safetensors_files import save_generator, sha256_of, to_half, write_safetensors

__all__ = [
    "load_generator",
    "mean_latent",
    "read_checkpoint",
    "save_generator",
    "sha256_of",
    "to_half",
    "write_safetensors",
]
