"""Processes of our own for work that may crash: running an engine, and building one.

A worker is a module that reads a request from standard input and writes lines of JSON. It is ended with the block that
uses it, whatever happens there, and Ctrl-C goes to the parent alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import IO

from admth_runtime import errors
from admth_runtime.errors import AdmthError, DeviceError

__all__ = ["crash_error", "same_error", "started_worker"]


@contextlib.contextmanager
def started_worker(module: str, complaints: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Start ``python -m module`` with pipes to its standard input and output, and end it with the block.

    Args:
        module: the module's name.
        complaints: where its standard error goes.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        # A file in the working directory that is named like a module must not be imported.
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()


def same_error(error: dict[str, str], path: str, name: str | None) -> AdmthError:
    """Return what was raised there; a temporary file goes by the name that it is to get."""
    kind = getattr(errors, error["type"], AdmthError)
    raised: AdmthError = kind(error["message"].replace(path, name or path))
    return raised


def crash_error(code: int, complaints: IO[bytes], task: str, mend: str) -> DeviceError:
    """Return the error for a worker that ended without an answer.

    Args:
        code: its exit code, negative for a signal.
        complaints: what it wrote on standard error.
        task: what it did, such as ``"ran model.onnx"``.
        mend: what to do where the process ended by itself.
    """
    complaints.seek(0)
    lines = complaints.read().decode(errors="replace").strip().splitlines()
    said = f" ({' '.join(lines[-1].split())[:200]})" if lines else ""
    if code < 0:
        try:
            cause = signal.Signals(-code).name
        except ValueError:
            cause = f"signal {-code}"
        return DeviceError(
            f"the process that {task} was ended by {cause}{said}: free memory if that was the system's doing, "
            "or reinstall the engine"
        )
    return DeviceError(f"the process that {task} failed with exit code {code}{said}: {mend}")
