"""The pictures of a Parquet table, as Hugging Face's data sets come; needs pyarrow."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

INSTALL = "pip install pyarrow, which reads and writes Parquet"


def load_pyarrow() -> tuple[ModuleType, ModuleType]:
    """Imports pyarrow and pyarrow.parquet; ValueError if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"expected pyarrow for Parquet files, not installed ({error}); {INSTALL}") from error
    return pyarrow, pyarrow.parquet


class ParquetPictures:
    """Reads the encoded pictures in a column of a Parquet file, by row group.

    The column is of binary values, or of structs with "bytes" and perhaps "path", as Hugging Face writes them; "image"
    where there are several. Pictures are named by their paths where these differ, else by the numbers of their rows.

    Args:
        path: The file.

    Raises:
        ValueError: If it is no such file, or pyarrow is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        self._group: tuple[int, list[Any]] = (-1, [])
        arrow, _ = load_pyarrow()
        try:
            schema = self._opened().schema_arrow
            columns = [field.name for field in schema if _holds_bytes(field.type, arrow)]
            if not columns:
                raise ValueError(f"{path}: expected a column of pictures, binary or with 'bytes', got {schema.names}.")
            self.column = "image" if "image" in columns else columns[0]
            self.plain = not arrow.types.is_struct(schema.field(self.column).type)
            groups = self._opened().metadata
            counts = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
            self._starts = list(accumulate(counts, initial=0))
            self.rows = {name: row for row, name in enumerate(self._names(schema))}
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a whole Parquet file ({error}); download it again.") from error

    def __getstate__(self) -> dict:
        """Leaves the open file behind: every worker opens its own."""
        return {**self.__dict__, "_file": None, "_group": (-1, [])}

    def __getitem__(self, name: str) -> bytes:
        """Reads a picture as it was encoded; ValueError if the row is damaged or empty."""
        arrow, _ = load_pyarrow()
        row = self.rows[name]
        group = bisect_right(self._starts, row) - 1
        if self._group[0] != group:
            try:
                self._group = group, self._opened().read_row_group(group, columns=[self.column])[self.column]
            except (arrow.ArrowException, OSError) as error:
                raise ValueError(f"row group {group} cannot be read ({error})") from error
        value = self._group[1][row - self._starts[group]].as_py()
        content = value if self.plain or value is None else value["bytes"]
        if not content:
            raise ValueError(f"row {row} holds no picture")
        return content

    def _opened(self) -> Any:
        if self._file is None:
            self._file = load_pyarrow()[1].ParquetFile(self.path)
        return self._file

    def _names(self, schema: Any) -> list[str]:
        """Names the rows."""
        numbers = [f"{row:08}" for row in range(self._starts[-1])]
        if self.plain or schema.field(self.column).type.get_field_index("path") < 0:
            return numbers
        table = self._opened().read(columns=[f"{self.column}.path"])
        names = [value["path"] for value in table[self.column].to_pylist() if value and value["path"]]
        return names if len(set(names)) == len(numbers) else numbers


def _holds_bytes(kind: Any, arrow: ModuleType) -> bool:
    if arrow.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)
