"""One INT8 model by ONNX Runtime's own quantiser: ``python -m int8.make_ort RECIPE MODEL PIXELS OUT``.

A process of its own, so that its time and memory can be told.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

__all__ = ["RECIPES", "make"]

_BATCH = 16
# Histograms keep every activation of what they are given at once, so they are given this many batches.
_STRIDE = 4

_CPU = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
_TENSORRT = {
    "activation_type": QuantType.QInt8,
    "weight_type": QuantType.QInt8,
    "op_types_to_quantize": ["Conv", "Gemm", "MatMul"],
}
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ort-minmax": (_CPU, {}),
    "ort-float-logits": (_CPU, {"OpTypesToExcludeOutputQuantization": ["Gemm"]}),
    "ort-percentile": ({**_CPU, "calibrate_method": CalibrationMethod.Percentile}, {}),
    "ort-entropy": ({**_CPU, "calibrate_method": CalibrationMethod.Entropy}, {}),
    "ort-tensorrt": (
        _TENSORRT,
        {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv", "Gemm", "MatMul"],
            "AddQDQPairToWeight": False,
        },
    ),
}
"""Arguments and extra options of quantize_static beside QDQ, per channel, and the images."""


class Reader(CalibrationDataReader):
    """Gives the calibration pixels in batches, all of them or a range."""

    def __init__(self, pixels: np.ndarray) -> None:
        # Histograms take the batches in groups of equal size.
        self._batches = pixels[: len(pixels) // (_BATCH * _STRIDE) * _BATCH * _STRIDE].reshape(
            -1, _BATCH, *pixels.shape[1:]
        )
        self._rest: Iterator[np.ndarray] = iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Give these batches next."""
        self._rest = iter(self._batches[start_index:end_index])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch."""
        batch = next(self._rest, None)
        return None if batch is None else {"images": batch}


def packing_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the nodes behind the logits; in INT8 the powers of two that pack bits into bytes are no longer exact."""
    makers = {output: node for node in model.graph.node for output in node.output}
    needed: set[str] = set()
    open_tensors = [output.name for output in model.graph.output if output.name.startswith("logits_")]
    while open_tensors:
        node = makers.get(open_tensors.pop())
        if node is not None and node.name not in needed:
            needed.add(node.name)
            open_tensors.extend(node.input)
    return [node.name for node in model.graph.node if node.name not in needed]


def make(recipe: str, model: Path, pixels: np.ndarray, out: Path) -> None:
    """Preprocess as ONNX Runtime advises, calibrate and quantise."""
    arguments, extra = RECIPES[recipe]
    with tempfile.TemporaryDirectory(prefix="admth-") as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(model, prepared)
        quantize_static(
            prepared,
            out,
            Reader(pixels),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            nodes_to_exclude=packing_nodes(onnx.load(prepared, load_external_data=False)),
            extra_options={**extra, "CalibStridedMinMax": _STRIDE},
            **arguments,
        )


if __name__ == "__main__":
    chosen, source, arrays, target = sys.argv[1:]
    make(chosen, Path(source), np.load(arrays)["calibration"], Path(target))
