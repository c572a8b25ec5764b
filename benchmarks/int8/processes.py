"""Commands in processes of their own: what one takes, in time and memory, is then its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from _harness import ROOT

from admth_runtime.console import note

__all__ = ["Spent", "WorkError", "admth", "execute"]


class WorkError(RuntimeError):
    """A command failed; the message is its last line, with the repository's place left out."""

    def __init__(self, message: str) -> None:
        super().__init__(message.replace(f"{ROOT}/", ""))


@dataclass(frozen=True)
class Spent:
    """What a command took.

    Attributes:
        seconds: of wall clock.
        peak_bytes: most resident memory of the process, or of the largest of its own children.
        output: standard output.
    """

    seconds: float
    peak_bytes: int
    output: str


def admth(program: str) -> list[str]:
    """Return the command line of ``admth-train`` and its like, of the interpreter that runs this."""
    package = {"admth-train": "admth_training", "admth-calibrate": "admth_calibration", "admth-export": "admth_export"}
    return [sys.executable, "-m", package[program]]


def execute(command: Sequence[str], *, environment: Mapping[str, str] | None = None, log: Path | None = None) -> Spent:
    """Run a command to its end.

    Args:
        command: program and arguments.
        environment: variables that it gets beside those of this process.
        log: a file for its standard error; None shows it.

    Raises:
        WorkError: it exits with another code than 0; the message is its last line on standard error.
    """
    note(f"$ {' '.join(_short(word) for word in command)}")
    variables = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **(environment or {})}
    started = time.monotonic()
    error_file = log.open("w+", encoding="utf-8") if log is not None else None
    try:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=error_file, text=True, env=variables, cwd=ROOT
        ) as process:
            assert process.stdout is not None
            output = process.stdout.read()
            # wait4 reports this child alone, unlike RUSAGE_CHILDREN, which keeps the largest of all so far.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if error_file is not None:
            error_file.close()
    if process.returncode:
        raise WorkError(_last_line(log) or f"{Path(command[0]).name} failed with exit code {process.returncode}")
    return Spent(round(time.monotonic() - started, 1), usage.ru_maxrss * 1024, output)


def _short(word: str) -> str:
    return word.replace(f"{ROOT}/", "")


def _last_line(log: Path | None) -> str | None:
    if log is None:
        return None
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else None
