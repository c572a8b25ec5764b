"""What INT8 gains in time: whole models as a ratio, interleaved, and layer by layer from ONNX Runtime's own profile."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from admth_calibration.probing import open_probe, session_options

if TYPE_CHECKING:
    import onnx

__all__ = ["LatencyMeter", "layer_times"]

_FLOAT_KERNELS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
_INT8_KERNELS = ("QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulIntegerToFloat")
_ROUNDS = 60


class LatencyMeter:
    """Measures candidates against the FP32 model: one image a call, both in turn, the fastest call of each.

    Other programs only ever add to a call's time, so the fastest of many is the one that they disturbed least.

    Args:
        model: the FP32 model.
        pixels: uint8 ``[n, H, W, 3]``.
        threads: CPU threads; None takes one a usable core.
    """

    def __init__(self, model: onnx.ModelProto, pixels: NDArray[np.uint8], *, threads: int | None = None) -> None:
        self._model = model
        self._pixels = pixels
        self._threads = threads
        self._names = [output.name for output in model.graph.output if output.name.startswith("code_")]

    def ratio(self, candidate: onnx.ModelProto, rounds: int = _ROUNDS) -> float:
        """Return the candidate's time over the FP32 model's: below 1 is faster."""
        times: tuple[list[float], list[float]] = ([], [])
        with (
            open_probe(self._model, self._names, threads=self._threads) as exact,
            open_probe(candidate, self._names, threads=self._threads) as rounded,
        ):
            for index in range(rounds):
                image = self._pixels[index % len(self._pixels) :][:1]
                for probe, found in zip((exact, rounded), times, strict=True):
                    start = time.perf_counter()
                    probe.run(image)
                    found.append(time.perf_counter() - start)
        return min(times[1]) / min(times[0])


def layer_times(
    model: onnx.ModelProto, pixels: NDArray[np.uint8], count: int, *, threads: int | None = None, runs: int = 20
) -> list[float] | None:
    """Return the time of every layer's kernel in microseconds, in order, by ONNX Runtime's profile.

    Args:
        model: any model.
        pixels: uint8 ``[n, H, W, 3]``.
        count: how many layers the model has.
        threads: CPU threads; None takes one a usable core.
        runs: inference calls, of one image each.

    Returns:
        ``count`` times, or None where the kernels do not match the layers one to one.
    """
    import onnxruntime as ort

    options = session_options(threads)
    options.enable_profiling = True
    with tempfile.TemporaryDirectory(prefix="admth-") as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(model.SerializeToString())
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=["WeightBiasQuantization"]
        )
        for index in range(runs):
            session.run(None, {"images": pixels[index % len(pixels) :][:1]})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return _by_layer(events, count)


def _by_layer(events: Sequence[dict[str, Any]], count: int) -> list[float] | None:
    times: dict[tuple[int, str], list[float]] = {}
    for event in events:
        facts = event.get("args", {})
        kernel = event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time")
        if kernel and facts.get("op_name") in (*_FLOAT_KERNELS, *_INT8_KERNELS):
            key = (int(facts.get("node_index", 0)), str(event["name"]))
            times.setdefault(key, []).append(float(event["dur"]))
    # Nodes run in the order of the graph, which is the order of the layers.
    found = [min(durations) for durations in times.values()]
    return found if len(found) == count else None
