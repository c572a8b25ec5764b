"""What a search returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["SearchHits"]


@dataclass(frozen=True)
class SearchHits:
    """The k nearest codes of each of q queries, nearest first.

    Attributes:
        ids: int64 ``[q, k]``.
        distances: Hamming distances in bits, uint16 ``[q, k]``.
        scores: what the hits are ordered by when they were reranked, float32 ``[q, k]``, smaller is nearer; else None.
    """

    ids: NDArray[np.int64]
    distances: NDArray[np.uint16]
    scores: NDArray[np.float32] | None = None
