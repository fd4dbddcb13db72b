"""Networks and their weights."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.bundle import load_bundle, make_encoder
    from models.checkpoints import load_generator
    from models.generator import Generator

__all__ = ["Generator", "load_bundle", "load_generator", "make_encoder"]

# Imported at first use: a program that needs the generator alone does not wait for the encoder's libraries, and one
# that runs an exported bundle has no torch.
_LAZY = {
    "Generator": "models.generator",
    "load_bundle": "models.bundle",
    "load_generator": "models.checkpoints",
    "make_encoder": "models.bundle",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for the first time."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
