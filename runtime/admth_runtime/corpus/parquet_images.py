"""Images kept as bytes in a column of Parquet files, also in the form of Hugging Face's data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from admth_runtime.errors import InputError, require

__all__ = ["ImageColumn", "open_parquet"]


class ImageColumn:
    """The image column of one Parquet file, read a row group at a time. Not safe to share between threads.

    Attributes:
        rows: rows in the file.

    Args:
        path: the file.
        column: a column of binary values, or of structs with a binary field ``bytes``.

    Raises:
        InputError: the file is missing or damaged, or has no such column.
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(self, path: Path, column: str) -> None:
        self._path = path
        self._file = open_parquet(path)
        self._column = self._leaf(column)
        metadata = self._file.metadata
        self._starts = [0]
        for group in range(metadata.num_row_groups):
            self._starts.append(self._starts[-1] + metadata.row_group(group).num_rows)
        self.rows = self._starts[-1]
        self._group: int | None = None
        self._values: Any = None

    def read(self, row: int) -> bytes | None:
        """Return the bytes of a row, or None where the row holds none.

        Raises:
            InputError: the row group is damaged.
        """
        if self._group is None or not self._starts[self._group] <= row < self._starts[self._group + 1]:
            from bisect import bisect_right

            self._load(bisect_right(self._starts, row) - 1)
        assert self._group is not None
        value = self._values[row - self._starts[self._group]].as_py()
        if isinstance(value, dict):
            value = value.get("bytes")
        return None if value is None else bytes(value)

    def close(self) -> None:
        """Close the file."""
        self._values = None
        self._file.close()

    def _load(self, group: int) -> None:
        try:
            column = self._file.read_row_group(group, columns=[self._column])
        except Exception as error:  # Arrow's own errors
            raise InputError(
                f"{self._path}: its row group {group} is damaged ({str(error).splitlines()[0]}): write the file again"
            ) from error
        self._values, self._group = column.column(0), group

    def _leaf(self, column: str) -> str:
        """Return the Parquet path of the bytes of a column."""
        import pyarrow as pa

        schema = self._file.schema_arrow
        if column not in schema.names:
            there = ", ".join(schema.names)
            raise InputError(f"{self._path} has no column {column!r}: name one of {there} with --column")
        kind = schema.field(column).type
        if pa.types.is_struct(kind) and "bytes" in {kind.field(index).name for index in range(kind.num_fields)}:
            kind = kind.field("bytes").type
            name = f"{column}.bytes"
        else:
            name = column
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)):
            raise InputError(
                f"the column {column!r} of {self._path} holds {schema.field(column).type}, not the bytes of images: "
                "name another with --column"
            )
        return name


def open_parquet(path: Path) -> Any:
    """Open a Parquet file as a ``pyarrow.parquet.ParquetFile``.

    Raises:
        InputError: it is missing or damaged.
        MissingExtraError: pyarrow is not installed.
    """
    pq: Any = require("pyarrow.parquet", extra="parquet", purpose="a Parquet file")
    try:
        return pq.ParquetFile(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Exception as error:  # Arrow's own errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is damaged or not Parquet ({reason[:200]}): write the file again") from error
