"""Our side of the parity gate's second process: start :mod:`admth_export.candidate`, feed it, and read its answer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime import errors
from admth_runtime.console import progress
from admth_runtime.errors import AdmthError, DeviceError

__all__ = ["CandidateOutputs", "EngineFacts", "run_candidate"]


@dataclass(frozen=True)
class EngineFacts:
    """The engine that ran a candidate.

    Attributes:
        name: the inference software.
        version: its version.
        device: ``"cpu"`` or ``"cuda"``.
        threads: CPU threads of one inference call.
    """

    name: str
    version: str
    device: str
    threads: int

    def __str__(self) -> str:
        return f"{self.name} {self.version} on {self.device}, {self.threads} thread{'s' * (self.threads != 1)}"


@dataclass(frozen=True, eq=False)
class CandidateOutputs:
    """What a candidate gave for the first images, in batches of one size.

    Attributes:
        batch_size: images an inference call.
        codes: packed uint8 ``[n, L / 8]`` by code length L.
        logits: float32 ``[n, L]`` by code length L.
    """

    batch_size: int
    codes: dict[int, NDArray[np.uint8]]
    logits: dict[int, NDArray[np.float32]]


def run_candidate(
    model: Path,
    pixels: NDArray[np.uint8],
    runs: Sequence[tuple[int, int]],
    *,
    device: str = "cpu",
    threads: int | None = None,
    name: str | None = None,
) -> tuple[list[CandidateOutputs], EngineFacts]:
    """Run a model on pixels in a process of its own, with a progress bar.

    Args:
        model: the model's file.
        pixels: uint8 ``[n, H, W, 3]``.
        runs: pairs of batch size and number of images; each run takes that many of the first images.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: CPU threads of one inference call; None takes one a physical core.
        name: what messages call the model; without it, its path.

    Returns:
        The outputs of each run, and the engine.

    Raises:
        AdmthError: what the runtime says of the model or the device.
        DeviceError: the process crashed or was killed.
    """
    request = {
        "model": str(model),
        "device": device,
        "threads": threads,
        "shape": list(pixels.shape),
        "runs": [list(run) for run in runs],
    }
    with tempfile.TemporaryFile() as complaints, _started(complaints) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        # A process that died before it has read everything is told from its exit code below.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.write(np.ascontiguousarray(pixels).data.cast("B"))
            process.stdin.close()
        with progress("engine", sum(count for _, count in runs), unit="images") as advance:
            for line in iter(process.stdout.readline, b""):
                message = json.loads(line)
                if "advance" in message:
                    advance(message["advance"])
                elif "error" in message:
                    raise _same_error(message["error"], str(model), name)
                elif (found := _outputs(process.stdout, message["result"], runs)) is not None:
                    return found
        raise _crash(process.wait(), complaints, name or str(model))


@contextlib.contextmanager
def _started(complaints: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Start the process and end it with the block, whatever happens in it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "admth_export.candidate"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        # A file in the working directory that is named like a module must not be imported.
        env={**os.environ, "PYTHONSAFEPATH": "1"},
        # Ctrl-C goes to us alone, and we end the process.
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


def _outputs(
    source: IO[bytes], result: dict[str, Any], runs: Sequence[tuple[int, int]]
) -> tuple[list[CandidateOutputs], EngineFacts] | None:
    """Read the arrays; None where the process ended before all had come."""
    outputs = [CandidateOutputs(batch_size, {}, {}) for batch_size, _ in runs]
    for key, dtype, shape in result["arrays"]:
        size = np.dtype(dtype).itemsize * int(np.prod(shape))
        if len(content := source.read(size)) != size:
            return None
        array = np.frombuffer(content, dtype=dtype).reshape(shape)
        place, _, name = key.partition("/")
        kind, _, length = name.partition("_")
        target: dict[int, NDArray[Any]] = outputs[int(place)].codes if kind == "code" else outputs[int(place)].logits
        target[int(length)] = array
    return outputs, EngineFacts(**result["engine"])


def _same_error(error: dict[str, str], path: str, name: str | None) -> AdmthError:
    """Return what was raised there; a temporary file goes by the name that it is to get."""
    kind = getattr(errors, error["type"], AdmthError)
    raised: AdmthError = kind(error["message"].replace(path, name or path))
    return raised


def _crash(code: int, complaints: IO[bytes], name: str) -> DeviceError:
    complaints.seek(0)
    lines = complaints.read().decode(errors="replace").strip().splitlines()
    said = f" ({' '.join(lines[-1].split())[:200]})" if lines else ""
    if code < 0:
        try:
            cause = signal.Signals(-code).name
        except ValueError:
            cause = f"signal {-code}"
        return DeviceError(
            f"the process that ran {name} was ended by {cause}{said}: free memory if that was the system's doing, "
            "or reinstall the engine"
        )
    return DeviceError(f"the process that ran {name} failed with exit code {code}{said}: run  admth-run doctor")
