"""What results are made of, as hashes, by which a run that was cut knows what is done."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from data.files import sha256_of
from data.listing import Picture
from data.report import FORMAT

# Options that change where faces are computed and put, and not what they are; the bundle has a hash of its own.
_ELSEWHERE = set("inputs out overwrite bundle device batch_size devices num_nodes archive shard_size".split())


def hash_settings(args: argparse.Namespace, bundle: str) -> str:
    """Hashes what all faces of a call have in common.

    Args:
        args: The options, of which those that were read from others, such as `edits`, may be objects.
        bundle: The bundle's hash.

    Returns:
        A hash in hexadecimal.
    """
    plain = (str, int, float, list, type(None))
    options = {k: v for k, v in vars(args).items() if k not in _ELSEWHERE and isinstance(v, plain)}
    facts = {"options": options, "edits": args.edits.summarize(), "bundle": bundle, "format": FORMAT}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def hash_pictures(settings: str, pictures: Sequence[Picture]) -> str:
    """Hashes settings together with the names and contents of pictures; one that cannot be read counts as empty.

    Args:
        settings: From `hash_settings`.
        pictures: The inputs.

    Returns:
        A hash in hexadecimal, 16 digits.
    """
    found = hashlib.sha256(settings.encode())
    for picture in pictures:
        content = ""
        with suppress(OSError, ValueError):  # reading it will say why
            if not isinstance(picture, Path):
                content = hashlib.sha256(picture.open().getbuffer()).hexdigest()
            elif picture.is_file():
                content = sha256_of(picture)
        found.update(f"{picture.name}\0{content}\0".encode(errors="surrogateescape"))
    return found.hexdigest()[:16]
