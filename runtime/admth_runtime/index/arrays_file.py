"""A file of arrays that is mapped, not read: a header in JSON, then each array at a multiple of 64 bytes.

Layout: 8 bytes of magic, the size of the header as 8 bytes little-endian, the header, zeros up to the next multiple of
64, the arrays with zeros between. The header names dtype (little-endian), shape and offset of each array, facts of the
writer, and the size of the whole file, so that a truncated file is noticed when it is opened.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import InputError
from admth_runtime.files import atomic_path

__all__ = ["ArraysFile", "read_arrays", "write_arrays"]

_MAGIC = b"ADMTHIX1"
_ALIGNMENT = 64
_DTYPES = ("|u1", "|b1", "<u2", "<u4", "<u8", "<i8", "<f4")
_MOST_HEADER = 1 << 24


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
    """Write arrays by rename.

    Args:
        path: the file.
        arrays: of booleans, unsigned integers, int64 or float32, by name.
        facts: JSON that is kept with them.

    Raises:
        OutputError: it cannot be written; whatever was there stays.
    """
    little = {name: np.ascontiguousarray(table, dtype=table.dtype.newbyteorder("<")) for name, table in arrays.items()}
    # Offsets are relative to the first array, since the header's size depends on their digits.
    place, described = 0, {}
    for name, table in little.items():
        described[name] = {"dtype": table.dtype.str, "shape": list(table.shape), "offset": place}
        place = _aligned(place + table.nbytes)
    header = json.dumps({"facts": dict(facts), "arrays": described, "size": place}, allow_nan=False).encode()
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
        for table in little.values():
            file.write(bytes(-file.tell() % _ALIGNMENT))
            table.tofile(file)
        file.write(bytes(-file.tell() % _ALIGNMENT))


@dataclass(frozen=True, eq=False)
class ArraysFile:
    """A file of arrays that is mapped.

    Attributes:
        arrays: read-only, by name.
        facts: what the writer kept with them.
        release: gives back the memory of the pages that were read; they are read again when they are needed.
    """

    arrays: Mapping[str, NDArray[Any]]
    facts: Mapping[str, Any]
    release: Callable[[], None]


def read_arrays(path: Path, wanted: Mapping[str, str] | None = None) -> ArraysFile:
    """Map a file's arrays.

    Args:
        path: the file.
        wanted: names that must be there with their dtypes, such as ``{"ids": "<u4 <i8"}`` for either.

    Raises:
        InputError: the file is missing, truncated, or not one of ours.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
            size = int.from_bytes(head[8:], "little")
            if head[:8] != _MAGIC or size > _MOST_HEADER:
                raise _broken(path, "it is no file of an admth index")
            header = json.loads(file.read(size))
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise _broken(path, "it is missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise _broken(path, str(error)) from error
    mapped = np.frombuffer(memory, dtype=np.uint8)
    start = _aligned(16 + size)
    try:
        expected = start + header["size"]
        if len(mapped) != expected:
            raise _broken(path, f"it has {len(mapped):,} of {expected:,} bytes")
        arrays = {name: _array(mapped[start:], described) for name, described in header["arrays"].items()}
        facts = header["facts"]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise _broken(path, f"its header is malformed ({type(error).__name__})") from error
    for name, dtype in (wanted or {}).items():
        if name not in arrays or arrays[name].dtype.str not in dtype.split():
            raise _broken(path, f"it lacks the array {name} of {dtype}")
    advice = getattr(mmap, "MADV_DONTNEED", None)
    return ArraysFile(arrays, facts, (lambda: None) if advice is None else partial(memory.madvise, advice))


def _array(data: NDArray[np.uint8], described: Mapping[str, Any]) -> NDArray[Any]:
    if described["dtype"] not in _DTYPES or any(size < 0 for size in described["shape"]):
        raise ValueError("unknown dtype")
    dtype = np.dtype(described["dtype"])
    start, size = described["offset"], dtype.itemsize * int(np.prod(described["shape"], dtype=np.int64))
    table: NDArray[Any] = data[start : start + size].view(dtype)
    return table.reshape(described["shape"])


def _aligned(place: int) -> int:
    return place + -place % _ALIGNMENT


def _broken(path: Path, reason: str) -> InputError:
    return InputError(f"the index file {path} is unusable, {reason}: build the index again")
