"""What several tests of this folder need: where the rooms are, and a way to run commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
ROOMS = {
    "admth_runtime": REPOSITORY / "runtime" / "admth_runtime",
    "admth_training": REPOSITORY / "training" / "admth_training",
    "admth_calibration": REPOSITORY / "calibration" / "admth_calibration",
    "admth_export": REPOSITORY / "export" / "admth_export",
}
COMMANDS = {
    "admth-run": "admth_runtime",
    "admth-train": "admth_training",
    "admth-calibrate": "admth_calibration",
    "admth-export": "admth_export",
}

# PyTorch's threads wait for each other by spinning, which costs minutes where another program wants the processors.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class FinishedRun:
    """Where the run is, and what each command printed."""

    folder: Path
    pictures: Path
    fit: str
    evaluate: str
    export: str

    @property
    def model(self) -> Path:
        return self.folder / "model.onnx"


def modules_of(room: str) -> list[str]:
    """Name every module of a room, subpackages included."""
    folder = ROOMS[room]
    names = []
    for path in sorted(folder.rglob("*.py")):
        parts = [room, *path.relative_to(folder).with_suffix("").parts]
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def run(arguments: Sequence[str], cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a program, and fail with all that it printed when it does not exit with 0."""
    done = subprocess.run(
        arguments,
        cwd=cwd,
        env={**os.environ, **ONE_THREAD},
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == 0, f"{list(arguments)} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def python(code: str, cwd: Path | None = None, timeout: float = 300) -> str:
    """Run Python code in a new process and return what it printed."""
    return run([sys.executable, "-c", code], cwd, timeout).stdout


def command(name: str, *arguments: str, cwd: Path | None = None, timeout: float = 300) -> str:
    """Run one of the project's commands and return what it printed."""
    return run([sys.executable, "-m", COMMANDS[name], *arguments], cwd, timeout).stdout
