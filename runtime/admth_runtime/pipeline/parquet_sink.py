"""Results as Parquet files, which ``read_codes``, ``admth-run search`` and the index read."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from admth_runtime._version import __version__
from admth_runtime.codes_file import BIT_ORDER, CODES_FORMAT_VERSION, CODES_METADATA_KEY
from admth_runtime.errors import InputError, OutputError, require
from admth_runtime.files import atomic_path, check_target, make_folder
from admth_runtime.pipeline.frames import FrameResult
from admth_runtime.runtime import HashRuntime

__all__ = ["ParquetSink", "next_id"]

_NUMBERED = re.compile(r"codes-(\d{5,})(?:\.errors)?\.parquet")


class ParquetSink:
    """Writes codes to Parquet: ``id``, ``uri``, ``code_16`` ... ``code_64``, ``status`` (``"ok"``) and ``timestamp``.

    The schema and the metadata are those of every encoded file (docs/corpus.md), with the time of the frame added.
    Frames without codes go to a second file, ``<name>.errors.parquet``, with ``id``, ``uri``, ``reason`` and
    ``timestamp``; it exists only if there are any. Rows are written in groups, and files get their names by a rename
    when they are complete, so a reader never meets half a file. They are completed when the pipeline ends, also when
    its source has failed; only a power cut or a kill loses the rows since then.

    Args:
        path: the file, ending in ``.parquet``; or, with ``rows_per_file`` or ``seconds_per_file``, a folder, which
            gets ``codes-00000.parquet``, ``codes-00001.parquet`` and so on, after those that are there already. Use
            that where the pipeline runs for long: a file that is complete survives whatever comes.
        rows_per_group: rows that are kept in memory before they are written.
        rows_per_file: rows after which a file is completed and the next one begun.
        seconds_per_file: seconds after which that happens, once there is a next batch.
        logits: keep the logits of every length too, ``logits_L``.

    Raises:
        InputError: an argument is out of range, or the file has another ending.
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        rows_per_group: int = 4096,
        rows_per_file: int | None = None,
        seconds_per_file: float | None = None,
        logits: bool = False,
    ) -> None:
        require("pyarrow", extra="parquet", purpose="a Parquet file")
        for name, value in (
            ("rows_per_group", rows_per_group),
            ("rows_per_file", rows_per_file),
            ("seconds_per_file", seconds_per_file),
        ):
            if value is not None and value <= 0:
                raise InputError(f"{name} {value!r} is not 1 or more")
        self._path, self._in_folder = Path(path), rows_per_file is not None or seconds_per_file is not None
        if not self._in_folder and self._path.suffix.lower() != ".parquet":
            raise InputError(f"{self._path} does not end in .parquet: give the file that ending, or rows_per_file")
        self._rows_per_group, self._logits = rows_per_group, logits
        self._rows_per_file = rows_per_file or float("inf")
        self._seconds_per_file = seconds_per_file or float("inf")
        self._lengths: tuple[int, ...] = ()
        self._metadata = ""
        self._number = 0
        self._begun = 0.0
        self._codes: _Writer | None = None
        self._errors: _Writer | None = None

    def open(self, runtime: HashRuntime) -> None:
        """Check that the file can be written, and begin it.

        Raises:
            OutputError: it cannot.
        """
        self._lengths = runtime.code_lengths
        preprocessing = runtime.manifest.preprocessing
        facts = {
            "format_version": CODES_FORMAT_VERSION,
            "bit_order": BIT_ORDER,
            "code_lengths": list(self._lengths),
            "logits": self._logits,
            "model_sha256": runtime.model_sha256,
            "preprocessing_sha256": preprocessing.digest(),
            "preprocessing": preprocessing.to_dict(),
            "created_by": f"admth {__version__}",
        }
        self._metadata = json.dumps(facts, sort_keys=True)
        if self._in_folder:
            self._number = _first_free(make_folder(self._path))
        self._begin()

    def write(self, results: Sequence[FrameResult]) -> None:
        """Take the results of a batch.

        Raises:
            OutputError: they cannot be written, for example because the disk is full.
        """
        assert self._codes is not None
        old = time.monotonic() - self._begun >= self._seconds_per_file
        if self._codes.rows >= self._rows_per_file or (old and (self._codes.rows or self._errors)):
            self._complete()
            self._begin()
        self._codes.add([result for result in results if result.error is None])
        if bad := [result for result in results if result.error is not None]:
            if self._errors is None:
                self._errors = _Writer(self._errors_path(), self._error_table, self._rows_per_group)
            self._errors.add(bad)

    def close(self, failed: bool) -> None:
        """Complete the files; after a failure of this sink, remove what is not complete.

        Raises:
            OutputError: they cannot be completed.
        """
        if not failed:
            self._complete()
        for writer in (self._codes, self._errors):
            if writer is not None:
                writer.abandon()
        self._codes = self._errors = None

    def _begin(self) -> None:
        if self._codes is not None:
            self._codes.abandon()
        target = self._target()
        check_target(target)
        self._begun = time.monotonic()
        self._codes = _Writer(target, self._code_table, self._rows_per_group)

    def _complete(self) -> None:
        """Give the files their names; a folder gets no empty file."""
        if self._codes is not None and (self._codes.rows or not self._in_folder):
            self._codes.complete()
            self._codes = None
        if self._errors is not None:
            self._errors.complete()
            self._errors = None
        elif not self._in_folder:
            self._errors_path().unlink(missing_ok=True)  # of an earlier run into the same file
        self._number += 1

    def _target(self) -> Path:
        return self._path / f"codes-{self._number:05}.parquet" if self._in_folder else self._path

    def _errors_path(self) -> Path:
        return self._target().with_suffix(".errors.parquet")

    def _code_table(self, results: Sequence[FrameResult]) -> Any:
        import pyarrow as pa

        columns: dict[str, Any] = _identity(results)
        for length in self._lengths:
            data = b"".join([result[length].tobytes() for result in results])
            columns[f"code_{length}"] = pa.Array.from_buffers(
                pa.binary(length // 8), len(results), [None, pa.py_buffer(data)]
            )
        for length in self._lengths if self._logits else ():
            rows = [result.batch.logits[length][result.row] for result in results if result.batch is not None]
            flat = np.concatenate(rows) if rows else np.empty(0, np.float32)
            columns[f"logits_{length}"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), length)
        columns["status"] = pa.array(["ok"] * len(results), type=pa.string())
        columns["timestamp"] = _timestamps(results)
        return _required(pa.table(columns)).replace_schema_metadata({CODES_METADATA_KEY: self._metadata})

    def _error_table(self, results: Sequence[FrameResult]) -> Any:
        import pyarrow as pa

        reasons = pa.array([result.error for result in results], type=pa.string())
        return _required(pa.table({**_identity(results), "reason": reasons, "timestamp": _timestamps(results)}))


def next_id(folder: str | os.PathLike[str]) -> int:
    """Return the first id that no row of a :class:`ParquetSink`'s folder has, for ``PipelineOptions.first_id``.

    Args:
        folder: the folder; 0 is returned when it is not there yet.

    Raises:
        InputError: a file is damaged or none of ours.
    """
    require("pyarrow", extra="parquet", purpose="a Parquet file")
    import pyarrow as pa
    import pyarrow.parquet as pq

    highest = -1
    for path in sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []:
        if not _NUMBERED.fullmatch(path.name):
            continue
        try:
            with pq.ParquetFile(path) as file:
                place = file.schema_arrow.names.index("id")
                for group in range(file.num_row_groups):
                    highest = max(highest, file.metadata.row_group(group).column(place).statistics.max)
        except (pa.ArrowException, OSError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is damaged or was not written by a pipeline: move it away") from error
    return highest + 1


class _Writer:
    """One Parquet file that gets its name when it is complete."""

    def __init__(self, target: Path, table_of: Callable[[Sequence[FrameResult]], Any], rows_per_group: int) -> None:
        self.rows = 0
        self._table_of, self._rows_per_group = table_of, rows_per_group
        self._waiting: list[FrameResult] = []
        self._parquet: Any = None
        self._stack = ExitStack()
        with self._or_remove():
            import pyarrow.parquet as pq

            temporary = self._stack.enter_context(atomic_path(target))
            # Python's own file, since its errors tell a full disk from others.
            file = self._stack.enter_context(temporary.open("wb"))
            self._parquet = pq.ParquetWriter(file, table_of([]).schema, compression="zstd", write_page_checksum=True)

    def add(self, results: Sequence[FrameResult]) -> None:
        """Keep rows, and write a group of them when there are enough."""
        self._waiting += results
        self.rows += len(results)
        if len(self._waiting) >= self._rows_per_group:
            with self._or_remove():
                self._flush()

    def complete(self) -> None:
        """Write the rest and give the file its name."""
        with self._or_remove():
            if self._waiting:
                self._flush()
            self._parquet.close()
        self._stack.close()

    def abandon(self) -> None:
        """Remove it; one that could not be written is removed already."""
        with suppress(_AbandonedError, OutputError), self._or_remove():
            raise _AbandonedError

    def _flush(self) -> None:
        rows, self._waiting = self._waiting, []
        self._parquet.write_table(self._table_of(rows))

    @contextmanager
    def _or_remove(self) -> Iterator[None]:
        """Remove the temporary file when the block fails, and say why in our words."""
        try:
            yield
        except BaseException as error:
            if self._parquet is not None:
                with suppress(Exception):
                    self._parquet.close()
                self._parquet.is_open = False  # or it tries again when it is collected, and complains
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise


class _AbandonedError(Exception):
    """The file is not wanted."""


def _identity(results: Sequence[FrameResult]) -> dict[str, Any]:
    import pyarrow as pa

    return {
        "id": pa.array([result.id for result in results], type=pa.int64()),
        "uri": pa.array([_text(result.uri) for result in results], type=pa.string()),
    }


def _timestamps(results: Sequence[FrameResult]) -> Any:
    import pyarrow as pa

    microseconds = [round(1e6 * result.timestamp) for result in results]
    return pa.array(microseconds, type=pa.int64()).cast(pa.timestamp("us", tz="UTC"))


def _required(table: Any) -> Any:
    """Declare that no column holds nulls."""
    import pyarrow as pa

    return table.cast(pa.schema([field.with_nullable(False) for field in table.schema]))


def _text(uri: str) -> str:
    """Return a uri that UTF-8 can hold: bytes of a file name that are not text are escaped."""
    return uri.encode(errors="backslashreplace").decode()


def _first_free(folder: Path) -> int:
    """Return the number after the last of the numbered files in a folder."""
    numbers = [int(match[1]) for entry in folder.iterdir() if (match := _NUMBERED.fullmatch(entry.name))]
    return max(numbers, default=-1) + 1
