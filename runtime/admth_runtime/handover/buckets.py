"""The buckets that a coarse-to-fine query looks into: the short codes nearest to the query's, the likeliest first."""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import InputError
from admth_runtime.packing import to_hex, unpack_bits

__all__ = ["nearest_buckets"]


def nearest_buckets(
    code: NDArray[np.uint8], logits: NDArray[np.float32] | None = None, *, count: int = 137
) -> list[str]:
    """Return the short codes to look up in a search server's ``bucket`` field, in hexadecimal, best first.

    A bucket's cost is the sum of |logit| over the bits in which it differs from the query, the order of
    quantisation-distance probing (GQR, SIGMOD 2018); without logits it is the number of those bits.

    Args:
        code: the query's short code, uint8 ``[L / 8]``.
        logits: its logits, float32 ``[L]``, or None.
        count: how many buckets; 137 are all within two of 16 bits.

    Raises:
        InputError: the arrays do not fit together, or ``count`` is less than 1.
    """
    code = np.asarray(code)
    if code.dtype != np.uint8 or code.ndim != 1 or code.size == 0:
        raise InputError(f"the code is {code.dtype} {list(code.shape)}, not one packed code, uint8 [L / 8]")
    bits = unpack_bits(code[None])[0]
    if count < 1:
        raise InputError(f"count {count} is less than 1: ask for one bucket or more")
    costs = np.ones(len(bits)) if logits is None else np.abs(np.asarray(logits, dtype=np.float64))
    if costs.shape != bits.shape:
        raise InputError(f"logits of shape {list(costs.shape)} are not those of a code of {len(bits)} bits")
    flips = _cheapest_flips(costs, min(count, 1 << min(len(bits), 62)))
    near = np.repeat(bits[None], len(flips), axis=0)
    for row, places in enumerate(flips):
        near[row, places] ^= 1
    return to_hex(np.packbits(near, axis=1))


def _cheapest_flips(costs: NDArray[np.float64], count: int) -> list[list[int]]:
    """Return the ``count`` subsets of bits with the smallest sums of costs, in order.

    Every subset of the sorted costs comes from exactly one other, by appending the next bit or by moving its last bit
    on, and never costs less than it, so a heap yields them in order.
    """
    order = np.argsort(costs, kind="stable").tolist()
    cheapest: list[list[int]] = [[]]
    heap: list[tuple[float, list[int]]] = [(float(costs[order[0]]), [0])]
    while len(cheapest) < count and heap:
        cost, ranks = heappop(heap)
        cheapest.append([order[rank] for rank in ranks])
        last = ranks[-1]
        if last + 1 < len(order):
            following = float(costs[order[last + 1]])
            heappush(heap, (cost + following, [*ranks, last + 1]))
            heappush(heap, (cost + following - float(costs[order[last]]), [*ranks[:-1], last + 1]))
    return cheapest
