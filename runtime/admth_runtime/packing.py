"""Packed binary codes: pack, unpack, hexadecimal text and Hamming distance.

The bit order is MSB first within a byte, ``numpy.packbits(logits > 0, axis=1)``: the order of pgvector, Vespa,
Elasticsearch and NumPy. A bit is 1 where its logit is greater than 0, so a logit of exactly 0 gives a 0 bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import InputError

__all__ = [
    "check_code_length",
    "check_code_lengths",
    "from_hex",
    "hamming_distance",
    "hamming_matrix",
    "pack_bits",
    "pack_logits",
    "popcount",
    "to_hex",
    "unpack_bits",
]

UInt8Array = NDArray[np.uint8]

# NumPy 2 counts bits in one instruction; this table serves NumPy 1.
_POPCOUNT = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


def check_code_length(length: int) -> int:
    """Return a code length that packs into whole bytes.

    Raises:
        InputError: ``length`` is not a positive multiple of 8.
    """
    if isinstance(length, bool) or not isinstance(length, (int, np.integer)) or length <= 0 or length % 8:
        raise InputError(
            f"code length {length!r} is not a positive multiple of 8: use lengths such as 16, 32, 48 or 64"
        )
    return int(length)


def check_code_lengths(lengths: Sequence[int]) -> tuple[int, ...]:
    """Return code lengths as a tuple, increasing and without repeats.

    Raises:
        InputError: there is none, one is no positive multiple of 8, or they do not increase.
    """
    checked = tuple(check_code_length(length) for length in lengths)
    if not checked:
        raise InputError("no code length was given: name at least one, such as 64")
    if any(later <= earlier for earlier, later in pairwise(checked)):
        raise InputError(f"code lengths {list(checked)} do not increase: write them as {sorted(set(checked))}")
    return checked


def pack_logits(logits: NDArray[np.floating]) -> UInt8Array:
    """Pack the signs of logits.

    Args:
        logits: float ``[n, L]`` with L a multiple of 8; a bit is 1 where the logit is > 0.

    Returns:
        uint8 ``[n, L / 8]``, C-contiguous, MSB first.

    Raises:
        InputError: the array is not two-dimensional, or L is no multiple of 8.
    """
    return pack_bits(np.asarray(logits) > 0)


def pack_bits(bits: NDArray[np.generic]) -> UInt8Array:
    """Pack boolean or 0/1 bits ``[n, L]`` into uint8 ``[n, L / 8]``, MSB first.

    Raises:
        InputError: the array is not two-dimensional, L is no multiple of 8, or a value is neither 0 nor 1.
    """
    array = np.asarray(bits)
    if array.ndim != 2:
        raise InputError(f"bits of shape {array.shape} are not [n, code length]: pass a two-dimensional array")
    check_code_length(array.shape[1])
    if array.dtype != np.bool_ and not bool(np.isin(array, (0, 1)).all()):
        raise InputError("bits hold values other than 0 and 1: pass logits to pack_logits, or (codes > 0)")
    return np.ascontiguousarray(np.packbits(array.astype(np.bool_), axis=1))


def unpack_bits(codes: UInt8Array) -> UInt8Array:
    """Unpack uint8 codes ``[n, L / 8]`` into bits uint8 ``[n, L]`` of 0 and 1, the inverse of :func:`pack_bits`.

    Raises:
        InputError: the codes are not a two-dimensional uint8 array.
    """
    return np.unpackbits(_checked_codes(codes), axis=1)


def to_hex(codes: UInt8Array) -> list[str]:
    """Write each code of uint8 ``[n, L / 8]`` as lower-case hexadecimal text of L / 4 digits."""
    return [row.tobytes().hex() for row in _checked_codes(codes)]


def from_hex(texts: Sequence[str]) -> UInt8Array:
    """Read codes written by :func:`to_hex`.

    Args:
        texts: hexadecimal codes of one length.

    Returns:
        uint8 ``[n, L / 8]``.

    Raises:
        InputError: a text is not hexadecimal, or the texts differ in length.
    """
    try:
        rows = [bytes.fromhex(text) for text in texts]
    except ValueError as error:
        raise InputError(f"a code is not hexadecimal ({error}): pass text such as 'a3f0'") from error
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise InputError(f"codes of {sorted(8 * n for n in lengths)} bits are mixed: pass codes of one length")
    if lengths == {0}:
        raise InputError("a code is empty: pass text such as 'a3f0'")
    return np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(len(rows), -1).copy()


def hamming_distance(a: UInt8Array, b: UInt8Array) -> NDArray[np.uint16]:
    """Count differing bits between codes, byte axis last, with NumPy broadcasting.

    Args:
        a: uint8 ``[..., L / 8]``.
        b: uint8 ``[..., L / 8]``.

    Returns:
        uint16 ``[...]``, each between 0 and L.

    Raises:
        InputError: an array is not uint8, or the byte counts differ.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype != np.uint8 or b.dtype != np.uint8:
        raise InputError(f"codes of dtype {a.dtype} and {b.dtype} are not packed: pass uint8 from pack_logits")
    if a.ndim == 0 or b.ndim == 0 or a.shape[-1] != b.shape[-1]:
        raise InputError(f"codes of shapes {a.shape} and {b.shape} differ in length: compare equal code lengths")
    distances: NDArray[np.uint16] = popcount(a ^ b).sum(axis=-1, dtype=np.uint16)
    return distances


def hamming_matrix(queries: UInt8Array, database: UInt8Array) -> NDArray[np.uint16]:
    """Distances of every query to every database code: uint16 ``[queries, database]``.

    Works on whole 2-, 4- or 8-byte words where the length allows, which is several times faster than bytes.
    The caller bounds the memory by the number of queries: about ``queries * database * 10`` bytes at 64 bits.
    """
    a, b = _checked_codes(queries), _checked_codes(database)
    if a.shape[1] != b.shape[1]:
        raise InputError(f"codes of {8 * a.shape[1]} and {8 * b.shape[1]} bits differ: compare equal code lengths")
    word = next(size for size in (8, 4, 2, 1) if a.shape[1] % size == 0)
    a_words, b_words = a.view(f"u{word}"), b.view(f"u{word}")
    distances = np.zeros((len(a), len(b)), dtype=np.uint16)
    for column in range(a_words.shape[1]):
        distances += popcount(a_words[:, column, None] ^ b_words[None, :, column])
    return distances


def popcount(values: NDArray[np.unsignedinteger]) -> NDArray[np.uint8]:
    """Count the set bits of unsigned integers of any shape: uint8 of the same shape."""
    counts: NDArray[np.uint8]
    if hasattr(np, "bitwise_count"):
        counts = np.bitwise_count(values)
    else:
        as_bytes = np.ascontiguousarray(values)[..., None].view(np.uint8)
        counts = _POPCOUNT[as_bytes].sum(axis=-1, dtype=np.uint8)
    return counts


def _checked_codes(codes: UInt8Array) -> UInt8Array:
    array = np.asarray(codes)
    if array.ndim != 2 or array.dtype != np.uint8 or array.shape[1] == 0:
        raise InputError(f"codes of dtype {array.dtype} and shape {array.shape} are not uint8 [n, code length / 8]")
    return np.ascontiguousarray(array)
