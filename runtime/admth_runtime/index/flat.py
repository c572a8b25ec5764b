"""Exact search by a scan over the distinct codes, with FAISS where it helps, else in NumPy: the same results."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.index.candidates import FAR, Candidates, Part, prune
from admth_runtime.index.ragged import ranges
from admth_runtime.index.segment import keys_of
from admth_runtime.index.words import Words, to_words, word_distances
from admth_runtime.packing import UInt8Array, popcount

__all__ = ["search_flat"]

# Codes compared at a time: they and their distances stay in the processor's cache.
_BLOCK = 1 << 15
# Beyond this many kept candidates a query's bound is drawn tighter.
_MOST_KEPT = 1 << 16
# A gathered comparison costs about as much as this many in a row.
_FEW = 8
# Comparisons from which loading FAISS pays; it takes a third of a second once.
_FAISS_PAYS = 1 << 24
# FAISS keeps these beyond k: many codes tie at the k-th, and it does not say how many.
_MORE_FOR_TIES = 256
# FAISS keeps the nearest in a heap, which is slow for many.
_MOST_FAISS_NEIGHBOURS = 1000


def search_flat(part: Part, queries: UInt8Array, length: int, k: int) -> list[Candidates]:
    """Find every group within the distance of the k-th nearest row of each query.

    Args:
        part: a segment with at least one selected row.
        queries: packed codes, uint8 ``[q, length / 8]``.
        length: the code length.
        k: how many rows.
    """
    segment = part.segment
    if length not in segment.words:
        return [_search_keys(part, key, k) for key in keys_of(queries)]
    words, wanted = segment.words[length], to_words(queries)
    if not part.selection.whole and _FEW * len(part.selection) < segment.groups:
        return _search_rows(part, words, wanted, k)
    few = k + _MORE_FOR_TIES <= min(segment.groups, _MOST_FAISS_NEIGHBOURS)
    if part.selection.whole and few and len(wanted) * segment.groups >= _FAISS_PAYS and _has_faiss():
        return _search_faiss(part, words, wanted, k)
    return _scan(part, words, wanted, k, np.full(len(wanted), FAR))


def _search_keys(part: Part, key: np.uint16, k: int) -> Candidates:
    """Search the shortest code, which is the key: compare at most 65,536 keys, then name the groups of the nearest."""
    segment, selection = part.segment, part.selection
    distances = popcount(segment.bucket_keys ^ key)
    starts = segment.bucket_starts.astype(np.int64)
    rows = np.diff(selection.starts.at(starts))
    within = np.cumsum(np.bincount(distances, weights=rows))
    bound = int(np.searchsorted(within, min(k, within[-1])))
    near = np.flatnonzero((distances <= bound) & (rows > 0))
    sizes = starts[1:][near] - starts[:-1][near]
    return prune(ranges(starts[:-1][near], sizes), np.repeat(distances[near], sizes), selection, k)


def _search_rows(part: Part, words: Words, queries: Words, k: int) -> list[Candidates]:
    """Compare the groups of the selected rows only, where these are few."""
    groups = np.unique(part.segment.groups_of(part.selection.rows_at(np.arange(len(part.selection)))))
    table = words[groups]
    return [prune(groups, word_distances(table, query), part.selection, k) for query in queries]


def _scan(part: Part, words: Words, queries: Words, k: int, bounds: NDArray[Any]) -> list[Candidates]:
    """Compare block by block, and keep for each query what is within its bound so far."""
    selection = part.selection
    kept: list[list[tuple[NDArray[np.int64], NDArray[Any]]]] = [[] for _ in queries]
    sizes = [0] * len(queries)
    limits = [1 if bound == FAR else _MOST_KEPT for bound in bounds]
    bounds = bounds.tolist()
    for start in range(0, len(words), _BLOCK):
        block = words[start : start + _BLOCK]
        for number, query in enumerate(queries):
            distances = word_distances(block, query)
            near = np.flatnonzero(distances <= bounds[number])
            if len(near) == 0:
                continue
            kept[number].append((near + start, distances[near]))
            sizes[number] += len(near)
            if sizes[number] >= limits[number]:
                tight = prune(*_joined(kept[number]), selection, k)
                kept[number] = [(tight.groups, tight.distances)]
                bounds[number], sizes[number] = tight.bound, 0
                # Without a bound everything is kept, so the next look comes after as much again.
                limits[number] = max(len(tight.groups), 1 if tight.bound == FAR else _MOST_KEPT)
    return [prune(*_joined(pairs), selection, k) for pairs in kept]


def _search_faiss(part: Part, words: Words, queries: Words, k: int) -> list[Candidates]:
    """Let FAISS find more than k groups of each query, and scan again for ties where those it found all tie."""
    import faiss

    as_bytes = [np.ascontiguousarray(table).view(np.uint8).reshape(len(table), -1) for table in (queries, words)]
    distances, groups = faiss.knn_hamming(as_bytes[0], as_bytes[1], k + _MORE_FOR_TIES)
    found = [prune(near, far, part.selection, k) for near, far in zip(groups.astype(np.int64), distances, strict=True)]
    cut = np.flatnonzero([near.bound == far for near, far in zip(found, distances[:, -1], strict=True)])
    bounds = np.array([found[number].bound for number in cut])
    for number, near in zip(cut, _scan(part, words, queries[cut], k, bounds), strict=True):
        found[number] = near
    return found


def _joined(pairs: list[tuple[NDArray[np.int64], NDArray[Any]]]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    if not pairs:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint8)
    groups, distances = zip(*pairs, strict=True)
    return np.concatenate(groups), np.concatenate(distances)


@cache
def _has_faiss() -> bool:
    return importlib.util.find_spec("faiss") is not None
