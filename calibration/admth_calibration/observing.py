"""What values each tensor takes over the calibration images: extremes and a histogram, in bounded memory.

Two passes: extremes are reduced inside the graph, and then values are counted between them. Neither grows with the
number of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from admth_calibration.probing import Range, activation_batches, collect_ranges
from admth_runtime.errors import ModelError

__all__ = ["POINTS", "Observation", "channel_extremes", "observe"]

POINTS = 2048
"""Points of a histogram, from the smallest value to the largest: eight for each step of INT8."""

Batches = Callable[[], Iterable[NDArray[np.uint8]]]


@dataclass(frozen=True, eq=False)
class Observation:
    """Values of one tensor.

    Attributes:
        low: the smallest.
        high: the largest.
        counts: int64 ``[POINTS]``: how many values are nearest to each of the evenly spaced points from low to high.
            Points and not bins, so that the many values that are exactly 0 or exactly 6 are counted where they are.
    """

    low: float
    high: float
    counts: NDArray[np.int64]

    @property
    def points(self) -> NDArray[np.float32]:
        """The values that are counted, float32 ``[POINTS]``."""
        return np.linspace(self.low, self.high, POINTS, dtype=np.float32)


def observe(model: object, tensors: Sequence[str], batches: Batches, *, histograms: bool) -> Mapping[str, Observation]:
    """Observe tensors over images.

    Args:
        model: the FP32 model, an ``onnx.ModelProto``.
        tensors: float32 tensors of it, none of which is an output.
        batches: starts a pass over the pixels, uint8 ``[n, H, W, 3]`` each.
        histograms: count values too, in a second pass; else every count is zero.

    Raises:
        ModelError: a value is not finite.
    """
    import onnx

    assert isinstance(model, onnx.ModelProto)
    ranges = collect_ranges(model, tensors, batches())
    for name, found in ranges.items():
        if not np.isfinite(found.largest):
            raise ModelError(f"the tensor {name} is not finite on the calibration images: train again")
    counts = {name: np.zeros(POINTS, dtype=np.int64) for name in tensors}
    if histograms:
        types = dict.fromkeys(tensors, int(onnx.TensorProto.FLOAT))
        for values in activation_batches(model, types, batches()):
            for name, tensor in values.items():
                counts[name] += _counted(tensor, ranges[name])
    return {name: Observation(ranges[name].low, ranges[name].high, counts[name]) for name in tensors}


def channel_extremes(
    model: object, tensors: Sequence[str], batches: Iterable[NDArray[np.uint8]]
) -> dict[str, NDArray[np.float32]]:
    """Return the largest absolute value of every channel (axis 1) of tensors, float32 ``[channels]``, over images.

    Args:
        model: the FP32 model, an ``onnx.ModelProto``.
        tensors: float32 tensors of it, of rank 2 or more.
        batches: pixels, uint8 ``[n, H, W, 3]`` each.
    """
    import onnx

    assert isinstance(model, onnx.ModelProto)
    largest: dict[str, NDArray[np.float32]] = {}
    types = dict.fromkeys(tensors, int(onnx.TensorProto.FLOAT))
    for values in activation_batches(model, types, batches):
        for name, tensor in values.items():
            others = tuple(axis for axis in range(tensor.ndim) if axis != 1)
            found = np.abs(tensor).max(axis=others)
            largest[name] = np.maximum(largest[name], found) if name in largest else found
    return largest


def _counted(values: NDArray[np.float32], found: Range) -> NDArray[np.int64]:
    width = found.high - found.low
    if width <= 0:
        counts = np.zeros(POINTS, dtype=np.int64)
        counts[0] = values.size
        return counts
    places = (values.ravel() - np.float32(found.low)) * np.float32((POINTS - 1) / width)
    return np.bincount(np.clip(np.rint(places), 0, POINTS - 1).astype(np.int16), minlength=POINTS)
