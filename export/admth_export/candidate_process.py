"""Our side of the parity gate's second process: start :mod:`admth_export.candidate`, feed it, and read its answer."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from admth_export.worker_process import crash_error, same_error, started_worker
from admth_runtime.console import progress

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
    with tempfile.TemporaryFile() as complaints, started_worker("admth_export.candidate", complaints) as process:
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
                    raise same_error(message["error"], str(model), name)
                elif (found := _outputs(process.stdout, message["result"], runs)) is not None:
                    return found
        raise crash_error(process.wait(), complaints, f"ran {name or model}", "run  admth-run doctor")


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
