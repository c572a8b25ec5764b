"""Ordering the nearest anew by the query's logits: the database keeps bits, the query has real numbers.

A query's logit says how sure a bit is, and logits of every length come from the one call that gave the codes. Two
scores use them, over all lengths that query and index share:

- ``weighted``: the Hamming distance with each differing bit counted by the query's ``|logit|``.
- ``asymmetric``: the squared Euclidean distance between the query's ``tanh(logits)``, which is what training compares,
  and the database's codes of -1 and 1 (Gordo, Perronnin, Gong and Lazebnik, *Asymmetric Distances for Binary
  Embeddings*, TPAMI 2014).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import InputError
from admth_runtime.index.candidates import Score
from admth_runtime.index.probing import bits_of
from admth_runtime.index.segment import Segment

__all__ = ["RERANKS", "check_rerank", "make_score"]

RERANKS = ("weighted", "asymmetric")


def check_rerank(rerank: str | None) -> None:
    """Check the name of a score.

    Raises:
        InputError: it is neither None nor one of :data:`RERANKS`.
    """
    if rerank is not None and rerank not in RERANKS:
        raise InputError(f"rerank {rerank!r} is unknown: use {' or '.join(RERANKS)}, or leave it out")


def make_score(rerank: str, logits: Mapping[int, NDArray[np.float32]]) -> Score:
    """Return the score of one query.

    Args:
        rerank: one of :data:`RERANKS`.
        logits: the query's, ``[L]`` by code length.
    """
    constant, tables = 0.0, {}
    for length, single in logits.items():
        values: NDArray[np.float64] = single.astype(np.float64)
        if rerank == "weighted":
            # A set bit of the code costs -logit more than a clear one, which costs what a positive logit holds.
            constant += float(np.maximum(values, 0).sum())
            tables[length] = _byte_tables(-values)
        else:
            soft = np.tanh(values)
            constant += float(((soft + 1) ** 2).sum())
            tables[length] = _byte_tables(-4 * soft)

    def score(segment: Segment, groups: NDArray[np.int64]) -> NDArray[np.float32]:
        total = np.full(len(groups), constant)
        for length, table in tables.items():
            codes = segment.codes(length, groups)
            for place in range(codes.shape[1]):
                total += table[place][codes[:, place]]
        return total.astype(np.float32)

    return score


def _byte_tables(costs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what each value of each byte of a code costs, ``[L / 8, 256]``, from what each set bit costs, ``[L]``."""
    tables: NDArray[np.float64] = costs.reshape(-1, 8) @ bits_of(8).T
    return tables
