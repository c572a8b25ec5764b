"""What searching a segment leaves: the groups that may hold a query's nearest rows, and making hits of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.index.ragged import ranges
from admth_runtime.index.segment import Segment
from admth_runtime.index.selection import Selection

__all__ = ["FAR", "Candidates", "Part", "Score", "best_rows", "prune"]

FAR = 65535
"""A bound that every distance keeps."""

_MOST_UNSORTED = 4


@dataclass(frozen=True, eq=False)
class Part:
    """A segment, and the rows of it that this search may return."""

    segment: Segment
    selection: Selection


@dataclass(frozen=True, eq=False)
class Candidates:
    """Groups near a query.

    Attributes:
        groups: int64 ``[m]``.
        distances: their Hamming distances, ``[m]``.
        bound: every selected row nearer than this is among them, and some k rows are within it; :data:`FAR` while
            fewer than k are known.
    """

    groups: NDArray[np.int64]
    distances: NDArray[Any]
    bound: int = FAR

    @classmethod
    def none(cls) -> Candidates:
        """Return no groups."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint8))


Score = Callable[[Segment, NDArray[np.int64]], NDArray[np.float32]]
"""Gives each group of a segment a number by which one query's hits are ordered, smaller first."""


def prune(groups: NDArray[np.int64], distances: NDArray[Any], selection: Selection, k: int) -> Candidates:
    """Keep what lies within the distance at which k selected rows are reached, ties included."""
    if len(groups) > _MOST_UNSORTED * k and selection.whole:
        # Every group has a row, so k groups are a first bound, which needs no look at their sizes.
        near = np.flatnonzero(distances <= np.partition(distances, k - 1)[k - 1])
        groups, distances = groups[near], distances[near]
    counts = selection.counts(groups)
    if not selection.whole:
        here = np.flatnonzero(counts)
        groups, distances, counts = groups[here], distances[here], counts[here]
    within = np.cumsum(np.bincount(distances, weights=counts)) if len(groups) else np.zeros(1)
    if within[-1] < k:
        return Candidates(groups, distances)
    bound = int(np.searchsorted(within, k))
    near = np.flatnonzero(distances <= bound)
    return Candidates(groups[near], distances[near], bound)


def best_rows(
    parts: Sequence[Part], found: Sequence[Candidates], k: int, score: Score | None = None, depth: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.uint16], NDArray[np.float32] | None]:
    """Return the k best rows of all parts, by distance, or by score among the ``depth`` nearest; then by id.

    Args:
        parts: the parts of the index.
        found: what the search of each left.
        k: how many rows; there must be as many.
        score: how to order the nearest anew, or None.
        depth: with a score: rows within the distance of the depth-th nearest are ordered, ties included.

    Returns:
        Ids, distances and scores, ``[k]`` each.
    """
    within = _nearest_of_all(parts, found, max(k, depth) if score is not None else k)
    values = [
        near.distances if score is None else score(part.segment, near.groups)
        for part, near in zip(parts, within, strict=True)
    ]
    counts = [part.selection.counts(near.groups) for part, near in zip(parts, within, strict=True)]
    last = _kth(np.concatenate(values), np.concatenate(counts), k)
    ids, order_by, distances = [], [], []
    for part, near, value, count in zip(parts, within, values, counts, strict=True):
        starts, repeats, chosen = _first_rows(part, near.groups, value, count, last, k)
        ids.append(part.segment.ids(part.selection.rows_at(ranges(starts, repeats))))
        order_by.append(np.repeat(value[chosen], repeats))
        distances.append(np.repeat(near.distances[chosen], repeats))
    all_ids, all_values = np.concatenate(ids), np.concatenate(order_by)
    order = np.lexsort((all_ids, all_values))[:k]
    scores = all_values[order].astype(np.float32) if score is not None else None
    return all_ids[order], np.concatenate(distances)[order].astype(np.uint16), scores


def _nearest_of_all(parts: Sequence[Part], found: Sequence[Candidates], k: int) -> list[Candidates]:
    """Keep what lies within the distance at which k rows of all parts together are reached."""
    if len(parts) == 1:
        return list(found)
    counts = np.concatenate([part.selection.counts(near.groups) for part, near in zip(parts, found, strict=True)])
    bound = _kth(np.concatenate([near.distances for near in found]), counts, k)
    kept = [np.flatnonzero(near.distances <= bound) for near in found]
    return [Candidates(near.groups[keep], near.distances[keep]) for near, keep in zip(found, kept, strict=True)]


def _kth(values: NDArray[Any], counts: NDArray[np.int64], k: int) -> Any:
    """Return the value of the k-th row, or the greatest where there are fewer."""
    order = np.argsort(values, kind="stable")
    place = np.searchsorted(np.cumsum(counts[order]), k)
    return values[order[min(int(place), len(order) - 1)]] if len(order) else 0


def _first_rows(
    part: Part, groups: NDArray[np.int64], values: NDArray[Any], counts: NDArray[np.int64], last: Any, k: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Choose the groups that can hold one of the k best rows, and how many of their rows.

    A group's rows ascend by id, so no more than its first k matter. Of the groups that tie at the last value, only
    the k that begin with the lowest ids do.
    """
    starts = part.selection.starts.at(groups)
    ties = np.flatnonzero(values == last)
    if len(ties) > k:
        first_ids = part.segment.ids(part.selection.rows_at(starts[ties]))
        ties = ties[np.argpartition(first_ids, k - 1)[:k]]
    chosen = np.concatenate([np.flatnonzero(values < last), ties])
    return starts[chosen], np.minimum(counts[chosen], k), chosen
