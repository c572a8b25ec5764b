"""Codes as machine words: a few 4- or 8-byte columns, zero-padded, on which distances are one XOR and one popcount.

Zeros in both codes add nothing to a distance, so 48 bits padded to 64 give the distances of 48. The padded widths are
those for which FAISS has fast kernels (4, 8, 16, 32 and 64 bytes), so its functions can read the same memory.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from admth_runtime.packing import UInt8Array, popcount

__all__ = ["Words", "from_words", "gathered_distances", "to_words", "word_distances", "word_shape"]

Words = NDArray[np.unsignedinteger]
"""uint32 or uint64 ``[n, columns]``; :func:`word_shape` says which for a code length."""

_KERNEL_BYTES = (4, 8, 16, 32, 64)


def word_shape(length: int) -> tuple[np.dtype[np.unsignedinteger], int]:
    """Return the dtype of a word and the number of columns for codes of ``length`` bits."""
    needed = length // 8
    padded = next((size for size in _KERNEL_BYTES if size >= needed), -(-needed // 8) * 8)
    size = 4 if padded == 4 else 8
    return np.dtype(f"u{size}"), padded // size


def to_words(codes: UInt8Array) -> Words:
    """Pad packed codes uint8 ``[n, L / 8]`` to words ``[n, columns]``.

    The bytes keep their order in memory, whatever the machine's byte order, so a word is no number to sort by.
    """
    dtype, columns = word_shape(8 * codes.shape[1])
    padded = columns * dtype.itemsize
    if padded == codes.shape[1]:
        return np.ascontiguousarray(codes).view(dtype)
    wide = np.zeros((len(codes), padded), dtype=np.uint8)
    wide[:, : codes.shape[1]] = codes
    return wide.view(dtype)


def from_words(words: Words, length: int) -> UInt8Array:
    """Return the packed codes uint8 ``[n, length / 8]`` that :func:`to_words` padded."""
    as_bytes = np.ascontiguousarray(words).view(np.uint8)
    return np.ascontiguousarray(as_bytes.reshape(len(words), -1)[:, : length // 8])


def word_distances(words: Words, query: Words) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Return the Hamming distances ``[n]`` of codes ``[n, columns]`` to a query ``[columns]``, or row by row.

    Args:
        words: the codes.
        query: one code, or one for each row.

    Returns:
        uint8 while 255 bits suffice, else uint16.
    """
    distances = popcount(words[..., 0] ^ query[..., 0])
    if words.shape[-1] == 1:
        return distances
    wide = 64 * words.shape[-1] > 255
    total = distances.astype(np.uint16) if wide else distances
    for column in range(1, words.shape[-1]):
        total += popcount(words[..., column] ^ query[..., column])
    return total


def gathered_distances(words: Words, groups: NDArray[np.int64], query: Words) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Return ``word_distances(words[groups], query)``, for a table ``[g, columns]`` and one query ``[columns]``."""
    if words.shape[1] == 1:  # NumPy gathers numbers several times faster than rows of one number
        return popcount(words[:, 0].take(groups) ^ query[0])
    return word_distances(words[groups], query)
