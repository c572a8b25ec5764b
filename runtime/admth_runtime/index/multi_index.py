"""Exact search without a scan: multi-index hashing (Norouzi, Punjani and Fleet, CVPR 2012, TPAMI 2014).

A code is cut into m pieces of 16 bits, and a table of each piece says which groups have which value there. Two codes
that differ in fewer than m bits are equal in some piece; in fewer than 2 m, some piece differs in one bit at most; and
so on. So looking up the query's pieces, then all pieces one bit away, finds every code within m - 1, then 2 m - 1 bits,
and the search ends when k rows within that are known. It costs no more than a scan: where the tables hold too many
groups under the pieces that are next, the query is answered by a scan.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from admth_runtime.index.candidates import Candidates, Part, prune
from admth_runtime.index.flat import search_flat
from admth_runtime.index.ragged import ranges
from admth_runtime.index.segment import Segment
from admth_runtime.index.words import gathered_distances, to_words
from admth_runtime.packing import UInt8Array

__all__ = ["PieceTables", "build_piece_tables", "search_multi_index"]

_PIECE_BYTES = 2
# Comparing a group that must be gathered from all over the segment costs about as much as this many in a row.
_SCAN_PAYS = 16
_MOST_FLIPS = 3  # 697 values a piece; beyond it a scan has always been faster
# The k nearest so far say how many flips would prove them. Nearer ones may yet be found that need fewer, but hardly so
# many fewer.
_MOST_HOPE = 2
# With fewer groups a scan is done before the tables are looked at.
_FEWEST_GROUPS = 1 << 18


@dataclass(frozen=True, eq=False)
class PieceTables:
    """Tables of the 16-bit pieces of one code length; a last piece of 8 bits stands for itself.

    Attributes:
        length: the code length.
        starts: where the groups of each value begin in ``groups``, uint32 ``[m, 2^16 + 1]``.
        groups: the groups by value, uint32 ``[m, g]``.
    """

    length: int
    starts: NDArray[np.uint32]
    groups: NDArray[np.uint32]


def build_piece_tables(segment: Segment, length: int) -> PieceTables:
    """Sort the groups by each piece. Takes 4 bytes a group and piece.

    Raises:
        CodeLengthError: the segment has no such length.
    """
    pieces = _pieces(segment.codes(length, np.arange(segment.groups)))
    starts = np.zeros((pieces.shape[1], (1 << 16) + 1), dtype=np.uint32)
    groups = np.empty((pieces.shape[1], segment.groups), dtype=np.uint32)
    for number, values in enumerate(pieces.T):
        np.cumsum(np.bincount(values, minlength=1 << 16), out=starts[number, 1:])
        groups[number] = np.argsort(values, kind="stable")
    return PieceTables(length, starts, groups)


def search_multi_index(part: Part, tables: PieceTables, queries: UInt8Array, k: int) -> list[Candidates]:
    """Find every group within the distance of the k-th nearest row of each query; see :func:`search_flat`."""
    if part.segment.groups < _FEWEST_GROUPS:
        return search_flat(part, queries, tables.length, k)
    words = part.segment.words[tables.length]
    found: list[Candidates | None] = []
    for pieces, query in zip(_pieces(queries), to_words(queries), strict=True):
        found.append(_search_one(part, tables, words, pieces, query, k))
    missing = [number for number, near in enumerate(found) if near is None]
    scanned = iter(search_flat(part, queries[missing], tables.length, k)) if missing else iter(())
    return [next(scanned) if near is None else near for near in found]


def _search_one(
    part: Part,
    tables: PieceTables,
    words: NDArray[np.unsignedinteger],
    pieces: NDArray[np.uint16],
    query: NDArray[np.unsignedinteger],
    k: int,
) -> Candidates | None:
    near = Candidates.none()
    looked_at = 0
    for flips in range(_MOST_FLIPS + 1):
        values = pieces[:, None] ^ _changes(flips)[None, :]
        rows = np.arange(len(pieces))[:, None]
        first = tables.starts[rows, values].astype(np.int64)
        sizes = (tables.starts[rows, values.astype(np.int64) + 1] - first).ravel()
        looked_at += int(sizes.sum())
        if _SCAN_PAYS * looked_at > part.segment.groups:
            return None
        places = ranges((first + rows * part.segment.groups).ravel(), sizes)
        groups = tables.groups.reshape(-1)[places].astype(np.int64)
        distances = gathered_distances(words, groups, query)
        close = np.flatnonzero(distances <= near.bound)
        # A group is found under each of its pieces that match.
        groups, once = np.unique(np.concatenate([near.groups, groups[close]]), return_index=True)
        near = prune(groups, np.concatenate([near.distances, distances[close]])[once], part.selection, k)
        needed = near.bound // len(pieces)
        if needed <= flips:
            return near
        if needed > flips + _MOST_HOPE:
            return None
    return None


def _pieces(codes: UInt8Array) -> NDArray[np.uint16]:
    """Cut codes uint8 ``[n, L / 8]`` into pieces ``[n, m]``."""
    if codes.shape[1] % _PIECE_BYTES:
        codes = np.concatenate([codes, np.zeros((len(codes), 1), dtype=np.uint8)], axis=1)
    return np.ascontiguousarray(codes).view(np.uint16)


def _changes(flips: int) -> NDArray[np.uint16]:
    """Return every 16-bit number with so many set bits."""
    made = (sum(1 << bit for bit in bits) for bits in combinations(range(16), flips))
    return np.fromiter(made, dtype=np.uint16, count=comb(16, flips))
