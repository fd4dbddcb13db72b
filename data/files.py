"""Files that appear as a whole or not at all."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Lets a file be written elsewhere; it takes the place of `path` when the block ends without an error.

    Args:
        path: Where the file belongs; its folder is made if it is not there.

    Yields:
        The path to write to: of the same name, in a temporary folder beside `path`, which goes with what is left in it.
        Nobody but the user may look into that folder, but the file has the permissions of any new file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent, ignore_cleanup_errors=True) as holder:
        partial = Path(holder) / path.name
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave the name without its content
        partial.replace(path)


def sha256_of(path: str | Path) -> str:
    """Gives the sha256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
