"""Queries as a search needs them: checked, with the keys and logits that its mode and its reranking ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import CodeLengthError, InputError
from admth_runtime.index.probing import key_weights
from admth_runtime.index.rerank import check_rerank
from admth_runtime.index.segment import key_bits, keys_of
from admth_runtime.index.tuning import check_recall
from admth_runtime.packing import UInt8Array
from admth_runtime.results import HashCodes

__all__ = ["MODES", "Query", "check_code_shape", "make_query"]

MODES = ("exact", "flat", "multi-index", "coarse")

Queries = UInt8Array | Mapping[int, UInt8Array]


@dataclass(frozen=True, eq=False)
class Query:
    """q queries and how to answer them.

    Attributes:
        codes: of the length to compare, uint8 ``[q, L / 8]``.
        length: that length.
        k: how many neighbours.
        mode: one of :data:`MODES`.
        keys: the queries' keys, uint16 ``[q]``; only where the mode is ``coarse``.
        weights: what changing each bit of a key costs, float32 ``[q, bits]``; likewise.
        confident: whether the weights are logits.
        rerank: how to order the nearest anew, or None.
        depth: how many of the nearest are ordered anew.
        logits: float32 ``[q, L]`` by code length; only with ``rerank``.
        recall: what ``coarse`` aims at.
    """

    codes: UInt8Array
    length: int
    k: int
    mode: str
    keys: NDArray[np.uint16] | None = None
    weights: NDArray[np.float32] | None = None
    confident: bool = False
    rerank: str | None = None
    depth: int = 0
    logits: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)
    recall: float = 0.99

    def __len__(self) -> int:
        return len(self.codes)


def make_query(
    queries: Queries,
    k: int,
    length: int | None,
    code_lengths: Sequence[int],
    *,
    mode: str,
    rerank: str | None,
    rerank_depth: int | None,
    recall: float,
    use_logits: bool,
) -> Query:
    """Check the arguments of a search; :meth:`HashIndex.search <admth_runtime.HashIndex.search>` describes them.

    ``use_logits`` says whether the index knows how far to probe by logits; else every bit of a key weighs the same.

    Raises:
        CodeLengthError: the index or the query has no such length.
        InputError: an argument is out of range, or the query lacks what the mode or the reranking needs.
    """
    if mode not in MODES:
        raise InputError(f"mode {mode!r} is unknown: use one of {', '.join(MODES)}")
    check_rerank(rerank)
    codes, length = _codes(queries, length, code_lengths)
    query = Query(codes, length, int(k), mode, recall=check_recall(recall))
    fields = dict(vars(query))
    if mode == "coarse":
        fields |= _key_fields(queries, code_lengths, len(codes), use_logits=use_logits)
    if rerank is not None:
        if rerank_depth is not None and (isinstance(rerank_depth, bool) or rerank_depth < 1):
            raise InputError(f"rerank_depth {rerank_depth!r} is less than 1: order at least the k nearest anew")
        depth = max(100, 10 * query.k) if rerank_depth is None else int(rerank_depth)
        fields |= {"rerank": rerank, "depth": depth, "logits": _logits(queries, code_lengths, len(codes))}
    return Query(**fields)


def check_code_shape(codes: UInt8Array) -> UInt8Array:
    """Return packed codes uint8 ``[q, L / 8]``, C-contiguous.

    Raises:
        InputError: the array has another dtype or shape.
    """
    if codes.dtype != np.uint8 or codes.ndim != 2:
        raise InputError(f"query codes are {codes.dtype} {list(codes.shape)}, not packed uint8 [q, L / 8]")
    return np.ascontiguousarray(codes)


def _codes(queries: Queries, length: int | None, code_lengths: Sequence[int]) -> tuple[UInt8Array, int]:
    if isinstance(queries, Mapping):
        length = code_lengths[-1] if length is None else length
        if length not in code_lengths:
            raise _no_length(length, "this model or file has", code_lengths)
        if length not in queries:
            raise _no_length(length, "the query has", tuple(queries))
        codes = check_code_shape(np.asarray(queries[length]))
    else:
        codes = check_code_shape(np.asarray(queries))
        length = 8 * codes.shape[1] if length is None else length
    if length not in code_lengths:
        raise _no_length(length, "this model or file has", code_lengths)
    if 8 * codes.shape[1] != length:
        raise InputError(f"query codes have {8 * codes.shape[1]} bits, not {length}: pass codes of that length")
    return codes, length


def _key_fields(queries: Queries, code_lengths: Sequence[int], count: int, *, use_logits: bool) -> dict[str, object]:
    shortest = code_lengths[0]
    if not isinstance(queries, Mapping) or shortest not in queries:
        raise InputError(
            f"mode 'coarse' needs the query's {shortest}-bit code too: pass all that encode returned, or use 'exact'"
        )
    codes = check_code_shape(np.asarray(queries[shortest]))
    logits = queries.logits.get(shortest) if isinstance(queries, HashCodes) and use_logits else None
    return {
        "keys": keys_of(codes),
        "weights": key_weights(logits, count, key_bits(code_lengths)),
        "confident": logits is not None,
    }


def _logits(queries: Queries, code_lengths: Sequence[int], count: int) -> dict[int, NDArray[np.float32]]:
    known = queries.logits if isinstance(queries, HashCodes) else {}
    logits = {length: known[length] for length in code_lengths if length in known}
    if not logits:
        raise InputError("reranking needs the query's logits: pass all that encode returned, or leave rerank out")
    if bad := [length for length, table in logits.items() if table.shape != (count, length)]:
        raise InputError(f"logits of {bad[0]} bits are {list(logits[bad[0]].shape)}, not [{count}, {bad[0]}]")
    return logits


def _no_length(length: object, has: str, lengths: Sequence[int]) -> CodeLengthError:
    return CodeLengthError(f"code length {length!r} is not there: {has} {', '.join(map(str, lengths)) or 'none'}")
