"""IDX files, the format of MNIST and Fashion-MNIST, plain or gzip-compressed.

The format (http://yann.lecun.com/exdb/mnist): two zero bytes, a type byte (0x08 is uint8), the number of dimensions,
then each dimension as a big-endian 32-bit integer, then the values in C order.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import DataError, InputError
from admth_runtime.files import write_bytes

__all__ = ["read_idx", "write_idx"]

_UINT8 = 0x08
_BLOCK = 1 << 24


def read_idx(path: Path, *, dimensions: int) -> NDArray[np.uint8]:
    """Read one IDX file of uint8 values; a name that ends in ``.gz`` is decompressed.

    Args:
        path: the file.
        dimensions: how many dimensions it must have: 1 for labels, 3 for images.

    Returns:
        uint8 array, read-only.

    Raises:
        DataError: the file is missing, truncated, corrupt, too long, or of another type or rank.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4)
            _check_magic(path, header, dimensions)
            sizes = file.read(4 * dimensions)
            if len(sizes) < 4 * dimensions:
                raise DataError(f"{path} is truncated inside its header: download it again")
            shape = struct.unpack(f">{dimensions}I", sizes)
            expected = math.prod(shape)
            # One byte more than promised: it reveals a longer file, and makes gzip check its checksum at the end.
            values = _read_up_to(file.read, expected + 1)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or corrupt ({error}): download it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(values) != expected:
        state = "is truncated: it holds fewer" if len(values) < expected else "is too long: it holds more"
        raise DataError(f"{path} {state} than the {expected:,} values of its header {list(shape)}: download it again")
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """Write an IDX file by rename; a name that ends in ``.gz`` is compressed, the same bytes every time.

    Raises:
        InputError: the array is not uint8.
        OutputError: the file cannot be written.
    """
    if array.dtype != np.uint8 or array.ndim == 0:
        raise InputError(f"an array of dtype {array.dtype} and rank {array.ndim} is not uint8 of rank 1 or more")
    content = struct.pack(f">HBB{array.ndim}I", 0, _UINT8, array.ndim, *array.shape) + array.tobytes()
    if path.suffix == ".gz":
        buffer = io.BytesIO()
        # No file name and no time in the header, so that equal arrays give equal files.
        with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
            file.write(content)
        content = buffer.getvalue()
    write_bytes(path, content)


def _read_up_to(read: Callable[[int], bytes], size: int) -> bytes:
    """Read in blocks, so that a broken header that promises terabytes allocates no more than the file holds."""
    values = bytearray()
    while len(values) < size and (block := read(min(size - len(values), _BLOCK))):
        values += block
    return bytes(values)


def _check_magic(path: Path, header: bytes, dimensions: int) -> None:
    if len(header) < 4:
        raise DataError(f"{path} is {'truncated' if header else 'empty'}: download it again")
    expected = struct.pack(">HBB", 0, _UINT8, dimensions)
    if header != expected:
        raise DataError(
            f"{path} starts with the bytes {header.hex()}, not {expected.hex()}: "
            f"it is no IDX file of uint8 values with {dimensions} dimension{'s' if dimensions > 1 else ''}"
        )
