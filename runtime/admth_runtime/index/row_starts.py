"""Where the rows of each group begin: an array, or less than that where few groups have more than one row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FewRepeated", "ManyRepeated", "RowStarts", "row_starts"]

# Looking a group up among the repeated ones takes longer than in an array, so these must be few to be worth it.
_FEW = 16


@dataclass(frozen=True, eq=False)
class ManyRepeated:
    """An array.

    Attributes:
        starts: the first row of each group, and the number of rows, ``[g + 1]``.
    """

    starts: NDArray[Any]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def rows(self) -> int:
        """The number of rows."""
        return int(self.starts[-1])

    def at(self, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the first row of each group; of ``g``, the number of rows."""
        return self.starts[groups].astype(np.int64)

    def counts(self, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of rows of each group."""
        counts: NDArray[np.int64] = self.starts[groups + 1].astype(np.int64)
        counts -= self.starts[groups]
        return counts

    def groups_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the group of each row."""
        wanted = rows.astype(self.starts.dtype)  # else searchsorted would convert all of the starts
        return np.searchsorted(self.starts, wanted, side="right").astype(np.int64) - 1


@dataclass(frozen=True, eq=False)
class FewRepeated:
    """The groups that have more than one row, and how many rows more than groups there are before each.

    Attributes:
        groups: the number of groups.
        repeated: the groups with more than one row, ascending, ``[r]``.
        before: the rows beyond one a group in the groups before each of these, and in all, ``[r + 1]``.
    """

    groups: int
    repeated: NDArray[np.uint32]
    before: NDArray[np.uint32]

    def __len__(self) -> int:
        return self.groups

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.groups + int(self.before[-1])

    def at(self, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the first row of each group; of ``g``, the number of rows."""
        return groups + self.before[np.searchsorted(self.repeated, groups.astype(np.uint32))].astype(np.int64)

    def counts(self, groups: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of rows of each group."""
        return self.at(groups + 1) - self.at(groups)

    def groups_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the group of each row."""
        before = self.before.astype(np.int64)
        starts = self.repeated + before[:-1]
        place = np.searchsorted(starts, rows, side="right")
        # Past the last repeated group that begins here or before; within it while its rows last.
        last = np.maximum(place - 1, 0)
        within = (place > 0) & (rows <= starts[last] + before[last + 1] - before[last]) if len(starts) else place > 0
        found: NDArray[np.int64] = rows - before[place]
        found[within] = self.repeated[last[within]]
        return found


RowStarts = ManyRepeated | FewRepeated


def row_starts(starts: NDArray[np.int64], rows: int) -> RowStarts:
    """Return the smaller of the two.

    Args:
        starts: the first row of each group, int64 ``[g]``.
        rows: the number of rows.
    """
    counts = np.diff(starts, append=rows)
    repeated = np.flatnonzero(counts > 1)
    if _FEW * len(repeated) > len(starts):
        return ManyRepeated(np.append(starts, rows).astype(np.uint32))
    before = np.concatenate([[0], np.cumsum(counts[repeated] - 1)])
    return FewRepeated(len(starts), repeated.astype(np.uint32), before.astype(np.uint32))
