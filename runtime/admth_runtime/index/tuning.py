"""How far to probe: learnt from sample queries whose exact neighbours are known.

A neighbour at 64-bit distance D has a key that costs little for the query, but how little depends on the network and
on D. So for sample queries the exact search gives D, the distance of the k-th neighbour, and the cost up to which the
buckets hold k rows within D. A *limit* at D is a quantile of the costs of the samples nearest to D: a search that has
found k rows within D + 1 stops at the limit of D, for beyond it a nearer row is unlikely.

Which quantile gives which recall follows from the samples too. A search that misses some of a sample's k nearest, which
are within D, has not found k rows within D, so it went on to the limit of D at least: it missed no more than those of
them whose buckets cost more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import InputError
from admth_runtime.index.candidates import Candidates
from admth_runtime.index.probing import key_costs
from admth_runtime.index.segment import Segment
from admth_runtime.index.selection import Selection

__all__ = ["JUDGED_NEIGHBOURS", "QUANTILES", "SAMPLED_NEIGHBOURS", "Tuning", "cheapest_costs", "check_recall"]

QUANTILES = (0.8, 0.9, 0.95, 0.97, 0.98, 0.985, 0.99, 0.9925, 0.995, 0.9975, 0.999, 1.0)
"""The quantiles that are judged, from the first."""

SAMPLED_NEIGHBOURS = (1, 10, 100)
"""The k for which samples are taken: they spread the distances."""

JUDGED_NEIGHBOURS = 10
"""The k for which the recall of a quantile is judged."""

# Samples whose distances are nearest to D decide the limit at D.
_WINDOW = 200
# Of the misses that a recall allows, the samples may have half: rows of the index are easier than new images, since the
# network has often been trained on the like of them.
_CAUTION = 2


@dataclass(frozen=True, eq=False)
class Tuning:
    """Samples of how far a probe must go.

    Attributes:
        length: the code length whose distances these are.
        distances: of the k-th neighbour, uint16 ``[s]``.
        costs: up to which the buckets hold k rows within that distance, float32 ``[s]``.
        near_distances: of some samples' neighbour number :data:`JUDGED_NEIGHBOURS`, uint16 ``[m]``.
        near_costs: of the cheapest buckets of so many rows within that distance, ascending, float32 ``[m, k]``.
    """

    length: int
    distances: NDArray[np.uint16]
    costs: NDArray[np.float32]
    near_distances: NDArray[np.uint16]
    near_costs: NDArray[np.float32]
    _limits: dict[float, NDArray[np.float32]] = field(default_factory=dict, repr=False)

    def limits(self, recall: float) -> NDArray[np.float32]:
        """Return the limits by the bound that a search has: ``limits[D]`` holds while k rows within D are known.

        Args:
            recall: from 0 to 1, the share of the nearest rows that shall be found; 1 gives no limit.

        Returns:
            float32 ``[length + 1]``, ascending; infinite beyond the distances that were sampled.
        """
        if recall not in self._limits:
            if recall >= 1:
                found = np.full(self.length + 1, np.inf, dtype=np.float32)
            else:
                allowed = (1 - recall) / _CAUTION
                found = next((limits for limits, missed in self._judged() if missed <= allowed), self.limits_at(1.0))
            self._limits[recall] = found
        return self._limits[recall]

    def _judged(self) -> Iterator[tuple[NDArray[np.float32], float]]:
        """Yield the limits at each quantile with the share of neighbours that they miss, or a little more.

        Two standard errors are added: a few hundred samples say little of what one query in a thousand needs.
        """
        for quantile in QUANTILES if len(self.near_costs) else ():
            limits = self.limits_at(quantile)
            reached = limits[np.minimum(self.near_distances.astype(np.int64) + 1, self.length)]
            missed = (self.near_costs > reached[:, None]).mean(axis=1)
            yield limits, float(missed.mean() + 2 * missed.std() / np.sqrt(len(missed)))

    def limits_at(self, quantile: float) -> NDArray[np.float32]:
        """Return the limits at a quantile; see :meth:`limits`."""
        limits = np.full(self.length + 1, np.inf, dtype=np.float32)
        limits[0] = -np.inf  # nothing is nearer than 0
        if len(self.distances) == 0:
            return limits
        window = min(_WINDOW, len(self.distances))
        for distance in range(min(int(self.distances.max()) + 1, self.length)):
            far = np.abs(self.distances.astype(np.int32) - distance)
            near = far <= np.partition(far, window - 1)[window - 1]
            limits[distance + 1] = np.quantile(self.costs[near], quantile)
        finite = np.isfinite(limits)
        limits[finite] = np.maximum.accumulate(limits[finite])
        return limits


def cheapest_costs(
    segment: Segment, selection: Selection, near: Candidates, key: np.uint16, weights: NDArray[np.float32], k: int
) -> NDArray[np.float32]:
    """Return the costs of the buckets of the k candidate rows that are cheapest to reach, ascending, ``[k]``."""
    buckets = np.searchsorted(segment.bucket_starts, near.groups.astype(np.uint32), side="right") - 1
    costs = key_costs(segment.bucket_keys[buckets], key, weights)
    order = np.argsort(costs, kind="stable")
    return np.repeat(costs[order], np.minimum(selection.counts(near.groups[order]), k))[:k]


def check_recall(recall: float) -> float:
    """Return a recall to aim at.

    Raises:
        InputError: it is not above 0 and at most 1.
    """
    if isinstance(recall, bool) or not isinstance(recall, (int, float)) or not 0 < recall <= 1:
        raise InputError(f"recall {recall!r} is not above 0 and at most 1: aim at 0.99, or at 1 to probe everything")
    return float(recall)
