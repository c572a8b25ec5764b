"""Matrices in 8 or 4 bits, one scale for each block of a row, in the layout of ONNX Runtime's MatMulNBits kernel.

A block is a run of consecutive inputs of one output. Its weights are ``scale * (value - zero point)`` with the kernel's
default zero points, 128 for 8 bits and 8 for 4, so none are stored. Two 4-bit values share a byte, the first one below.

With inputs of real images, a weight is not rounded to the nearest value. The errors made so far in its row, times how
their inputs go along with this one's, are added before it is rounded, so that errors cancel in the products that occur.
That is GPTQ (Frantar et al., arXiv 2210.17323) in the form of QuIP's LDLQ (Chee et al., arXiv 2307.13304, who show
the two equal): it takes one Cholesky factor and no inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from admth_calibration.weights_options import BLOCK_SIZES

__all__ = ["BlockedMatrix", "Rows", "error_feedback", "fitting_block_size", "quantize_blocks"]

# Rows at a time: what is copied of a matrix stays small, and products stay large.
_ROWS = 2048
# Columns whose errors go into all later columns by one product.
_COLUMNS = 128
# Share of the mean square input that is added to every input's: images are fewer than inputs, and a direction in which
# no image lies must not become free. From 0.01 to 1 the flipped bits of the networks tried here were the same.
_DAMPING = 0.1


class Rows(Protocol):
    """A float32 matrix that is read by rows: an array, or one that is in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Outputs and inputs."""

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]:
        """Return some rows."""


@dataclass(frozen=True, eq=False)
class BlockedMatrix:
    """A matrix in blocks.

    Attributes:
        values: uint8 ``[outputs, blocks, block_size * bits / 8]``; the last block is filled up with zeros.
        scales: float32 ``[outputs, blocks]``.
        inputs: columns of the matrix.
        bits: 8 or 4.
        block_size: weights a block.
    """

    values: NDArray[np.uint8]
    scales: NDArray[np.float32]
    inputs: int
    bits: int
    block_size: int

    def dequantized(self) -> NDArray[np.float32]:
        """Return the matrix that the kernel multiplies with, float32 ``[outputs, inputs]``."""
        values = self.values
        if self.bits == 4:
            values = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:2], -1)
        centred = values.astype(np.float32) - np.float32(_zero_point(self.bits))
        matrix = centred * self.scales[:, :, None]
        return matrix.reshape(len(matrix), -1)[:, : self.inputs]


def fitting_block_size(inputs: int, largest: int) -> int:
    """Return the largest block size up to ``largest`` that divides a row, or the smallest where none does."""
    fitting = [size for size in BLOCK_SIZES if size <= largest and inputs % size == 0]
    return fitting[-1] if fitting else BLOCK_SIZES[0]


def quantize_blocks(
    weight: Rows,
    bits: int,
    block_size: int,
    feedback: NDArray[np.float32] | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> BlockedMatrix:
    """Round a matrix to blocks.

    Args:
        weight: float32 ``[outputs, inputs]``. Where a value is not finite, neither is a scale of its row.
        bits: 8 or 4.
        block_size: weights a block, one of ``BLOCK_SIZES``.
        feedback: what :func:`error_feedback` made of the layer's inputs; None rounds to nearest.
        advance: is told the number of rows that are done, now and then.
    """
    outputs, inputs = weight.shape
    blocks = -(-inputs // block_size)
    values = np.empty((outputs, blocks, block_size * bits // 8), dtype=np.uint8)
    scales = np.empty((outputs, blocks), dtype=np.float32)
    for start in range(0, outputs, _ROWS):
        rows = slice(start, min(start + _ROWS, outputs))
        part = np.ascontiguousarray(weight[rows], dtype=np.float32)
        with np.errstate(invalid="ignore"):
            if feedback is None:
                integers = _round_nearest(part, bits, block_size, scales[rows])
            else:
                integers = _round_with_feedback(part, bits, block_size, scales[rows], feedback)
        values[rows] = _packed(integers, bits, block_size, blocks)
        advance(rows.stop - rows.start)
    return BlockedMatrix(values, scales, inputs, bits, block_size)


def error_feedback(inputs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return how the error in one weight is to be made up for by the later weights of its row.

    With H the second moment of a layer's inputs, ``H = (I + F) D (I + F)^T`` for a strictly upper triangular F and a
    diagonal D. Rounding ``w_k + sum_{j < k} (w_j - q_j) F_jk`` in order is the best that rounding one weight after the
    other can do for the squared error of the outputs.

    Args:
        inputs: float32 ``[images, inputs]``.

    Returns:
        F, float32 ``[inputs, inputs]``.
    """
    moment = inputs.T @ inputs
    moment /= np.float32(len(inputs))
    diagonal = np.einsum("ii->i", moment)
    mean = float(diagonal.mean())
    diagonal += np.float32(_DAMPING * mean if mean > 0 else 1.0)
    # The Cholesky factor is lower triangular; of the matrix in reverse order it is, in reverse order, an upper one.
    factor = np.linalg.cholesky(moment[::-1, ::-1])[::-1, ::-1]
    feedback = np.ascontiguousarray(factor / np.diag(factor))
    np.einsum("ii->i", feedback)[:] = 0.0
    return feedback


def _round_nearest(
    part: NDArray[np.float32], bits: int, block_size: int, scales: NDArray[np.float32]
) -> NDArray[np.int8]:
    integers = np.empty(part.shape, dtype=np.int8)
    for block, start in enumerate(range(0, part.shape[1], block_size)):
        columns = slice(start, start + block_size)
        scales[:, block] = _scales(part[:, columns], bits)
        integers[:, columns] = _rounded(part[:, columns] / scales[:, block, None], bits)
    return integers


def _round_with_feedback(
    part: NDArray[np.float32],
    bits: int,
    block_size: int,
    scales: NDArray[np.float32],
    feedback: NDArray[np.float32],
) -> NDArray[np.int8]:
    inputs = part.shape[1]
    integers = np.empty(part.shape, dtype=np.int8)
    errors = np.empty_like(part)
    step = max(block_size, _COLUMNS)
    for start in range(0, inputs, step):
        columns = slice(start, min(start + step, inputs))
        wanted = part[:, columns] + errors[:, :start] @ feedback[:start, columns]
        within = feedback[columns, columns]
        for place in range(wanted.shape[1]):
            column, block = start + place, (start + place) // block_size
            if column % block_size == 0:
                scales[:, block] = _scales(wanted[:, place : place + block_size], bits)
            scale = scales[:, block]
            integers[:, column] = _rounded(wanted[:, place] / scale, bits)
            error = part[:, column] - integers[:, column] * scale
            errors[:, column] = error
            wanted[:, place + 1 :] += error[:, None] * within[place, place + 1 :]
    return integers


def _scales(block: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Return the scale of each row of one block: float32 above zero, or below in 4 bits.

    4 bits count from -8 to 7, so the value that is largest without its sign becomes -8, by a scale of the other sign.
    """
    largest = np.take_along_axis(block, np.abs(block).argmax(axis=1)[:, None], axis=1)[:, 0]
    scales = np.abs(largest) / np.float32(127) if bits == 8 else largest / np.float32(-8)
    return np.where(np.abs(scales) < np.finfo(np.float32).tiny, np.float32(1), scales).astype(np.float32)


def _rounded(values: NDArray[np.floating], bits: int) -> NDArray[np.int8]:
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    clipped: NDArray[np.floating] = np.clip(np.rint(values), low, high)
    return clipped.astype(np.int8)


def _packed(integers: NDArray[np.int8], bits: int, block_size: int, blocks: int) -> NDArray[np.uint8]:
    rows, inputs = integers.shape
    missing = blocks * block_size - inputs
    filled = np.pad(integers, ((0, 0), (0, missing))) if missing else integers
    shifted: NDArray[np.uint8] = (filled.astype(np.int16) + _zero_point(bits)).astype(np.uint8)
    shifted = shifted.reshape(rows, blocks, block_size)
    return shifted if bits == 8 else np.bitwise_or(shifted[:, :, 0::2], np.left_shift(shifted[:, :, 1::2], np.uint8(4)))


def _zero_point(bits: int) -> int:
    return 1 << (bits - 1)
