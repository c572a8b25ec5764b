"""A segment: codes that never change, arranged so that they are small and quick to search.

Trained codes repeat: in a corpus of ten million, most images share all their bits with others. So a segment keeps each
distinct code, of all lengths together, once; it is called a *group* here. Rows (images) are sorted by group, and by id
within it. Groups are sorted by their *key*, the first bits of the shortest code, so those of one key, a *bucket*, lie
side by side. A short code that the key holds in full takes no space of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import CodeLengthError, InputError
from admth_runtime.index.ragged import gather_texts
from admth_runtime.index.row_starts import RowStarts, row_starts
from admth_runtime.index.words import Words, from_words, to_words
from admth_runtime.packing import UInt8Array

__all__ = ["MOST_KEY_BITS", "Segment", "Uris", "build_segment", "key_bits", "keys_of"]

MOST_KEY_BITS = 16
_MOST_ROWS = (1 << 32) - 1
# Rows that are looked at to learn whether codes repeat.
_SOME = 50_000

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Uris:
    """Texts, one after the other.

    Attributes:
        offsets: where each begins and ends, uint64 ``[n + 1]``.
        content: their UTF-8 bytes.
    """

    offsets: NDArray[np.uint64]
    content: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def texts(self, places: NDArray[np.int64]) -> list[str]:
        """Return the texts at some places."""
        starts, ends = self.offsets[:-1][places].tolist(), self.offsets[1:][places].tolist()
        return [
            self.content[start:end].tobytes().decode(errors="surrogateescape")
            for start, end in zip(starts, ends, strict=True)
        ]

    def in_order(self, order: NDArray[np.int64]) -> Uris:
        """Return the texts in another order."""
        return Uris(*gather_texts(self.offsets, self.content, order))

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> Uris:
        """Join texts."""
        joined = "".join(texts)
        content = joined.encode(errors="surrogateescape")
        # Characters are bytes where all is ASCII, as paths mostly are; then nothing is encoded one by one.
        ascii_only = len(content) == len(joined)
        sizes = map(len, texts if ascii_only else [text.encode(errors="surrogateescape") for text in texts])
        offsets = np.zeros(len(texts) + 1, dtype=np.uint64)
        np.cumsum(np.fromiter(sizes, dtype=np.uint64, count=len(texts)), out=offsets[1:])
        return cls(offsets, np.frombuffer(content, dtype=np.uint8))

    @classmethod
    def concatenate(cls, parts: Sequence[Uris]) -> Uris:
        """Join the texts of several."""
        sizes = np.cumsum([0, *(int(part.offsets[-1]) for part in parts)])
        offsets = [part.offsets[:-1] + np.uint64(size) for part, size in zip(parts, sizes[:-1], strict=True)]
        return cls(
            np.concatenate([*offsets, sizes[-1:].astype(np.uint64)]), np.concatenate([part.content for part in parts])
        )


@dataclass(frozen=True, eq=False)
class Segment:
    """n rows in g groups in b buckets. Make one with :func:`build_segment`.

    Attributes:
        code_lengths: the code lengths, increasing.
        bucket_keys: the keys that occur, uint16 ``[b]``, ascending.
        bucket_starts: the first group of each bucket, uint32 ``[b + 1]``.
        words: codes of the groups by length, padded; without the shortest length when the key is all of it.
        row_starts: the first row of each group.
        id_base: what the stored ids are counted from.
        row_ids: id of each row less ``id_base``, uint32 or int64 ``[n]``.
        sorted_ids: the same, ascending.
        rows_by_id: the row of each of ``sorted_ids``, uint32 ``[n]``.
        uris: one text for each of ``sorted_ids``.
        release: gives back the memory of ``sorted_ids``, ``rows_by_id`` and ``uris`` where they are mapped from a file:
            only looking up ids reads them, here and there, and the system counts what surrounds it too.
    """

    code_lengths: tuple[int, ...]
    bucket_keys: NDArray[np.uint16]
    bucket_starts: NDArray[np.uint32]
    words: Mapping[int, Words]
    row_starts: RowStarts
    id_base: int
    row_ids: NDArray[np.uint32] | NDArray[np.int64]
    sorted_ids: NDArray[np.uint32] | NDArray[np.int64]
    rows_by_id: NDArray[np.uint32]
    uris: Uris = field(repr=False)
    release: Callable[[], None] = field(default=lambda: None, repr=False)

    def __len__(self) -> int:
        return len(self.row_ids)

    @property
    def groups(self) -> int:
        """The number of distinct codes."""
        return len(self.row_starts)

    @property
    def key_bits(self) -> int:
        """How many bits of the shortest code make the key."""
        return key_bits(self.code_lengths)

    def ids(self, rows: NDArray[np.int64]) -> Ids:
        """Return the ids of rows."""
        return self.row_ids[rows].astype(np.int64) + self.id_base

    def all_ids(self) -> Ids:
        """Return every id, ascending."""
        return self.sorted_ids.astype(np.int64) + self.id_base

    def renumbered(self, first: int) -> Segment:
        """Return the same rows with ids that begin at ``first`` and keep their gaps.

        Raises:
            InputError: the ids would be too large.
        """
        lowest = int(self.sorted_ids[0]) if len(self) else 0
        if len(self) and first + int(self.sorted_ids[-1]) - lowest > np.iinfo(np.int64).max:
            raise InputError(f"ids that begin at {first} would be too large: give the images smaller ids")
        if self.sorted_ids.dtype == np.uint32:
            return replace(self, id_base=first - lowest)
        shift = first - lowest
        return replace(self, row_ids=self.row_ids + shift, sorted_ids=self.sorted_ids + shift)

    def places(self, ids: Ids) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return the place of each id among the sorted ids, and which of them are here at all."""
        if self.sorted_ids.dtype == np.uint32:
            stored = ids - self.id_base  # a difference that overflows comes out negative
            here = (ids >= self.id_base) & (stored >= 0) & (stored <= np.iinfo(np.uint32).max)
            wanted = np.where(here, stored, 0).astype(self.sorted_ids.dtype)
        else:
            here, wanted = np.ones(len(ids), dtype=np.bool_), ids
        # Equal dtypes, or searchsorted would convert all of the sorted ids, which are mapped from a file.
        places = np.minimum(np.searchsorted(self.sorted_ids, wanted), max(len(self) - 1, 0)).astype(np.int64)
        if len(self):
            here &= self.sorted_ids[places] == wanted
        else:
            here[:] = False
        return places, here

    def groups_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the group of each row."""
        return self.row_starts.groups_of(rows)

    def codes(self, length: int, groups: NDArray[np.int64]) -> UInt8Array:
        """Return the packed codes of groups, uint8 ``[m, length / 8]``.

        Raises:
            CodeLengthError: there is no such length.
        """
        if length in self.words:
            return from_words(self.words[length][groups], length)
        if length not in self.code_lengths:
            there = ", ".join(map(str, self.code_lengths))
            raise CodeLengthError(f"code length {length!r} is not there: this index has {there}")
        buckets = np.searchsorted(self.bucket_starts, groups.astype(np.uint32), side="right") - 1
        as_bytes = self.bucket_keys[buckets].astype(">u2").view(np.uint8).reshape(-1, 2)
        return np.ascontiguousarray(as_bytes[:, 2 - length // 8 :])


def key_bits(code_lengths: Sequence[int]) -> int:
    """Return how many of the first bits of the shortest code make a key."""
    return min(code_lengths[0], MOST_KEY_BITS)


def keys_of(shortest: UInt8Array) -> NDArray[np.uint16]:
    """Return the keys of packed codes of the shortest length: their first 16 bits, or 8, as numbers."""
    keys = shortest[:, 0].astype(np.uint16)
    if shortest.shape[1] > 1:
        keys = (keys << np.uint16(8)) | shortest[:, 1]
    return keys


def build_segment(ids: Ids, codes: Mapping[int, UInt8Array], uris: Uris) -> Segment:
    """Arrange codes.

    Args:
        ids: int64 ``[n]``, unique.
        codes: uint8 ``[n, L / 8]`` by code length, increasing.
        uris: one text for each id.

    Raises:
        InputError: ids repeat, or there are more rows than a segment can number.
    """
    if len(ids) > _MOST_ROWS:
        raise InputError(f"{len(ids):,} images are more than one index of {_MOST_ROWS:,}: split them over several")
    if not bool((ids[1:] > ids[:-1]).all()):
        by_id = np.argsort(ids, kind="stable")
        ids, uris = ids[by_id], uris.in_order(by_id)
        codes = {length: table[by_id] for length, table in codes.items()}
        if bool((ids[1:] == ids[:-1]).any()):
            raise InputError(f"ids repeat, {int(ids[:-1][ids[1:] == ids[:-1]][0])} first: give every image its own")
    lengths = tuple(codes)
    keys = keys_of(codes[lengths[0]])
    words = {
        length: to_words(table) for length, table in codes.items() if length > MOST_KEY_BITS or length != lengths[0]
    }
    columns = [words[length][:, column] for length in words for column in range(words[length].shape[1])]
    order = _sorted_rows(keys, columns)
    new_group = _changes([column[order] for column in [keys, *columns]], len(ids))
    starts = np.flatnonzero(new_group)
    first_rows = order[starts]
    group_keys = keys[first_rows]
    bucket_starts = np.flatnonzero(_changes([group_keys], len(group_keys)))
    base, stored = _compact(ids)
    rows_by_id = np.empty(len(ids), dtype=np.uint32)
    rows_by_id[order] = np.arange(len(ids), dtype=np.uint32)
    return Segment(
        code_lengths=lengths,
        bucket_keys=group_keys[bucket_starts],
        bucket_starts=np.append(bucket_starts, len(starts)).astype(np.uint32),
        words={length: table[first_rows] for length, table in words.items()},
        row_starts=row_starts(starts, len(ids)),
        id_base=base,
        row_ids=stored[order],
        sorted_ids=stored,
        rows_by_id=rows_by_id,
        uris=uris,
    )


def _sorted_rows(keys: NDArray[np.uint16], columns: Sequence[NDArray[np.unsignedinteger]]) -> NDArray[np.int64]:
    """Return the rows by key, then by the columns from the last to the first, then as they are.

    This is ``np.lexsort([*columns, keys])``, which is fast where codes repeat much. Else the last column alone tells
    most rows apart, and the others are looked at only where it does not.
    """
    if not columns:
        return np.argsort(keys, kind="stable")
    some = columns[-1][:: max(1, len(keys) // _SOME)]
    if 2 * len(np.unique(some)) < len(some):
        return np.lexsort([*columns, keys])
    order = np.argsort(columns[-1])
    order = order[np.argsort(keys[order], kind="stable")]
    starts = _changes([keys[order], columns[-1][order]], len(order))
    alone = starts & np.append(starts[1:], True)
    tied = np.flatnonzero(~alone)
    rows = order[tied]
    runs = np.cumsum(starts)[tied]
    order[tied] = rows[np.lexsort([rows, *(column[rows] for column in columns[:-1]), runs])]
    return order


def _changes(columns: Sequence[NDArray[np.unsignedinteger]], count: int) -> NDArray[np.bool_]:
    """Tell at which rows any of the columns differs from the row before."""
    changed = np.zeros(count, dtype=np.bool_)
    changed[:1] = True
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
    return changed


def _compact(ids: Ids) -> tuple[int, NDArray[np.uint32] | NDArray[np.int64]]:
    """Count ascending ids from the first, in four bytes where that is enough."""
    if len(ids) == 0:
        return 0, ids.astype(np.uint32)
    if int(ids[-1]) - int(ids[0]) <= np.iinfo(np.uint32).max:
        return int(ids[0]), (ids - ids[0]).astype(np.uint32)
    return 0, ids
