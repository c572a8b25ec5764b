"""NNCF and OpenVINO, in the environment that has them.

    python nncf_worker.py make-onnx MODEL PIXELS OUT.onnx        NNCF quantises the ONNX model
    python nncf_worker.py make-openvino MODEL PIXELS OUT.xml     NNCF quantises the model in OpenVINO's form
    python nncf_worker.py run FP32.onnx PIXELS OUT.npz THREADS CANDIDATE...
                                                                 OpenVINO runs candidates; FP32 ONNX Runtime beside them

It imports nothing of admth, so that the environment needs nothing of it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_ROUNDS = 200
_SECONDS = 60.0
_BATCH = 50


def make_onnx(model: str, pixels: str, out: str) -> None:
    """Quantise with nncf.quantize's defaults and all calibration images."""
    import nncf
    import onnx

    dataset, size = _images(pixels)
    onnx.save(nncf.quantize(onnx.load(model), dataset, subset_size=size), out)


def make_openvino(model: str, pixels: str, out: str) -> None:
    """Do the same in OpenVINO's form, which is its home."""
    import nncf
    import openvino

    dataset, size = _images(pixels)
    quantized = nncf.quantize(openvino.Core().read_model(model), dataset, subset_size=size)
    openvino.save_model(quantized, out, compress_to_fp16=False)


def _images(pixels: str) -> tuple[Any, int]:
    import nncf

    images = np.load(pixels)["calibration"]
    # One image a batch, as in NNCF's own examples.
    batches = [images[index : index + 1] for index in range(len(images))]
    return nncf.Dataset(batches, lambda batch: {"images": batch}), len(images)


def run(reference: str, pixels: str, out: str, threads: str, *candidates: str) -> None:
    """Write each candidate's logits, and its speed as a ratio to FP32 ONNX Runtime, timed in turn."""
    test = np.load(pixels)["test"]
    base = _onnxruntime(reference, int(threads))
    arrays: dict[str, np.ndarray] = {}
    speeds: dict[str, dict[str, float]] = {}
    for candidate in candidates:
        infer = _openvino(candidate, int(threads))
        parts = [infer(test[start : start + _BATCH]) for start in range(0, len(test), _BATCH)]
        name = Path(candidate).name
        for output in parts[0]:
            if output.startswith("logits_"):
                arrays[f"{name}/{output}"] = np.concatenate([part[output] for part in parts])
        speeds[name] = {str(size): _ratio(base, infer, test[:size]) for size in (1, 8)}
    with Path(out).open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    print(json.dumps(speeds))


def _ratio(base: Callable[[np.ndarray], Any], other: Callable[[np.ndarray], Any], images: np.ndarray) -> float:
    ratios = []
    end = time.perf_counter() + _SECONDS
    for done in range(_ROUNDS):
        times = []
        for infer in (base, other) if done % 2 == 0 else (other, base):
            start = time.perf_counter()
            infer(images)
            times.append(time.perf_counter() - start)
        if done >= 3:
            ratios.append(times[0] / times[1] if done % 2 == 0 else times[1] / times[0])
        if time.perf_counter() > end and len(ratios) >= 5:
            break
    return round(float(np.median(ratios)), 4)


def _onnxruntime(model: str, threads: int) -> Callable[[np.ndarray], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})


def _openvino(model: str, threads: int) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.compile_model(model, "CPU", settings).create_infer_request()

    def infer(images: np.ndarray) -> dict[str, np.ndarray]:
        return {key.get_any_name(): value.copy() for key, value in request.infer({"images": images}).items()}

    return infer


if __name__ == "__main__":
    {"make-onnx": make_onnx, "make-openvino": make_openvino, "run": run}[sys.argv[1]](*sys.argv[2:])
