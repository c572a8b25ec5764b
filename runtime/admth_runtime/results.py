"""What one inference call returns: packed codes and logits of every length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import CodeLengthError, InputError
from admth_runtime.packing import to_hex

__all__ = ["HashCodes"]

Value = TypeVar("Value")
Number = TypeVar("Number", np.uint8, np.float32)


class HashCodes(Mapping[int, NDArray[np.uint8]]):
    """Codes of n images, by code length: ``codes[64]`` is uint8 ``[n, 8]``, packed MSB first.

    A read-only mapping, so ``len(codes)`` is the number of lengths and ``codes.count`` the number of images. Its
    arrays are read-only too: copy one to change it.

    Attributes:
        logits: float32 ``[n, L]`` by code length, before tanh; a bit is 1 where its logit is > 0.
    """

    __slots__ = ("_codes", "logits")

    logits: Mapping[int, NDArray[np.float32]]

    def __init__(
        self, codes: Mapping[int, NDArray[np.uint8]], logits: Mapping[int, NDArray[np.float32]] | None = None
    ) -> None:
        self._codes: _ByLength[NDArray[np.uint8]] = _ByLength(
            (length, _read_only(array)) for length, array in codes.items()
        )
        self.logits = _ByLength((length, _read_only(array)) for length, array in (logits or {}).items())

    def __getitem__(self, length: int) -> NDArray[np.uint8]:
        return self._codes[length]

    def __iter__(self) -> Iterator[int]:
        return iter(self._codes)

    def __len__(self) -> int:
        return len(self._codes)

    def __repr__(self) -> str:
        return f"HashCodes(count={self.count}, code_lengths={self.code_lengths})"

    @property
    def code_lengths(self) -> tuple[int, ...]:
        """The code lengths in bits, increasing."""
        return tuple(self._codes)

    @property
    def count(self) -> int:
        """The number of images n."""
        return len(next(iter(self._codes.values())))

    def hex(self, length: int) -> list[str]:
        """Write the codes of one length as hexadecimal text, L / 4 digits an image.

        Raises:
            CodeLengthError: there is no such length.
        """
        return to_hex(self[length])

    @classmethod
    def concatenate(cls, parts: Sequence[HashCodes]) -> HashCodes:
        """Join the codes of consecutive batches.

        Raises:
            InputError: there is no part, or the parts' lengths differ.
        """
        if not parts:
            raise InputError("no codes to join: pass at least one HashCodes")
        if len({(part.code_lengths, tuple(part.logits)) for part in parts}) > 1:
            raise InputError(f"codes of lengths {sorted({part.code_lengths for part in parts})} cannot be joined")
        if len(parts) == 1:
            return parts[0]
        return cls(
            {length: np.concatenate([part[length] for part in parts]) for length in parts[0]},
            {length: np.concatenate([part.logits[length] for part in parts]) for length in parts[0].logits},
        )


def _read_only(array: NDArray[Number]) -> NDArray[Number]:
    view = array.view()  # the caller's own array stays as it was
    view.flags.writeable = False
    return view


class _ByLength(dict[int, Value]):
    """A dictionary that answers an absent code length with the lengths there are."""

    def __missing__(self, length: object) -> Value:
        there = ", ".join(str(known) for known in self) or "none"
        raise CodeLengthError(f"code length {length!r} is not there: this model or file has {there}")
