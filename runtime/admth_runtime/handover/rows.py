"""What passes from an index to the writer of a target: blocks of rows, and facts of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from admth_runtime.packing import to_hex, unpack_bits

__all__ = ["Handover", "Rows", "Target", "part_name"]


@dataclass(frozen=True)
class Rows:
    """Some consecutive images of an index.

    Attributes:
        ids: int64 ``[n]``.
        uris: n texts.
        codes: uint8 ``[n, L / 8]`` by code length, most significant bit first.
    """

    ids: NDArray[np.int64]
    uris: Sequence[str]
    codes: Mapping[int, NDArray[np.uint8]]

    def __len__(self) -> int:
        return len(self.uris)

    def hex(self, length: int) -> list[str]:
        """Return the codes of a length as hexadecimal text."""
        return to_hex(self.codes[length])

    def bits(self, length: int) -> list[str]:
        """Return the codes of a length as text of 0 and 1."""
        table = unpack_bits(self.codes[length]) + ord("0")
        return [row.tobytes().decode() for row in table]

    def signed(self, length: int) -> list[list[int]]:
        """Return the codes of a length as signed bytes, -128 to 127: the same bits in two's complement."""
        signed: list[list[int]] = self.codes[length].view(np.int8).tolist()
        return signed


@dataclass(frozen=True)
class Handover:
    """What a target's schema and queries are made from.

    Attributes:
        name: what the table, collection or index is called there.
        images: how many rows there are.
        code_lengths: bits of each code, increasing.
        example: the first row, which the queries ask for unless told otherwise.
        longest_uri: bytes of the longest uri in UTF-8.
        parts: names of the files of rows, in order.
        origin: one line that says where the codes come from.
    """

    name: str
    images: int
    code_lengths: tuple[int, ...]
    example: Rows
    longest_uri: int
    parts: tuple[str, ...]
    origin: str

    @property
    def shortest(self) -> int:
        """The shortest code length, whose code is a bucket's key."""
        return self.code_lengths[0]

    @property
    def longest(self) -> int:
        """The longest code length, which ranks."""
        return self.code_lengths[-1]


class Target(Protocol):
    """A search server that codes are handed over to."""

    suffix: str
    """Ending of the files of rows."""

    rows_per_file: int
    """Rows in one of them, by what the server takes at once."""

    def check(self, name: str, code_lengths: tuple[int, ...]) -> None:
        """Refuse what the server cannot hold, and a package that is missing, before any work.

        Raises:
            InputError, MissingExtraError: with the mend.
        """

    def write_rows(self, path: Path, blocks: Iterator[Rows]) -> None:
        """Write one file of rows; every block is read once.

        Raises:
            InputError: a row that the server would refuse; the message names it.
        """

    def texts(self, handover: Handover) -> dict[str, str]:
        """Return schema, queries and instructions, by file name."""


def part_name(number: int, suffix: str) -> str:
    """Return the name of a file of rows."""
    return f"rows-{number:05}{suffix}"
