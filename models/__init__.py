"""Networks and their weights."""

from models.generator import Generator
from models.weights import load_generator

__all__ = ["Generator", "load_generator"]
