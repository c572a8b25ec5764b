"""From observed values to the range that the integers cover: min-max, percentile, entropy and MSE.

Clipping a few large values makes the steps finer for all others. Which trade is best depends on the network, so the
method is a choice; MSE is the default, the least error of the values themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from admth_calibration.affine import Affine
from admth_calibration.observing import POINTS, Observation

__all__ = ["METHODS", "choose_range"]

_PERCENTILE = 99.99
_FACTORS = np.linspace(0.4, 1.0, 31)
_MakeAffine = Callable[[float, float], Affine]


def choose_range(observation: Observation, method: str, affine: _MakeAffine) -> tuple[float, float]:
    """Return the range to cover.

    Args:
        observation: what was seen; with its histogram, for every method but min-max.
        method: one of ``METHODS``.
        affine: makes a quantisation of a range; MSE minimises its error.
    """
    return METHODS[method](observation, affine)


def _min_max(observation: Observation, affine: _MakeAffine) -> tuple[float, float]:
    return observation.low, observation.high


def _percentile(observation: Observation, affine: _MakeAffine) -> tuple[float, float]:
    """Leave out the same share of values at both ends."""
    share = np.cumsum(observation.counts) / max(int(observation.counts.sum()), 1)
    tail = (1 - _PERCENTILE / 100) / 2
    low, high = (int(place) for place in np.searchsorted(share, [tail, 1 - tail]))
    points = observation.points
    return float(points[min(low, POINTS - 1)]), float(points[min(high, POINTS - 1)])


def _entropy(observation: Observation, affine: _MakeAffine) -> tuple[float, float]:
    """Keep the distribution: the threshold of least Kullback-Leibler divergence, by ONNX Runtime's own search."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    largest = max(abs(observation.low), abs(observation.high))
    if largest <= 0:
        return observation.low, observation.high
    # Its search takes a histogram that is symmetric around zero.
    edges = np.linspace(-largest, largest, POINTS + 1)
    counts, _ = np.histogram(observation.points, bins=edges, weights=observation.counts)
    collector = HistogramCollector("entropy", True, POINTS, 128, _PERCENTILE, "same")
    found = collector.get_entropy_threshold((counts, edges, -largest, largest, largest), 128)
    low, high = float(np.asarray(found[0]).reshape(())), float(np.asarray(found[1]).reshape(()))
    return max(low, observation.low), min(high, observation.high)


def _least_squares(observation: Observation, affine: _MakeAffine) -> tuple[float, float]:
    """Least mean squared error: shrink the upper end first, then the lower one."""
    points, counts = observation.points, observation.counts.astype(np.float64)

    def error(low: float, high: float) -> float:
        return float(counts @ np.square(affine(low, high).round(points) - points, dtype=np.float64))

    low, high = observation.low, observation.high
    both = min(_FACTORS, key=lambda factor: error(low * factor, high * factor))
    low, high = low * float(both), high * float(both)
    if low < 0 < high:
        high = min((high * float(factor) for factor in np.linspace(0.8, 1.2, 17)), key=lambda end: error(low, end))
        low = min((low * float(factor) for factor in np.linspace(0.8, 1.2, 17)), key=lambda end: error(end, high))
    return max(low, observation.low), min(high, observation.high)


METHODS: dict[str, Callable[[Observation, _MakeAffine], tuple[float, float]]] = {
    "min-max": _min_max,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _least_squares,
}
"""How ranges are chosen, by name."""
