"""Which rows of a segment a search may return: all, or those that are neither deleted nor filtered out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from admth_runtime.index.row_starts import ManyRepeated, RowStarts
from admth_runtime.index.segment import Segment

__all__ = ["IdFilter", "Selection", "everything", "select"]


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows of a segment, by group.

    Attributes:
        starts: where each group's rows begin among ``rows``.
        rows: the rows that are selected, ascending, or None for all of them.
    """

    starts: RowStarts
    rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return self.starts.rows

    @property
    def whole(self) -> bool:
        """Whether every row is selected."""
        return self.rows is None

    def counts(self, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return how many rows of each group are selected."""
        return self.starts.counts(groups)

    def rows_at(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows at places of ``starts``."""
        return places if self.rows is None else self.rows[places]


@dataclass(frozen=True, eq=False)
class IdFilter:
    """Ids that a search may return (``allow``, None is all) and may not (``deny``, None is none)."""

    allow: NDArray[np.int64] | None = None
    deny: NDArray[np.int64] | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is filtered."""
        return self.allow is None and (self.deny is None or len(self.deny) == 0)


def everything(segment: Segment) -> Selection:
    """Select every row."""
    return Selection(segment.row_starts)


def select(segment: Segment, deleted: NDArray[np.bool_] | None, chosen: IdFilter) -> Selection:
    """Select the rows that are not deleted and pass a filter. Without either nothing is copied.

    Args:
        segment: the segment.
        deleted: which rows are deleted, bool ``[n]``, or None.
        chosen: the filter.
    """
    if deleted is None and chosen.empty:
        return everything(segment)
    if chosen.allow is None:
        live = np.ones(len(segment), dtype=np.bool_) if deleted is None else ~deleted
        if chosen.deny is not None:
            live[_rows(segment, chosen.deny)] = False
        rows = np.flatnonzero(live)
    else:
        ids = chosen.allow
        if chosen.deny is not None:
            ids = np.setdiff1d(ids, chosen.deny)
        rows = np.unique(_rows(segment, ids))
        if deleted is not None:
            rows = rows[~deleted[rows]]
    starts = segment.row_starts.at(np.arange(segment.groups + 1))
    return Selection(ManyRepeated(np.searchsorted(rows, starts)), rows)


def _rows(segment: Segment, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    places, here = segment.places(ids)
    rows: NDArray[np.int64] = segment.rows_by_id[places[here]].astype(np.int64)
    segment.release()
    return rows
