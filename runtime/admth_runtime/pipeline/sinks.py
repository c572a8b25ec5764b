"""Where results go: a function of the program's own, or JSON lines; Parquet has its own module."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TextIO, runtime_checkable

from admth_runtime.errors import InputError
from admth_runtime.pipeline.frames import FrameResult
from admth_runtime.runtime import HashRuntime

__all__ = ["CallbackSink", "NdjsonSink", "Sink", "as_sink"]


@runtime_checkable
class Sink(Protocol):
    """Takes results in the order of their frames, from one thread."""

    def open(self, runtime: HashRuntime) -> None:
        """Get ready. It is called once, by the thread that starts the pipeline, before anything else."""

    def write(self, results: Sequence[FrameResult]) -> None:
        """Take the results of one batch. What it raises ends the pipeline; ``BrokenPipeError`` ends it quietly."""

    def close(self, failed: bool) -> None:
        """Finish, once, whatever happened before. ``failed`` says that this sink itself has raised."""


class CallbackSink:
    """Calls a function with every result.

    The function runs in the pipeline's sink thread, one call at a time. It may call ``pipeline.stop()``.

    Args:
        function: called with a :class:`~admth_runtime.pipeline.frames.FrameResult`.
    """

    def __init__(self, function: Callable[[FrameResult], object]) -> None:
        self._function = function

    def open(self, runtime: HashRuntime) -> None:
        """Do nothing."""

    def write(self, results: Sequence[FrameResult]) -> None:
        """Call the function for each result."""
        for result in results:
            self._function(result)

    def close(self, failed: bool) -> None:
        """Do nothing."""


class NdjsonSink:
    """Writes one JSON object a line: ``id``, ``uri``, ``timestamp``, and ``codes`` in hexadecimal or ``error``.

    Lines are written whole and flushed with every batch, so a reader sees each result at once. When the reader goes
    away, the pipeline ends without an error, and :attr:`reader_gone` says so.

    Args:
        file: a text file; None takes standard output. It is not closed.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = sys.stdout if file is None else file
        self.reader_gone = False

    def open(self, runtime: HashRuntime) -> None:
        """Do nothing."""

    def write(self, results: Sequence[FrameResult]) -> None:
        """Write the lines of a batch and flush."""
        lines = [json.dumps(result.to_dict(), separators=(",", ":"), allow_nan=False) for result in results]
        try:
            self._file.write("\n".join(lines) + "\n")
            self._file.flush()
        except BrokenPipeError:
            self.reader_gone = True
            raise

    def close(self, failed: bool) -> None:
        """Do nothing; every line is out already."""


def as_sink(sink: Any) -> Sink:
    """Return the sink that an argument means: one already, or a function.

    Raises:
        InputError: it means none.
    """
    if isinstance(sink, Sink):
        return sink
    if callable(sink):
        return CallbackSink(sink)
    raise InputError(
        f"a sink of type {type(sink).__name__} is unknown: pass a function, or a sink of admth_runtime.pipeline"
    )
