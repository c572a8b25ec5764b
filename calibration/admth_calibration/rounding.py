"""From float weights to int8 with the least harm: nearest, zero-sum, and GPTQ rounding.

Activations behind a ReLU are positive, so rounding errors of weights add up instead of cancelling. Zero-sum rounding
flips the cheapest roundings until a channel's error, weighted by its mean inputs, is about zero. GPTQ (Frantar et al.
2023, after Hassibi and Stork 1993) rounds one column after the other and spreads each error over the columns to come,
by the second moments of the inputs: the optimal brain surgeon's answer to the same least squares.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["gptq_columns", "gptq_per_channel", "inverse_factor", "nearest", "zero_sum"]

_BLOCK = 64
_ROWS = 1024


def nearest(rows: NDArray[np.floating], scales: NDArray[np.float32], largest: int = 127) -> NDArray[np.int8]:
    """Round to the nearest step, half to even.

    Args:
        rows: weights ``[channels, inputs]``.
        scales: ``[channels]``.
        largest: bound of the integers.
    """
    rounded: NDArray[np.int8] = np.clip(np.rint(rows / scales[:, None]), -largest, largest).astype(np.int8)
    return rounded


def zero_sum(
    rows: NDArray[np.floating], scales: NDArray[np.float32], means: NDArray[np.floating], largest: int = 127
) -> NDArray[np.int8]:
    """Round so that the error of every channel on the mean input is about zero.

    Args:
        rows: weights ``[channels, inputs]``.
        scales: ``[channels]``.
        means: mean of each input, ``[inputs]``, or of each channel's own, ``[channels, inputs]``.
        largest: bound of the integers.
    """
    result = np.empty(rows.shape, dtype=np.int8)
    means = np.broadcast_to(means, rows.shape)
    for start in range(0, len(rows), _ROWS):  # the sort needs ten times the memory of its rows
        part = slice(start, start + _ROWS)
        result[part] = _zero_sum(rows[part], scales[part], means[part], largest)
    return result


def _zero_sum(
    rows: NDArray[np.floating], scales: NDArray[np.float32], means: NDArray[np.floating], largest: int
) -> NDArray[np.int8]:
    steps = rows / scales[:, None]
    rounded = np.clip(np.rint(steps), -largest, largest)
    errors = rounded - steps  # in steps, as everything here
    total = (errors * means).sum(axis=1)
    # Rounding the other way moves the total by the input's mean, against the sign of the error.
    other = np.clip(rounded - np.where(errors > 0, 1, -1), -largest, largest)
    moves = (other - rounded) * means
    helps = moves * total[:, None] < 0
    costs = np.square(other - steps) - np.square(errors)
    price = np.where(helps, costs / np.maximum(np.abs(moves), 1e-12), np.inf)
    order = np.argsort(price, axis=1)
    ordered = np.take_along_axis(np.where(helps, np.abs(moves), 0), order, axis=1)
    helping = np.take_along_axis(helps, order, axis=1)
    # A flip is worth it while it brings the total nearer to zero.
    taken = np.cumsum(ordered, axis=1) - ordered / 2 <= np.abs(total)[:, None]
    flips = np.zeros(rows.shape, dtype=bool)
    np.put_along_axis(flips, order, taken & helping, axis=1)
    chosen: NDArray[np.int8] = np.where(flips, other, rounded).astype(np.int8)
    return chosen


def gptq_columns(
    rows: NDArray[np.floating],
    scales: NDArray[np.float32],
    moments: NDArray[np.floating],
    *,
    damping: float = 0.01,
    largest: int = 127,
) -> NDArray[np.int8]:
    """Round rows that share their inputs.

    Args:
        rows: weights ``[channels, inputs]``.
        scales: ``[channels]``.
        moments: second moments of the inputs, ``[inputs, inputs]``: the mean or sum of ``x x^T``.
        damping: share of the mean diagonal that is added to it.
        largest: bound of the integers.
    """
    size = len(moments)
    order = np.argsort(-np.diag(moments))  # the inputs that matter most first, while errors can still be made good
    upper = inverse_factor(moments[order][:, order], damping)
    left = rows[:, order].astype(np.float32)
    result = np.zeros(rows.shape, dtype=np.int8)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        errors = np.zeros((len(rows), stop - start), dtype=np.float32)
        for column in range(start, stop):
            integers = np.clip(np.rint(left[:, column] / scales), -largest, largest)
            result[:, order[column]] = integers
            error = (left[:, column] - integers * scales) / upper[column, column]
            errors[:, column - start] = error
            left[:, column + 1 : stop] -= error[:, None] * upper[column, column + 1 : stop]
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return result


def gptq_per_channel(
    rows: NDArray[np.floating], scales: NDArray[np.float32], upper: NDArray[np.float32], *, largest: int = 127
) -> NDArray[np.int8]:
    """Round rows that each have inputs of their own, as in a depthwise convolution.

    Args:
        rows: weights ``[channels, inputs]``.
        scales: ``[channels]``.
        upper: what :func:`inverse_factor` makes of their moments, ``[channels, inputs, inputs]``.
        largest: bound of the integers.
    """
    left = rows.astype(np.float32)
    result = np.zeros(rows.shape, dtype=np.int8)
    for column in range(rows.shape[1]):
        integers = np.clip(np.rint(left[:, column] / scales), -largest, largest)
        result[:, column] = integers
        error = (left[:, column] - integers * scales) / upper[:, column, column]
        left[:, column + 1 :] -= error[:, None] * upper[:, column, column + 1 :]
    return result


def inverse_factor(moments: NDArray[np.floating], damping: float = 0.01) -> NDArray[np.float32]:
    """Return the upper Cholesky factor of the inverse of damped moments, ``[..., n, n]``."""
    size = moments.shape[-1]
    mean = np.trace(moments, axis1=-2, axis2=-1) / size
    # An input that is always zero would leave the matrix singular.
    damped = moments.astype(np.float64) + (damping * mean + 1e-9)[..., None, None] * np.eye(size)
    factor: Callable[[NDArray[np.floating]], NDArray[np.floating]] = np.linalg.cholesky
    return np.swapaxes(factor(np.linalg.inv(damped)), -1, -2).astype(np.float32)
