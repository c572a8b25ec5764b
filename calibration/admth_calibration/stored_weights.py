"""Loading a graph without its large weights, which stay in the file and are read a few rows at a time.

Protobuf reads a whole file, keeps a copy, and makes another each time that a tensor's bytes are looked at: four times
the 884 MB of the paper's network. Here the graph alone is parsed; a large weight is the place of its bytes.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import ModelError, require
from admth_runtime.protobuf_wire import Buffer, DamagedError, Span, as_span, fields

if TYPE_CHECKING:
    import onnx

__all__ = ["StoredWeight", "load_without_weights"]

# Smaller tensors are loaded.
_LARGE_BYTES = 1 << 20

# Field numbers of onnx.proto3.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = 7, 5, 9
_VARINT, _LENGTH_DELIMITED = 0, 2


@dataclass(frozen=True)
class StoredWeight:
    """A float32 tensor in a file; ``weight[2:5]`` reads three of its rows.

    Attributes:
        path: the file.
        offset: of its first byte there.
        shape: of the tensor.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        start, stop, _ = rows.indices(self.shape[0])
        count = int(np.prod(self.shape[1:], dtype=np.int64))
        place = self.offset + 4 * count * start
        values = np.fromfile(self.path, dtype="<f4", count=max(stop - start, 0) * count, offset=place)
        return values.reshape(-1, *self.shape[1:])


def load_without_weights(path: Path) -> tuple[onnx.ModelProto, dict[str, StoredWeight]]:
    """Load a checked single-file model.

    Args:
        path: a file that :func:`admth_runtime.onnx_file.read_onnx` has accepted.

    Returns:
        The model, in which float32 initializers of 1 MiB or more have a type and a shape and no values; and where their
        values are, by name.

    Raises:
        MissingExtraError: onnx is not installed.
        ModelError: it cannot be parsed.
    """
    require("onnx", extra="calibrate", purpose="changing a model's precision")
    import onnx
    from google.protobuf.message import DecodeError

    model, stored = onnx.ModelProto(), {}
    try:
        with path.open("rb") as file, closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as data:
            for number, value in fields(data, (0, len(data))):
                if number != _MODEL_GRAPH:
                    model.MergeFromString(_encoded(data, number, value))
                    continue
                for part, inner in fields(data, as_span(value)):
                    tensor = _large_tensor(data, as_span(inner)) if part == _GRAPH_INITIALIZER else None
                    if tensor is None:
                        model.graph.MergeFromString(_encoded(data, part, inner))
                    else:
                        light, offset = tensor
                        model.graph.initializer.append(light)
                        stored[light.name] = StoredWeight(path, offset, tuple(light.dims))
    except (DamagedError, DecodeError) as error:
        raise ModelError(f"{path}: is not an ONNX model ({error}): export it again with  admth-export onnx") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error
    return model, stored


def _large_tensor(data: Buffer, span: Span) -> tuple[onnx.TensorProto, int] | None:
    """Return a large float32 tensor without its values, and where they are; None for any other."""
    import onnx

    if span[1] - span[0] < _LARGE_BYTES:
        return None
    values = [as_span(value) for number, value in fields(data, span) if number == _TENSOR_RAW_DATA]
    if len(values) != 1:
        return None
    start, stop = values[0]
    light = onnx.TensorProto()
    for number, value in fields(data, span):
        if number != _TENSOR_RAW_DATA:
            light.MergeFromString(_encoded(data, number, value))
    whole = light.data_type == onnx.TensorProto.FLOAT and 4 * int(np.prod(light.dims, dtype=np.int64)) == stop - start
    return (light, start) if whole else None


def _encoded(data: Buffer, number: int, value: int | Span | None) -> bytes:
    """Return one field as a message of its own."""
    if isinstance(value, tuple):
        start, stop = value
        head = bytes([*_varint(number << 3 | _LENGTH_DELIMITED), *_varint(stop - start)])
        return head + bytes(data[start:stop])
    if value is None:
        raise DamagedError(f"field {number} is a fixed-width number, which no such message has")
    return bytes([*_varint(number << 3 | _VARINT), *_varint(value)])


def _varint(value: int) -> Iterator[int]:
    while value >= 0x80:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
