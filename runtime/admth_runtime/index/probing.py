"""In which order to look into the buckets: by how little a query's code must change to become the bucket's key.

The least confident bits of a query are those whose logits are near 0, so the cost of a key is the sum of |logit| over
the bits in which it differs from the query's: buckets in order of that cost are looked into best first (Li, Yan, Zhang,
Tang, Lian and Fan, *A General and Efficient Querying Method for Learning to Hash*, SIGMOD 2018). Without logits every
bit weighs 1, and the cost is the Hamming distance of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Probes", "bits_of", "key_costs", "key_weights", "likely_probes"]

# The cheapest changes of either half of a key that are combined.
_HALF = 32


@dataclass(frozen=True, eq=False)
class Probes:
    """The keys to look at first, for each of q queries.

    Attributes:
        keys: uint16 ``[q, p]``, cheapest first.
        costs: float32 ``[q, p]``.
        complete_below: every key that costs less than this is among them, float32 ``[q]``; infinite when all keys are.
    """

    keys: NDArray[np.uint16]
    costs: NDArray[np.float32]
    complete_below: NDArray[np.float32]


def key_weights(logits: NDArray[np.float32] | None, queries: int, bits: int) -> NDArray[np.float32]:
    """Return what it costs to change each bit of each query's key, float32 ``[q, bits]``.

    Args:
        logits: of the shortest code, ``[q, L]``, or None.
        queries: the number of queries.
        bits: the number of bits in a key.
    """
    if logits is None:
        return np.ones((queries, bits), dtype=np.float32)
    return np.abs(logits[:, :bits])


def likely_probes(keys: NDArray[np.uint16], weights: NDArray[np.float32]) -> Probes:
    """Return the cheapest keys of each query, from the cheapest changes of the two halves of its own.

    Args:
        keys: the queries' own keys, ``[q]``.
        weights: see :func:`key_weights`.
    """
    bits = weights.shape[1]
    low_bits = bits // 2
    high, high_costs, high_rest = _cheapest_changes(weights[:, : bits - low_bits])
    low, low_costs, low_rest = _cheapest_changes(weights[:, bits - low_bits :])
    costs = (high_costs[:, :, None] + low_costs[:, None, :]).reshape(len(keys), -1)
    changes = ((high[:, :, None] << np.uint16(low_bits)) | low[:, None, :]).reshape(len(keys), -1)
    order = np.argsort(costs, axis=1, kind="stable")
    return Probes(
        keys=keys[:, None] ^ np.take_along_axis(changes, order, 1),
        costs=np.take_along_axis(costs, order, 1),
        complete_below=np.minimum(high_rest, low_rest),
    )


def key_costs(keys: NDArray[np.uint16], query_key: np.uint16, weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cost of each key for one query, float32 ``[m]``.

    Args:
        keys: ``[m]``.
        query_key: the query's own.
        weights: the query's, ``[bits]``.
    """
    bits = len(weights)
    low_bits = bits // 2
    changes = keys ^ query_key
    high_costs = _change_costs(weights[None, : bits - low_bits])[0]
    low_costs = _change_costs(weights[None, bits - low_bits :])[0]
    costs: NDArray[np.float32] = high_costs[changes >> np.uint16(low_bits)]
    costs += low_costs[changes & np.uint16((1 << low_bits) - 1)]
    return costs


def bits_of(bits: int) -> NDArray[np.float32]:
    """Return the bits of 0, 1, ... ``2^bits - 1``, most significant first, float32 ``[2^bits, bits]``."""
    numbers = np.arange(1 << bits)[:, None]
    return ((numbers >> np.arange(bits - 1, -1, -1)) & 1).astype(np.float32)


def _cheapest_changes(
    weights: NDArray[np.float32],
) -> tuple[NDArray[np.uint16], NDArray[np.float32], NDArray[np.float32]]:
    """Return the cheapest changes of half a key, their costs, and the cost of the cheapest that is left out."""
    costs = _change_costs(weights)
    if costs.shape[1] <= _HALF:
        order = np.argsort(costs, axis=1, kind="stable")
        rest = np.full(len(costs), np.inf, dtype=np.float32)
    else:
        order = np.argpartition(costs, _HALF, axis=1)[:, : _HALF + 1]
        order = np.take_along_axis(order, np.argsort(np.take_along_axis(costs, order, 1), axis=1, kind="stable"), 1)
        rest = np.take_along_axis(costs, order[:, _HALF:], 1)[:, 0]
        order = order[:, :_HALF]
    return order.astype(np.uint16), np.take_along_axis(costs, order, 1), rest


def _change_costs(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cost of each change of some bits, ``[q, 2^bits]``, from that of each bit, ``[q, bits]``.

    Sums in one order, not a matrix product: both callers must get the same number to the last bit.
    """
    costs = np.zeros((len(weights), 1), dtype=np.float32)
    for bit in range(weights.shape[1] - 1, -1, -1):
        costs = np.concatenate([costs, costs + weights[:, bit, None]], axis=1)
    return costs
