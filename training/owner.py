"""A run belongs to what it was begun on: a generator, or a bundle. A checkpoint goes on with no other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check_owner(checkpoint: Mapping[str, Any], key: str, present: str, path: str) -> None:
    """Refuses to go on with another generator or bundle than the run began with.

    Args:
        checkpoint: What is loaded.
        key: Where it keeps the hash, such as "generator_sha256" or "bundle_hash"; its first word names the thing.
        present: The hash of what is there now.
        path: Where that lies.

    Raises:
        ValueError: If the hashes differ.
    """
    if checkpoint[key] != present:
        raise ValueError(
            f"Expected the {key.partition('_')[0]} that this run began with, {path} has changed since; put the old one "
            "back, or start a new run under another --trainer.logger.init_args.name."
        )
