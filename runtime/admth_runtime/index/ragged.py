"""Arrays of ranges: many slices of different lengths gathered in one NumPy call, without a loop in Python."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["gather_texts", "ranges"]

_TEXTS_AT_ONCE = 1 << 18


def ranges(starts: NDArray[Any], counts: NDArray[Any]) -> NDArray[np.int64]:
    """Return ``starts[0], starts[0] + 1, ...`` for ``counts[0]`` numbers, then those of the next range, and so on."""
    counts = counts.astype(np.int64, copy=False)
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    numbers = np.arange(total, dtype=np.int64)
    numbers += np.repeat(starts.astype(np.int64, copy=False) - (ends - counts), counts)
    return numbers


def gather_texts(
    offsets: NDArray[np.uint64], content: NDArray[np.uint8], order: NDArray[Any]
) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Bring texts that lie one after the other into another order.

    Args:
        offsets: where each text begins and ends in ``content``, ``[n + 1]``.
        content: the texts' bytes.
        order: which text comes first, second, ..., ``[m]``.

    Returns:
        The new offsets ``[m + 1]`` and content.
    """
    counts = (offsets[1:] - offsets[:-1])[order].astype(np.int64)
    new_offsets = np.zeros(len(order) + 1, dtype=np.uint64)
    np.cumsum(counts, out=new_offsets[1:], dtype=np.uint64)
    new_content = np.empty(int(new_offsets[-1]), dtype=np.uint8)
    for first in range(0, len(order), _TEXTS_AT_ONCE):  # the numbers of all bytes at once would take eight times them
        part = slice(first, first + _TEXTS_AT_ONCE)
        to = slice(int(new_offsets[first]), int(new_offsets[min(first + _TEXTS_AT_ONCE, len(order))]))
        new_content[to] = content[ranges(offsets[:-1][order[part]], counts[part])]
    return new_offsets, new_content
