"""Results by the thousand in one file: tar as WebDataset reads it, or Parquet; the same bytes for the same faces."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data.parquet import load_pyarrow
from data.report import REPORT

KINDS = ("parquet", "tar")
ROWS = 64  # faces in a row group, which are held in memory

AddFace = Callable[[str, Path], None]


def open_shard(path: Path) -> AbstractContextManager[AddFace]:
    """Writes a file that holds what folders of faces hold.

    In a tar, the file 1.png of a face is NAME.1.png, so that WebDataset gives the files of a face together. A row of a
    Parquet table has `name`, `input` and `images` (encoded, as Hugging Face stores them), `ws` (k · L · D numbers) and
    `ws_shape`, and `report`, which is JSON.

    Args:
        path: The file; its suffix, one of KINDS, says what it is.

    Returns:
        A context whose function adds a face: its name, without dots, and the folder that `write_face` wrote.

    Raises:
        ValueError: If pyarrow is needed and not installed.
    """
    return (_open_tar if path.suffix == ".tar" else _open_parquet)(path)


@contextmanager
def _open_tar(path: Path) -> Iterator[AddFace]:
    with tarfile.open(path, "w") as archive:

        def add(name: str, folder: Path) -> None:
            for file in sorted(p for p in folder.rglob("*") if p.is_file()):
                member = ".".join([name, *file.relative_to(folder).parts])
                info = tarfile.TarInfo(member)  # with no time and no owner
                info.size = file.stat().st_size
                with file.open("rb") as content:
                    archive.addfile(info, content)

        yield add


@contextmanager
def _open_parquet(path: Path) -> Iterator[AddFace]:
    arrow, parquet = load_pyarrow()
    picture = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    columns = [("name", arrow.string()), ("input", picture), ("images", arrow.list_(picture))]
    columns += [("ws", arrow.list_(arrow.float32())), ("ws_shape", arrow.list_(arrow.int32()))]
    schema = arrow.schema([*columns, ("report", arrow.string())])
    rows: list[dict[str, Any]] = []
    with parquet.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            writer.write_table(arrow.Table.from_pylist(rows, schema))
            rows.clear()

        def add(name: str, folder: Path) -> None:
            for report in sorted(folder.rglob(REPORT)):  # of one face, or of the faces of a photo
                place = report.parent
                rows.append({"name": "/".join([name, *place.relative_to(folder).parts]), **_row(place)})
            if len(rows) >= ROWS:
                flush()

        yield add
        if rows:
            flush()


def _row(folder: Path) -> dict[str, Any]:
    """Gives the columns of a face."""
    latents = folder / "latents.npz"
    ws = np.load(latents)["ws"] if latents.exists() else np.empty(0, np.float32)
    report = json.loads((folder / REPORT).read_bytes())
    report.pop("files")  # the ledger
    images = sorted((p for p in folder.glob("*.png") if p.stem.isdigit()), key=lambda p: int(p.stem))
    return {
        "input": _encoded(folder / "input.png"),
        "images": [_encoded(path) for path in images],
        "ws": ws.ravel(),
        "ws_shape": ws.shape,
        "report": json.dumps(report, sort_keys=True),
    }


def _encoded(path: Path) -> dict[str, Any]:
    return {"bytes": path.read_bytes(), "path": path.name}
