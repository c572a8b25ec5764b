"""A few rows of an index with the logits of their keys, kept to learn from how far a search must probe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from admth_runtime.index.probing import key_weights
from admth_runtime.index.segment import key_bits, keys_of
from admth_runtime.packing import UInt8Array
from admth_runtime.results import HashCodes

__all__ = ["SAMPLE_SIZE", "Sample"]

SAMPLE_SIZE = 1000
"""Rows that are kept, at most twice as many after images were added."""


@dataclass(frozen=True, eq=False)
class Sample:
    """s rows.

    Attributes:
        codes: packed, uint8 ``[s, L / 8]``, by code length.
        keys: uint16 ``[s]``.
        weights: what it costs to change each bit of a key, float32 ``[s, bits]``.
        stands_for: the number of rows they were taken from.
    """

    codes: Mapping[int, UInt8Array]
    keys: NDArray[np.uint16]
    weights: NDArray[np.float32]
    stands_for: int

    @classmethod
    def of(cls, codes: HashCodes) -> Sample | None:
        """Take evenly spaced rows, or return None where the logits of the shortest code are not known."""
        lengths = codes.code_lengths
        if lengths[0] not in codes.logits or codes.count == 0:
            return None
        rows = np.arange(0, codes.count, max(1, codes.count // SAMPLE_SIZE))[:SAMPLE_SIZE]
        weights = key_weights(codes.logits[lengths[0]][rows], len(rows), key_bits(lengths))
        tables = {length: codes[length][rows] for length in lengths}
        return cls(tables, keys_of(tables[lengths[0]]), weights, codes.count)

    @staticmethod
    def joined(first: Sample | None, second: Sample | None) -> Sample | None:
        """Join two samples, each with its share of the rows."""
        if first is None or second is None:
            return first or second
        total = first.stands_for + second.stands_for
        halves = [part.thinned(round(2 * SAMPLE_SIZE * part.stands_for / total)) for part in (first, second)]
        return Sample(
            {length: np.concatenate([part.codes[length] for part in halves]) for length in first.codes},
            np.concatenate([part.keys for part in halves]),
            np.concatenate([part.weights for part in halves]),
            total,
        )

    def thinned(self, size: int) -> Sample:
        """Keep evenly spaced rows, ``size`` at most and at least one."""
        rows = np.unique(np.linspace(0, len(self.keys) - 1, min(max(size, 1), len(self.keys))).astype(np.int64))
        codes = {length: table[rows] for length, table in self.codes.items()}
        return Sample(codes, self.keys[rows], self.weights[rows], self.stands_for)
