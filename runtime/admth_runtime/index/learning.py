"""Learning from rows of an index how far to probe; see :mod:`admth_runtime.index.tuning`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from admth_runtime.index.candidates import Candidates, Part, prune
from admth_runtime.index.coarse import scan_is_as_good
from admth_runtime.index.flat import search_flat
from admth_runtime.index.probing import key_weights
from admth_runtime.index.segment import keys_of
from admth_runtime.index.state import IndexState
from admth_runtime.index.tuning import JUDGED_NEIGHBOURS, SAMPLED_NEIGHBOURS, Tuning, cheapest_costs
from admth_runtime.packing import UInt8Array

__all__ = ["tune"]

# Samples searched for at a time.
_MOST_QUERIES = 256
# Rows that stand for queries without logits. Of a large index fewer samples are used, for the time they take.
_ROWS = 1000
_COMPARISONS = 5 << 30
_FEWEST, _MOST = 200, 2000


def tune(state: IndexState, kind: str, length: int) -> Tuning:
    """Learn how far to probe from rows of the index, each without itself.

    Args:
        state: an index with at least one image.
        kind: ``logits``, for queries that have them, from the sample; or ``distance``.
        length: the code length to compare.
    """
    slot = max(state.slots, key=lambda slot: slot.live)
    part = Part(slot.segment, slot.selection)
    if kind == "logits" and state.sample is not None:
        samples = _Samples(state.sample.codes[length], state.sample.keys, state.sample.weights)
    else:
        samples = _rows_as_samples(part, length)
    # A row finds itself, at distance 0 and cost 0, so its k nearest others are its k + 1 nearest.
    wanted = [k + 1 for k in SAMPLED_NEIGHBOURS if k + 1 <= len(part.selection)]
    if length not in part.segment.words or not wanted or scan_is_as_good(part.segment):
        return _nothing(length)
    samples = samples.thinned(min(_MOST, max(_FEWEST, _COMPARISONS // part.segment.groups)))
    distances: list[int] = []
    costs: list[float] = []
    near_distances: list[int] = []
    near_costs: list[NDArray[np.float32]] = []
    for near, key, weights in zip(
        _nearest(part, length, samples, wanted[-1]), samples.keys, samples.weights, strict=True
    ):
        for k in wanted:
            nearest = prune(near.groups, near.distances, part.selection, k)
            cheapest = cheapest_costs(part.segment, part.selection, nearest, key, weights, k)
            distances.append(nearest.bound)
            costs.append(float(cheapest[-1]))
            if k == JUDGED_NEIGHBOURS + 1:
                near_distances.append(nearest.bound)
                near_costs.append(cheapest[1:])
    return Tuning(
        length,
        np.array(distances, dtype=np.uint16),
        np.array(costs, dtype=np.float32),
        np.array(near_distances, dtype=np.uint16),
        np.array(near_costs, dtype=np.float32).reshape(-1, JUDGED_NEIGHBOURS),
    )


def _nothing(length: int) -> Tuning:
    none = np.empty(0, dtype=np.float32)
    return Tuning(length, none.astype(np.uint16), none, none.astype(np.uint16), none.reshape(0, JUDGED_NEIGHBOURS))


class _Samples:
    """Queries: codes, keys and weights of the keys' bits."""

    def __init__(self, codes: UInt8Array, keys: NDArray[np.uint16], weights: NDArray[np.float32]) -> None:
        self.codes, self.keys, self.weights = codes, keys, weights

    def thinned(self, size: int) -> _Samples:
        rows = np.arange(0, len(self.keys), -(-len(self.keys) // size))
        return _Samples(self.codes[rows], self.keys[rows], self.weights[rows])


def _rows_as_samples(part: Part, length: int) -> _Samples:
    segment = part.segment
    rows = part.selection.rows_at(np.unique(np.linspace(0, len(part.selection) - 1, _ROWS).astype(np.int64)))
    groups = segment.groups_of(rows)
    keys = keys_of(segment.codes(segment.code_lengths[0], groups))
    return _Samples(segment.codes(length, groups), keys, key_weights(None, len(rows), segment.key_bits))


def _nearest(part: Part, length: int, samples: _Samples, k: int) -> list[Candidates]:
    return [
        near
        for first in range(0, len(samples.codes), _MOST_QUERIES)
        for near in search_flat(part, samples.codes[first : first + _MOST_QUERIES], length, k)
    ]
