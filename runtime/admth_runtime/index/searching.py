"""Answering queries over all segments of an index."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import InputError
from admth_runtime.index.candidates import Candidates, Part, Score, best_rows
from admth_runtime.index.coarse import search_coarse
from admth_runtime.index.flat import search_flat
from admth_runtime.index.hits import SearchHits
from admth_runtime.index.multi_index import search_multi_index
from admth_runtime.index.query import Query
from admth_runtime.index.rerank import make_score
from admth_runtime.index.selection import IdFilter
from admth_runtime.index.state import IndexState, Slot
from admth_runtime.index.tuning import Tuning

__all__ = ["check_k", "search"]

# Queries answered at a time, so that what is kept of each stays small.
_MOST_QUERIES = 256


def search(state: IndexState, query: Query, chosen: IdFilter, tuning: Tuning | None) -> SearchHits:
    """Find the nearest rows of each query.

    Args:
        state: the index.
        query: the queries.
        chosen: which ids may be found.
        tuning: how far to probe; only where the mode is ``coarse``.

    Raises:
        InputError: fewer than k rows may be found, or tables that the mode needs are not there.
    """
    slots = [(slot, Part(slot.segment, slot.select(chosen))) for slot in state.slots]
    slots = [(slot, part) for slot, part in slots if len(part.selection)]
    parts = [part for _, part in slots]
    there = sum(len(part.selection) for part in parts)
    check_k(query.k, there, filtered=not chosen.empty)
    depth = min(max(query.k, query.depth), there)
    limits = None if tuning is None else tuning.limits(query.recall)
    ids = np.empty((len(query), query.k), dtype=np.int64)
    distances = np.empty((len(query), query.k), dtype=np.uint16)
    scores = None if query.rerank is None else np.empty((len(query), query.k), dtype=np.float32)
    for first in range(0, len(query), _MOST_QUERIES):
        some = slice(first, min(first + _MOST_QUERIES, len(query)))
        found = [_search_part(slot, part, query, some, depth, limits) for slot, part in slots]
        for place, number in enumerate(range(some.start, some.stop)):
            best = best_rows(parts, [near[place] for near in found], query.k, _score(query, number), depth)
            ids[number], distances[number] = best[0], best[1]
            if scores is not None:
                scores[number] = best[2]
    return SearchHits(ids, distances, scores)


def _search_part(
    slot: Slot, part: Part, query: Query, some: slice, depth: int, limits: NDArray[np.float32] | None
) -> list[Candidates]:
    codes = query.codes[some]
    if query.mode == "coarse" and query.length in part.segment.words:
        assert query.keys is not None and query.weights is not None and limits is not None  # make_query sees to it
        return search_coarse(part, codes, query.length, query.keys[some], query.weights[some], limits, depth)
    tables = slot.tables.get(query.length)
    if query.mode == "multi-index" and tables is None and query.length in part.segment.words:
        raise InputError(
            f"this index has no tables for {query.length} bits: build it with --multi-index, "
            "call add_multi_index, or use mode 'exact'"
        )
    if query.mode in ("multi-index", "exact") and tables is not None:
        return search_multi_index(part, tables, codes, depth)
    return search_flat(part, codes, query.length, depth)


def _score(query: Query, number: int) -> Score | None:
    if query.rerank is None:
        return None
    return make_score(query.rerank, {length: table[number] for length, table in query.logits.items()})


def check_k(k: int, there: int, *, filtered: bool = False) -> None:
    """Check that k neighbours can be found.

    Raises:
        InputError: k is no whole number from 1 to ``there``.
    """
    if there == 0:
        state, mend = (
            ("the filter leaves no image", "widen it") if filtered else ("the index is empty", "add images first")
        )
        raise InputError(f"{state}: {mend}")
    if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= there:
        what = "images that the filter leaves" if filtered else "indexed codes"
        raise InputError(f"k {k!r} is not between 1 and {there}, the number of {what}")
