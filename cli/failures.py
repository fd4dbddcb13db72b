"""The one file that names what failed: a line for each input, kept by all processes of a run and the runs after it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from data.files import atomic_write, check_replaceable, locked

FAILED = "failed.jsonl"


def read_failures(out: Path) -> dict[str, str]:
    """Gives reasons by input, from the folder of results; nothing if there is no such file, or it is not ours."""
    try:
        lines = [json.loads(line) for line in (out / FAILED).read_text(encoding="ascii").splitlines()]
        return {line["input"]: line["reason"] for line in lines if line.keys() == {"input", "reason"}}
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return {}


def note_failures(out: Path, failed: Mapping[str, str], made: Collection[str]) -> None:
    """Notes reasons by input in the folder of results, and strikes what has been made since; other lines stay.

    Raises:
        ValueError: If a file of that name is not ours.
    """
    if not failed and not made:
        return
    path = out / FAILED
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):  # other processes have their own to note
        known = read_failures(out)
        check_replaceable(path, overwrite=True, ours=bool(known))
        left = {name: reason for name, reason in known.items() if name not in made} | dict(failed)
        if not left:
            path.unlink(missing_ok=True)
            return
        with atomic_write(path) as partial:
            lines = [json.dumps({"input": name, "reason": left[name]}) + "\n" for name in sorted(left)]
            partial.write_text("".join(lines), encoding="ascii")
