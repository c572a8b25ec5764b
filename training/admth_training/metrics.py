"""Retrieval metrics of binary codes: mAP, precision and recall by rank and by Hamming radius.

Two images are relevant to each other where their labels share at least one class. A query's ranking is the database
by ascending Hamming distance; among equal distances the lower database index comes first (:data:`TIE_ORDER`), so the
figures do not depend on a sorting routine. With short codes ties are many and any fixed order is a choice, so the
expectation of mAP over all orders of the ties is given beside it (McSherry and Najork, ECIR 2008; He, Cakir, Bargal
and Sclaroff, *Hashing as Tie-Aware Learning to Rank*, arXiv 1705.08562).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import InputError
from admth_runtime.packing import hamming_matrix

__all__ = [
    "AP_DEFINITIONS",
    "DEFAULT_PRECISION_AT",
    "TIE_ORDER",
    "PrecisionRecallCurve",
    "RetrievalMetrics",
    "evaluate_codes",
]

TIE_ORDER = "stable: ascending database index among equal Hamming distances"
"""How equal distances are ordered, as every result states it."""

AP_DEFINITIONS = {
    "found": "AP@K = sum of P(t) rel(t) for t <= K, divided by the relevant images found in the top K",
    "possible": "AP@K = sum of P(t) rel(t) for t <= K, divided by min(relevant images in the database, K)",
}
"""The two denominators of AP@K. ``found`` is the field's standard (HashNet, DPSH, CSQ); at K = all they are equal."""

DEFAULT_PRECISION_AT = tuple(range(100, 1001, 100))
"""The N of P@N that papers plot."""

# Pairs of a block: their eight-byte words stay in a processor's cache, which is two to three times faster than not.
_BLOCK_PAIRS = 1 << 18

Codes = NDArray[np.uint8]
Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
_Words = list[NDArray[np.unsignedinteger]]


@dataclass(frozen=True)
class PrecisionRecallCurve:
    """Precision and recall of what lies within each Hamming radius 0, 1, ... L.

    Attributes:
        precision: pooled over all queries (micro average); None at a radius within which no query finds anything.
        recall: pooled over all queries.
        macro_precision: mean over queries, where an empty ball counts 0.
        macro_recall: mean over queries, where a query without relevant images counts 0.
    """

    precision: tuple[float | None, ...]
    recall: tuple[float, ...]
    macro_precision: tuple[float, ...]
    macro_recall: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, with the radii."""
        return {
            "radius": list(range(len(self.precision))),
            "precision": list(self.precision),
            "recall": list(self.recall),
            "macro_precision": list(self.macro_precision),
            "macro_recall": list(self.macro_recall),
        }


@dataclass(frozen=True)
class RetrievalMetrics:
    """What :func:`evaluate_codes` finds for one code length; all figures are shares from 0 to 1.

    Attributes:
        code_length: bits a code.
        query_size: number of queries.
        database_size: number of database codes.
        mean_average_precision: mAP by cut-off K; the key None is mAP@all.
        ap_definition: ``"found"`` or ``"possible"``, see :data:`AP_DEFINITIONS`.
        tie_order: how equal distances are ordered.
        tie_aware_map: expectation of mAP@all over all orders of equal distances.
        precision_at: P@N by N.
        hamming_radius: the radius r of the next three.
        precision_within_radius: mean precision within r; a query with an empty ball counts 0.
        recall_within_radius: mean recall within r.
        map_within_radius: mAP over what lies within r, divided by the relevant images found there.
        empty_balls: share of queries with nothing within r.
        curve: precision and recall by Hamming radius.
        random_baseline: share of relevant (query, database) pairs, the precision of a random ranking.
        queries_without_relevant: queries that no database image is relevant to; they count 0 everywhere.
    """

    code_length: int
    query_size: int
    database_size: int
    mean_average_precision: dict[int | None, float]
    ap_definition: str
    tie_order: str
    tie_aware_map: float
    precision_at: dict[int, float]
    hamming_radius: int
    precision_within_radius: float
    recall_within_radius: float
    map_within_radius: float
    empty_balls: float
    curve: PrecisionRecallCurve
    random_baseline: float
    queries_without_relevant: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; the cut-off None becomes ``"all"``."""
        return {
            "code_length": self.code_length,
            "query_size": self.query_size,
            "database_size": self.database_size,
            "map": {"all" if k is None else str(k): value for k, value in self.mean_average_precision.items()},
            "ap_definition": self.ap_definition,
            "tie_order": self.tie_order,
            "tie_aware_map": self.tie_aware_map,
            "precision_at": {str(n): value for n, value in self.precision_at.items()},
            "hamming_radius": self.hamming_radius,
            "precision_within_radius": self.precision_within_radius,
            "recall_within_radius": self.recall_within_radius,
            "map_within_radius": self.map_within_radius,
            "empty_balls": self.empty_balls,
            "pr_curve": self.curve.to_dict(),
            "random_baseline": self.random_baseline,
            "queries_without_relevant": self.queries_without_relevant,
        }


@dataclass(frozen=True)
class _Request:
    """The checked arguments that every query needs."""

    bits: int
    cutoffs: tuple[int, ...]
    precision_at: tuple[int, ...]
    radius: int
    possible: bool


@dataclass(frozen=True, eq=False)
class _Block:
    """Results of some queries, a row each: AP at the cut-offs and within the radius, hits at N, counts by radius."""

    ap: Floats
    ball_ap: Floats
    hits_at: Counts
    retrieved: Counts
    hits: Counts


def evaluate_codes(
    query_codes: Codes,
    database_codes: Codes,
    query_labels: NDArray[np.uint8],
    database_labels: NDArray[np.uint8],
    *,
    map_cutoffs: Sequence[int | None] = (None,),
    precision_at: Sequence[int] | None = None,
    hamming_radius: int = 2,
    ap_definition: str = "found",
    advance: Callable[[int], None] | None = None,
) -> RetrievalMetrics:
    """Rank the database for every query and measure the rankings.

    Works in blocks of queries: beyond the codes and labels this takes about 40 bytes a database code.

    Args:
        query_codes: packed codes, uint8 ``[q, L / 8]``.
        database_codes: packed codes, uint8 ``[d, L / 8]``.
        query_labels: multi-hot, uint8 ``[q, classes]``.
        database_labels: multi-hot, uint8 ``[d, classes]``.
        map_cutoffs: K of each mAP@K, at most d; None is all.
        precision_at: N of each P@N, at most d; None is 100, 200 ... 1,000, as far as the database goes.
        hamming_radius: the radius of precision, recall and mAP within a ball, from 0 to L.
        ap_definition: ``"found"`` or ``"possible"``, see :data:`AP_DEFINITIONS`.
        advance: called with the number of queries done since its last call, for a progress bar.

    Returns:
        The metrics of this code length.

    Raises:
        InputError: an array is empty or of another shape or dtype than above, or an argument is out of range.
    """
    _check_arrays(query_codes, database_codes, query_labels, database_labels)
    size, bits = len(database_codes), 8 * query_codes.shape[1]
    if ap_definition not in AP_DEFINITIONS:
        raise InputError(f"AP definition {ap_definition!r} is unknown: use one of {', '.join(AP_DEFINITIONS)}")
    if not 0 <= hamming_radius <= bits:
        raise InputError(f"Hamming radius {hamming_radius} is not from 0 to the code length {bits}")
    if precision_at is None:
        precision_at = [n for n in DEFAULT_PRECISION_AT if n <= size]
    request = _Request(
        bits=bits,
        cutoffs=tuple(size if k is None else _check_cutoff("mAP@K", k, size) for k in map_cutoffs),
        precision_at=tuple(_check_cutoff("P@N", n, size) for n in precision_at),
        radius=hamming_radius,
        possible=ap_definition == "possible",
    )
    codes, words = (query_codes, database_codes), (_words(query_labels), _words(database_labels))
    joined = _join(list(_evaluate_blocks(request, codes, words, advance)))
    relevant = joined.hits[:, -1]
    ball = joined.retrieved[:, hamming_radius]
    curve = _curve(joined, size)
    return RetrievalMetrics(
        code_length=bits,
        query_size=len(query_codes),
        database_size=size,
        mean_average_precision=dict(zip(map_cutoffs, joined.ap.mean(axis=0).tolist(), strict=True)),
        ap_definition=ap_definition,
        tie_order=TIE_ORDER,
        tie_aware_map=float(_tie_aware_ap(joined, size).mean()),
        precision_at={n: float(joined.hits_at[:, column].mean()) / n for column, n in enumerate(request.precision_at)},
        hamming_radius=hamming_radius,
        precision_within_radius=curve.macro_precision[hamming_radius],
        recall_within_radius=curve.macro_recall[hamming_radius],
        map_within_radius=float(joined.ball_ap.mean()),
        empty_balls=float((ball == 0).mean()),
        curve=curve,
        random_baseline=float(relevant.mean()) / size,
        queries_without_relevant=int((relevant == 0).sum()),
    )


def _evaluate_blocks(
    request: _Request,
    codes: tuple[Codes, Codes],
    words: tuple[_Words, _Words],
    advance: Callable[[int], None] | None,
) -> Iterator[_Block]:
    (query_codes, database_codes), (query_words, database_words) = codes, words
    step = max(1, _BLOCK_PAIRS // len(database_codes))
    for start in range(0, len(query_codes), step):
        stop = min(start + step, len(query_codes))
        distances: NDArray[np.unsignedinteger] = hamming_matrix(query_codes[start:stop], database_codes)
        # NumPy's stable sort of one-byte keys is a radix sort of one pass, twice as fast as that of two-byte keys.
        if request.bits <= 255:
            distances = distances.astype(np.uint8)
        rows = []
        for row, query in enumerate(range(start, stop)):
            relevance = _relevance([column[query] for column in query_words], database_words)
            rows.append(_evaluate_query(distances[row], relevance, request))
        yield _join(rows)
        if advance is not None:
            advance(stop - start)


def _evaluate_query(distances: NDArray[np.unsignedinteger], relevance: NDArray[np.bool_], request: _Request) -> _Block:
    """Rank the database for one query: distances ``[d]``, relevance ``[d]``."""
    order = np.argsort(distances, kind="stable")
    # The order holds valid positions only, and "clip" skips the slower check for that.
    positions = np.flatnonzero(relevance.take(order, mode="clip"))
    precisions = np.arange(1, len(positions) + 1) / (positions + 1)
    summed = np.concatenate([[0.0], np.cumsum(precisions)])
    retrieved = np.searchsorted(np.sort(distances, kind="stable"), np.arange(request.bits + 1), side="right")
    hits = np.searchsorted(positions, retrieved)
    cutoffs = np.asarray(request.cutoffs, dtype=np.int64)
    found = np.searchsorted(positions, cutoffs)
    denominator = np.minimum(len(positions), cutoffs) if request.possible else found
    in_ball = hits[request.radius]
    return _Block(
        ap=(summed[found] / np.maximum(denominator, 1))[None],
        ball_ap=np.asarray([summed[in_ball] / max(int(in_ball), 1)]),
        hits_at=np.searchsorted(positions, np.asarray(request.precision_at, dtype=np.int64))[None],
        retrieved=retrieved[None],
        hits=hits[None],
    )


def _join(blocks: list[_Block]) -> _Block:
    return _Block(
        ap=np.concatenate([block.ap for block in blocks]),
        ball_ap=np.concatenate([block.ball_ap for block in blocks]),
        hits_at=np.concatenate([block.hits_at for block in blocks]),
        retrieved=np.concatenate([block.retrieved for block in blocks]),
        hits=np.concatenate([block.hits for block in blocks]),
    )


def _curve(block: _Block, size: int) -> PrecisionRecallCurve:
    retrieved, hits = block.retrieved, block.hits
    relevant = hits[:, -1:]
    pooled, pooled_hits = retrieved.sum(axis=0), hits.sum(axis=0)
    total = max(int(relevant.sum()), 1)
    return PrecisionRecallCurve(
        precision=tuple(int(h) / int(n) if n else None for h, n in zip(pooled_hits, pooled, strict=True)),
        recall=tuple((pooled_hits / total).tolist()),
        macro_precision=tuple((hits / np.maximum(retrieved, 1)).mean(axis=0).tolist()),
        macro_recall=tuple((hits / np.maximum(relevant, 1)).mean(axis=0).tolist()),
    )


def _tie_aware_ap(block: _Block, size: int) -> Floats:
    """Return the expected AP ``[q]`` over all orders of equal distances, in closed form from counts by radius.

    A group of n equal distances with r relevant ones, behind N others with R relevant ones, adds
    r/n [(R + 1) S + (r - 1)/(n - 1) (n - (N + 1) S)] with S = 1/(N + 1) + ... + 1/(N + n): the chance that rank N + t
    is relevant is r/n, and given that, (t - 1)(r - 1)/(n - 1) of the group's ranks before it are relevant on average.
    """
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, size + 1))])
    before = np.concatenate([np.zeros((len(block.retrieved), 1), np.int64), block.retrieved[:, :-1]], axis=1)
    hits_before = np.concatenate([np.zeros((len(block.hits), 1), np.int64), block.hits[:, :-1]], axis=1)
    n, r = block.retrieved - before, block.hits - hits_before
    s = harmonic[block.retrieved] - harmonic[before]
    spread = (r - 1) / np.maximum(n - 1, 1) * (n - (before + 1) * s)
    gain = r / np.maximum(n, 1) * ((hits_before + 1) * s + np.where(n > 1, spread, 0.0))
    expected: Floats = gain.sum(axis=1) / np.maximum(block.hits[:, -1], 1)
    return expected


def _words(labels: NDArray[np.uint8]) -> _Words:
    """Pack multi-hot labels into machine words, a list entry ``[n]`` for each 64 classes or fewer."""
    packed = np.packbits(labels.astype(np.bool_), axis=1)
    word = next((size for size in (1, 2, 4) if packed.shape[1] <= size), 8)
    padded = np.zeros((len(packed), -(-packed.shape[1] // word) * word), dtype=np.uint8)
    padded[:, : packed.shape[1]] = packed
    return list(np.ascontiguousarray(padded.view(f"u{word}").T))


def _relevance(query: list[Any], database: _Words) -> NDArray[np.bool_]:
    shared = database[0] & query[0]
    for word, column in zip(query[1:], database[1:], strict=True):
        shared |= column & word
    return np.asarray(shared != 0)


def _check_cutoff(name: str, value: int, size: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError(f"the cut-off {value!r} of {name} is not a positive integer: use for example 1000")
    if value > size:
        raise InputError(f"the cut-off {value:,} of {name} exceeds the {size:,} database codes: use at most {size}")
    return int(value)


def _check_arrays(query_codes: Any, database_codes: Any, query_labels: Any, database_labels: Any) -> None:
    named = {"query": (query_codes, query_labels), "database": (database_codes, database_labels)}
    for name, (codes, labels) in named.items():
        for kind, array in (("codes", codes), ("labels", labels)):
            if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim != 2:
                found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
                raise InputError(
                    f"{name} {kind} are {found}, not uint8 of two dimensions: pass packed codes, multi-hot labels"
                )
        if len(codes) == 0 or codes.shape[1] == 0:
            raise InputError(f"there are no {name} codes (shape {list(codes.shape)}): encode some images first")
        if len(codes) != len(labels):
            raise InputError(
                f"there are {len(codes):,} {name} codes and {len(labels):,} {name} labels: pass one row each"
            )
    if query_codes.shape[1] != database_codes.shape[1]:
        raise InputError(
            f"query codes of {8 * query_codes.shape[1]} bits and database codes of {8 * database_codes.shape[1]} bits "
            "cannot be compared: pass codes of one length"
        )
    if query_labels.shape[1] != database_labels.shape[1] or query_labels.shape[1] == 0:
        raise InputError(
            f"query labels of {query_labels.shape[1]} classes and database labels of {database_labels.shape[1]} "
            "differ: pass labels of the same classes"
        )
