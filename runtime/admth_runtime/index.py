"""Exact nearest-neighbour search over packed codes, in NumPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from admth_runtime.codes_file import EncodedImages, read_codes, write_codes
from admth_runtime.errors import InputError
from admth_runtime.packing import hamming_matrix
from admth_runtime.results import HashCodes

__all__ = ["HashIndex", "SearchHits"]

UInt8Array = NDArray[np.uint8]

# Distances computed at a time. hamming_matrix needs about 12 bytes each, so a search needs about 25 MB beside the
# codes, and the block stays in the processor's cache.
_BLOCK = 1 << 21
_MOST_QUERIES = 64


@dataclass(frozen=True)
class SearchHits:
    """The k nearest codes of each of q queries, nearest first.

    Attributes:
        ids: int64 ``[q, k]``.
        distances: Hamming distances in bits, uint16 ``[q, k]``.
    """

    ids: NDArray[np.int64]
    distances: NDArray[np.uint16]


class HashIndex:
    """Codes of every length in memory, searched by a flat scan: always exact, ties by ascending id.

    Build one with :meth:`from_codes` or :meth:`load`.

    Attributes:
        ids: int64 ``[n]``, ascending.
        uris: one text for each id, in the same order.
        model_sha256: the model that made the codes, or None when it is not known.
    """

    def __init__(self, encoded: EncodedImages) -> None:
        order = np.argsort(encoded.ids, kind="stable")
        in_order = bool((order == np.arange(len(order))).all())
        self._encoded = encoded if in_order else _reordered(encoded, order)
        self.ids = self._encoded.ids
        self.uris = self._encoded.uris
        self.model_sha256 = self._encoded.model_sha256

    @classmethod
    def from_codes(
        cls,
        codes: Mapping[int, UInt8Array],
        *,
        ids: NDArray[np.int64] | None = None,
        uris: Sequence[str] | None = None,
        model_sha256: str | None = None,
    ) -> HashIndex:
        """Index codes that are in memory.

        Args:
            codes: uint8 ``[n, L / 8]`` by code length; a :class:`~admth_runtime.HashCodes` will do.
            ids: int64 ``[n]``, unique; by default 0 to n - 1.
            uris: a text for each image; by default its id.
            model_sha256: the model that made the codes; queries of another are then refused.

        Raises:
            InputError: arrays of a wrong dtype or shape, or ids that repeat.
        """
        if not codes:
            raise InputError("no codes were given: pass uint8 [n, L / 8] by code length")
        count = len(next(iter(codes.values())))
        ids = np.arange(count, dtype=np.int64) if ids is None else np.asarray(ids)
        uris = [str(i) for i in ids] if uris is None else uris
        return cls(EncodedImages(ids, tuple(uris), HashCodes(dict(sorted(codes.items()))), model_sha256))

    @classmethod
    def load(cls, path: str | Path) -> HashIndex:
        """Index a file written by :meth:`save`, :func:`~admth_runtime.write_codes` or ``admth-run encode``.

        Raises:
            InputError: the file is missing, damaged or of another format.
        """
        return cls(read_codes(path))

    def save(self, path: str | Path) -> None:
        """Write the index as a file of encoded images, ``.parquet`` or ``.npz``.

        Raises:
            OutputError: it cannot be written.
        """
        write_codes(path, self._encoded)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"HashIndex(count={len(self)}, code_lengths={self.code_lengths})"

    @property
    def code_lengths(self) -> tuple[int, ...]:
        """The code lengths in bits that can be searched, increasing."""
        return self._encoded.code_lengths

    def search(
        self,
        query_codes: UInt8Array | Mapping[int, UInt8Array],
        k: int,
        length: int | None = None,
        *,
        model_sha256: str | None = None,
    ) -> SearchHits:
        """Find the k nearest codes of each query; equal distances are ordered by ascending id.

        Args:
            query_codes: what :meth:`HashRuntime.encode <admth_runtime.HashRuntime.encode>` returns, or packed
                uint8 ``[q, L / 8]`` of one length.
            k: neighbours a query, at most the number of indexed codes.
            length: the code length to compare; by default the array's own, or the longest there is.
            model_sha256: the model that made the queries, when it is known.

        Raises:
            CodeLengthError: the index or the query has no such length.
            InputError: ``k`` is out of range, the query is malformed, or it comes from another model.
        """
        self.check_model(model_sha256)
        if isinstance(k, bool) or not isinstance(k, (int, np.integer)) or not 1 <= k <= len(self):
            raise InputError(f"k {k!r} is not between 1 and {len(self)}, the number of indexed codes")
        queries, length = self._query(query_codes, length)
        database = self._encoded.codes[length]
        rows = np.empty((len(queries), k), dtype=np.int64)
        distances = np.empty((len(queries), k), dtype=np.uint16)
        for start in range(0, len(queries), _MOST_QUERIES):
            part = slice(start, start + _MOST_QUERIES)
            rows[part], distances[part] = _nearest(queries[part], database, int(k))
        return SearchHits(self.ids[rows], distances)

    def uris_of(self, ids: NDArray[np.int64]) -> list[str]:
        """Return the uris of ids that :meth:`search` found.

        Raises:
            InputError: an id is not in the index.
        """
        wanted = np.asarray(ids, dtype=np.int64).reshape(-1)
        rows = np.minimum(np.searchsorted(self.ids, wanted), len(self) - 1)
        if absent := wanted[self.ids[rows] != wanted].tolist():
            raise InputError(f"the ids {absent[:5]} are not in this index")
        return [self.uris[row] for row in rows]

    def check_length(self, length: int) -> None:
        """Check that a code length can be searched.

        Raises:
            CodeLengthError: it is not in the index; the message lists those that are.
        """
        _ = self._encoded.codes[length]

    def check_model(self, model_sha256: str | None) -> None:
        """Check that queries come from the model that made the index; no check when either is unknown.

        Raises:
            InputError: they do not.
        """
        known = self.model_sha256
        if model_sha256 is not None and known is not None and model_sha256 != known:
            raise InputError(
                f"the query's model {model_sha256[:12]}... is not the index's {known[:12]}...: "
                "encode the images again with this model, or query with the model that encoded them"
            )

    def _query(self, codes: UInt8Array | Mapping[int, UInt8Array], length: int | None) -> tuple[UInt8Array, int]:
        if isinstance(codes, Mapping):
            length = self.code_lengths[-1] if length is None else length
            queries = codes[length]
        else:
            queries = np.asarray(codes)
        if queries.dtype != np.uint8 or queries.ndim != 2:
            raise InputError(f"query codes are {queries.dtype} {list(queries.shape)}, not packed uint8 [q, L / 8]")
        length = 8 * queries.shape[1] if length is None else length
        self.check_length(length)
        if 8 * queries.shape[1] != length:
            raise InputError(f"query codes have {8 * queries.shape[1]} bits, not {length}: pass codes of that length")
        return queries, length


def _nearest(queries: UInt8Array, database: UInt8Array, k: int) -> tuple[NDArray[np.int64], NDArray[np.uint16]]:
    """Scan in blocks and keep, for each query, the k best rows so far.

    Only distances below the worst one kept can enter: an equal one has a higher row, and ties go to the lower.
    """
    step = max(k, _BLOCK // len(queries))
    rows = [np.empty(0, dtype=np.int64) for _ in queries]
    kept = [np.empty(0, dtype=np.uint16) for _ in queries]
    for start in range(0, len(database), step):
        block = hamming_matrix(queries, database[start : start + step])
        for query, distances in enumerate(block):
            best = kept[query]
            closer = np.flatnonzero(distances < best[-1]) if len(best) == k else np.arange(len(distances))
            near = distances[closer]
            if len(near) > k:
                within = near <= np.partition(near, k - 1)[k - 1]
                closer, near = closer[within], near[within]
            # A stable sort keeps earlier rows first among equals, and kept rows are earlier than this block's.
            merged = np.concatenate([best, near])
            order = np.argsort(merged, kind="stable")[:k]
            kept[query] = merged[order]
            rows[query] = np.concatenate([rows[query], closer + start])[order]
    return np.stack(rows), np.stack(kept)


def _reordered(encoded: EncodedImages, order: NDArray[np.intp]) -> EncodedImages:
    return EncodedImages(
        ids=encoded.ids[order],
        uris=tuple(encoded.uris[row] for row in order),
        codes=HashCodes(
            {length: codes[order] for length, codes in encoded.codes.items()},
            {length: logits[order] for length, logits in encoded.codes.logits.items()},
        ),
        model_sha256=encoded.model_sha256,
        preprocessing_sha256=encoded.preprocessing_sha256,
        created_by=encoded.created_by,
    )
