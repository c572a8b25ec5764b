"""Coarse to fine: look into the buckets of the short code best first, and compare the long codes in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from admth_runtime.index.candidates import FAR, Candidates, Part, prune
from admth_runtime.index.flat import search_flat
from admth_runtime.index.probing import Probes, key_costs, likely_probes
from admth_runtime.index.ragged import ranges
from admth_runtime.index.segment import Segment
from admth_runtime.index.words import Words, gathered_distances, to_words
from admth_runtime.packing import UInt8Array

__all__ = ["scan_is_as_good", "search_coarse"]

_FIRST_QUOTA = 1 << 11  # groups to compare before the first look at how far to go on; then three times as many
_QUOTA_GROWTH = 3
# Comparing a group that must be gathered costs about as much as this many in a row: then a scan is as good.
_SCAN_PAYS = 8


@dataclass(frozen=True, eq=False)
class _Buckets:
    """Buckets to probe: which, what each costs, ascending, its first group and its number of groups."""

    places: NDArray[np.int64]
    costs: NDArray[np.float32]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]


def search_coarse(
    part: Part,
    queries: UInt8Array,
    length: int,
    keys: NDArray[np.uint16],
    weights: NDArray[np.float32],
    limits: NDArray[np.float32],
    k: int,
) -> list[Candidates]:
    """Find most groups within the distance of the k-th nearest row of each query.

    Args:
        part: a segment with at least one selected row.
        queries: packed codes, uint8 ``[q, length / 8]``.
        length: the code length to compare.
        keys: the queries' own keys, ``[q]``.
        weights: what changing each bit of a key costs, float32 ``[q, bits]``.
        limits: the cost to stop at, by the distance within which k rows are known, float32 ``[length + 1]``.
        k: how many rows.
    """
    few_rows = not part.selection.whole and _SCAN_PAYS * len(part.selection) < part.segment.groups
    if few_rows or scan_is_as_good(part.segment):
        return search_flat(part, queries, length, k)
    probes, table, wanted = likely_probes(keys, weights), part.segment.words[length], to_words(queries)
    found = []
    for number, query in enumerate(wanted):
        sure = float(probes.complete_below[number])
        likely = _likely_buckets(part, probes, number)
        near = _equals(part, table, query, keys[number], k) if length == part.segment.code_lengths[-1] else None
        if near is None or limits[near.bound] > -np.inf:
            near = _probe(part, table, query, likely, limits, k)
        if near is not None and _limit(near, limits) >= sure < np.inf:
            costs = key_costs(part.segment.bucket_keys, keys[number], weights[number])
            costs[likely.places] = np.inf  # not a second time: their groups would count twice
            within = np.flatnonzero((costs <= _limit(near, limits)) & (costs < np.inf))
            within = within[np.argsort(costs[within], kind="stable")]
            near = _probe(part, table, query, _buckets(part, within, costs[within]), limits, k, near)
        found.append(search_flat(part, queries[number : number + 1], length, k)[0] if near is None else near)
    return found


def scan_is_as_good(segment: Segment) -> bool:
    """Tell whether a segment is so small that probing it gains nothing."""
    return segment.groups < _SCAN_PAYS * _FIRST_QUOTA


def _equals(part: Part, table: Words, query: Words, key: np.uint16, k: int) -> Candidates | None:
    """Return the groups in the query's own bucket that equal it, where these hold k rows, else None.

    The groups of a bucket are sorted by the longest code, the last word first. Trained codes repeat so much that
    often the search ends here.
    """
    segment = part.segment
    place = int(np.searchsorted(segment.bucket_keys, key))
    if place == len(segment.bucket_keys) or segment.bucket_keys[place] != key:
        return None
    first, end = int(segment.bucket_starts[place]), int(segment.bucket_starts[place + 1])
    last_words = table[first:end, -1]
    start, stop = (first + int(np.searchsorted(last_words, query[-1], side=side)) for side in ("left", "right"))
    same = start + np.flatnonzero((table[start:stop] == query).all(axis=1))
    near = prune(same, np.zeros(len(same), dtype=np.uint8), part.selection, k)
    return None if near.bound == FAR else near


def _limit(near: Candidates, limits: NDArray[np.float32]) -> float:
    return np.inf if near.bound == FAR else float(limits[near.bound])


def _likely_buckets(part: Part, probes: Probes, number: int) -> _Buckets:
    """Return the buckets that a query probes first, as far as their order is sure."""
    known = part.segment.bucket_keys
    sure = int(np.searchsorted(probes.costs[number], probes.complete_below[number]))
    keys = probes.keys[number, :sure]
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    there = np.flatnonzero(known[places] == keys)
    return _buckets(part, places[there], probes.costs[number, there])


def _buckets(part: Part, places: NDArray[np.int64], costs: NDArray[np.float32]) -> _Buckets:
    starts = part.segment.bucket_starts
    first = starts[places].astype(np.int64)
    return _Buckets(places, costs, first, starts[places + 1] - first)


def _probe(
    part: Part,
    table: Words,
    query: Words,
    buckets: _Buckets,
    limits: NDArray[np.float32],
    k: int,
    near: Candidates | None = None,
) -> Candidates | None:
    """Look into buckets in growing portions, until the next costs more than the limit of what was found.

    Returns:
        What was found with what was known before, or None where so much is to be compared that a scan is as good.
    """
    near = Candidates.none() if near is None else near
    before = np.cumsum(buckets.sizes) - buckets.sizes
    place, quota = 0, _FIRST_QUOTA
    while place < len(before) and buckets.costs[place] <= _limit(near, limits):
        affordable = int(np.searchsorted(buckets.costs, _limit(near, limits), side="right"))
        end = min(affordable, int(np.searchsorted(before, quota)))
        if end > place:
            if _SCAN_PAYS * int(before[end - 1] + buckets.sizes[end - 1]) > part.segment.groups:
                return None
            near = _compare(part, table, query, buckets.starts[place:end], buckets.sizes[place:end], near, k)
            place = end
        quota *= _QUOTA_GROWTH
    return near


def _compare(
    part: Part,
    table: Words,
    query: Words,
    starts: NDArray[np.int64],
    sizes: NDArray[np.int64],
    near: Candidates,
    k: int,
) -> Candidates:
    """Compare the groups of some buckets, and keep them and what was near so far within the new bound."""
    groups = ranges(starts, sizes)
    distances = gathered_distances(table, groups, query)
    if near.bound != FAR:
        closer = np.flatnonzero(distances <= near.bound)
        groups, distances = groups[closer], distances[closer]
    return prune(np.concatenate([near.groups, groups]), np.concatenate([near.distances, distances]), part.selection, k)
