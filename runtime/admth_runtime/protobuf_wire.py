"""The protobuf wire format (https://protobuf.dev/programming-guides/encoding/), enough of it to walk a message.

Every length is checked against its enclosing message, so that damaged bytes end in :class:`DamagedError` and never in
a read beyond the file.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import NoReturn

__all__ = ["Buffer", "DamagedError", "Span", "as_integer", "as_span", "fields"]

Buffer = mmap.mmap | bytes
"""A whole file."""

Span = tuple[int, int]
"""Where a length-delimited field lies in the file: its first byte and the byte after its last."""


class DamagedError(Exception):
    """The bytes are not a protobuf message of the expected kind."""


def fields(data: Buffer, span: Span) -> Iterator[tuple[int, int | Span | None]]:
    """Yield number and value of each field of a message.

    A value is an integer, the span of a message or text, or None for a fixed-width number.

    Raises:
        DamagedError: a tag, a wire type or a length is impossible.
    """
    position, end = span
    while position < end:
        tag, position = _varint(data, position, end)
        number, wire_type = tag >> 3, tag & 7
        if number == 0 or tag >= 1 << 32:
            raise DamagedError(f"a field number at byte {position} is out of range")
        match wire_type:
            case 0:
                value, position = _varint(data, position, end)
                yield number, value
            case 2:
                length, start = _varint(data, position, end)
                position = start + length
                if position > end:
                    _raise_short(number, length, end - start)
                yield number, (start, position)
            case 1 | 5:
                length = 8 if wire_type == 1 else 4
                if position + length > end:
                    _raise_short(number, length, end - position)
                position += length
                yield number, None
            case _:
                raise DamagedError(f"byte {position} has the unknown wire type {wire_type}")


def _varint(data: Buffer, position: int, end: int) -> tuple[int, int]:
    """Read a base-128 number of at most ten bytes, cut to 64 bits; return it with the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise DamagedError(f"it ends within a number at byte {position}")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position
    raise DamagedError(f"a number at byte {position} is longer than ten bytes")


def as_integer(value: int | Span | None) -> int:
    """Return a field's signed 64-bit integer.

    Raises:
        DamagedError: the field holds a message, a text or a fixed-width number.
    """
    if not isinstance(value, int):
        raise DamagedError("a number is stored as something else")
    return value - (1 << 64) if value >= 1 << 63 else value


def as_span(value: int | Span | None) -> Span:
    """Return where a field's message or text lies.

    Raises:
        DamagedError: the field holds a number.
    """
    if not isinstance(value, tuple):
        raise DamagedError("a message or text is stored as a number")
    return value


def _raise_short(number: int, length: int, present: int) -> NoReturn:
    raise DamagedError(f"field {number} should have {length:,} bytes and {present:,} are there")
