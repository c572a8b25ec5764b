"""What an ONNX file says of itself, read before any engine sees it.

The messages of ``onnx.proto3`` that matter here are walked with :mod:`admth_runtime.protobuf_wire` and the rest is
skipped. That needs neither ``onnx`` nor ``protobuf``, maps the file into memory instead of loading it, and bounds the
depth of subgraphs.

It also refuses what an engine would follow blindly: external data, which makes an engine open other files, and
operators of unknown domains, which need native code from elsewhere.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from admth_runtime.engine_kind import ENGINE_SUFFIXES
from admth_runtime.errors import ModelError
from admth_runtime.protobuf_wire import Buffer, DamagedError, Span, as_integer, as_span, fields

__all__ = ["ALLOWED_DOMAINS", "MAX_FILE_BYTES", "OnnxFile", "TensorInfo", "read_onnx"]

ALLOWED_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft"})
"""Operator domains that ONNX Runtime and TensorRT implement themselves."""

MAX_FILE_BYTES = 2**31 - 1
"""The largest protobuf message, hence the largest single-file ONNX model: one byte less than 2 GiB."""

# Graphs nest through the attributes of If, Loop and Scan. Real models nest once or twice.
_MAX_DEPTH = 16

# TensorProto.DataType, by NumPy's names where NumPy has the type.
_DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    8: "string",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    14: "complex64",
    15: "complex128",
    16: "bfloat16",
}

# What people pass by mistake: (offset, first bytes, what it is and what to do).
_ENGINE_MEND = "is a TensorRT engine, not an ONNX model: pass the model.onnx it was built from"
_SIGNATURES = (
    (0, b"ftrt", _ENGINE_MEND),
    (0, b"vtrt", _ENGINE_MEND),
    (
        0,
        b"PK\x03\x04",
        "is a zip file, such as a PyTorch checkpoint or .npz, not an ONNX model: run  admth-export onnx",
    ),
    (8, b'{"', "looks like a safetensors checkpoint, not an ONNX model: run  admth-export onnx"),
    (0, b"\x89HDF", "is an HDF5 file, not an ONNX model: export one with  admth-export onnx"),
    (0, b"PAR1", "is a Parquet file, not an ONNX model: pass it as --index"),
    (4, b"ORTM", "is an ONNX Runtime .ort file, not an ONNX model: pass the model.onnx it was made from"),
    (4, b"TFL3", "is a TensorFlow Lite file, not an ONNX model: export one with  admth-export onnx"),
)


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a graph.

    Attributes:
        name: the tensor's name.
        dtype: NumPy's name of the element type, or ``"type 17"`` and the like where NumPy has none.
        shape: a number for a fixed dimension, a name or None for a dynamic one; None when the rank is unknown.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        dimensions = "?" if self.shape is None else ", ".join("?" if size is None else str(size) for size in self.shape)
        return f"{self.name}: {self.dtype} [{dimensions}]"


@dataclass(frozen=True)
class OnnxFile:
    """The facts of a checked ONNX file.

    Attributes:
        path: where it was read from.
        size: bytes.
        ir_version: version of the ONNX file format.
        producer: name and version of the software that wrote it.
        opsets: operator-set version by domain, ``"ai.onnx"`` written as ``""``.
        inputs: graph inputs that a caller feeds: those without an initializer.
        outputs: graph outputs, in order.
        metadata: the model's ``metadata_props``.
        operators: how often each operator occurs, subgraphs included, by name; ``"com.microsoft::QGemm"`` for
            an operator that is not of ONNX's own domain.
    """

    path: Path
    size: int
    ir_version: int
    producer: str
    opsets: Mapping[str, int]
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    operators: Mapping[str, int]


def read_onnx(path: str | Path) -> OnnxFile:
    """Read and check an ONNX file without loading its weights.

    Raises:
        ModelError: the file is missing, empty, truncated, larger than 2 GiB, not ONNX, a TensorRT engine, refers to
            external data, or uses an operator domain outside ``ALLOWED_DOMAINS``.
    """
    source = Path(path)
    try:
        size = _checked_size(source)
        with source.open("rb") as file, closing(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as data:
            _refuse_other_formats(source, data)
            return _scan(source, data, size)
    except OSError as error:
        raise ModelError(f"{source}: cannot be read ({error.strerror or error})") from error


def _checked_size(source: Path) -> int:
    if source.is_dir():
        raise ModelError(f"{source} is a folder: name the model file in it, such as {source / 'model.onnx'}")
    if not source.exists():
        raise ModelError(f"{source}: no such model file; make one with  admth-export onnx  or pass --model")
    if not source.is_file():
        raise ModelError(f"{source} is not a regular file: pass an ONNX model file")
    size = source.stat().st_size
    if size == 0:
        raise ModelError(f"{source} is empty: export or copy the model again")
    if size > MAX_FILE_BYTES:
        raise ModelError(f"{source} has {size:,} bytes, more than the 2 GiB that a single-file ONNX model can have")
    return size


def _refuse_other_formats(source: Path, data: Buffer) -> None:
    if source.suffix.lower() in ENGINE_SUFFIXES:
        raise ModelError(f"{source} {_ENGINE_MEND}")
    for offset, signature, answer in _SIGNATURES:
        if data[offset : offset + len(signature)] == signature:
            raise ModelError(f"{source} {answer}")


def _scan(source: Path, data: Buffer, size: int) -> OnnxFile:
    scan = _Scan(data)
    try:
        scan.model((0, size))
        scan.check_complete()
    except _RefusedError as error:
        raise ModelError(f"{source} {error}") from error
    except DamagedError as error:
        if data[0] == 0x08 and 0 < scan.ir_version < 1000:  # it does start as an ONNX file does
            raise ModelError(f"{source} is truncated or damaged ({error}): export or copy it again") from error
        raise ModelError(f"{source} is not an ONNX model ({error}): make one with  admth-export onnx") from error
    inputs = tuple(tensor for tensor in scan.inputs if tensor.name not in scan.initializers)
    return OnnxFile(
        path=source,
        size=size,
        ir_version=scan.ir_version,
        producer=" ".join(part for part in (scan.producer_name, scan.producer_version) if part),
        opsets=scan.opsets,
        inputs=inputs,
        outputs=tuple(scan.outputs),
        metadata=scan.metadata,
        operators=dict(sorted(scan.operators.items(), key=lambda item: (-item[1], item[0]))),
    )


class _RefusedError(Exception):
    """The file is a readable ONNX model that must not be loaded."""


@dataclass
class _Scan:
    """One walk over the messages of a model; field numbers are those of ``onnx.proto3``.

    A message that occurs twice where one is meant is merged by protobuf, so every occurrence is walked.
    """

    data: Buffer
    ir_version: int = 0
    producer_name: str = ""
    producer_version: str = ""
    has_graph: bool = False
    opsets: dict[str, int] = field(default_factory=dict)
    inputs: list[TensorInfo] = field(default_factory=list)
    outputs: list[TensorInfo] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    initializers: set[str] = field(default_factory=set)

    def check_complete(self) -> None:
        if not self.ir_version:
            raise DamagedError("it has no format version")
        if not self.has_graph:
            raise DamagedError("it has no graph")
        if not self.opsets:
            raise DamagedError("it names no operator set")

    def model(self, span: Span) -> None:
        for number, value in fields(self.data, span):
            match number:
                case 1:
                    self.ir_version = as_integer(value)
                case 2:
                    self.producer_name = self.text(value)
                case 3:
                    self.producer_version = self.text(value)
                case 7:
                    self.has_graph = True
                    self.graph(as_span(value), depth=0)
                case 8:
                    domain, version = self.opset(as_span(value))
                    self.opsets[domain] = version
                case 14:
                    self.metadata_entry(as_span(value))
                case 20:  # TrainingInfoProto: two graphs
                    for inner, inner_value in fields(self.data, as_span(value)):
                        if inner in (1, 2):
                            self.graph(as_span(inner_value), depth=1)
                case 25:
                    self.function(as_span(value))

    def graph(self, span: Span, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise _RefusedError(f"nests more than {_MAX_DEPTH} subgraphs: export it again with admth-export onnx")
        for number, value in fields(self.data, span):
            match number:
                case 1:
                    self.node(as_span(value), depth)
                case 5:
                    name = self.tensor(as_span(value))
                    if depth == 0:
                        self.initializers.add(name)
                case 11 if depth == 0:
                    self.inputs.append(self.value_info(as_span(value)))
                case 12 if depth == 0:
                    self.outputs.append(self.value_info(as_span(value)))
                case 15:
                    name = self.sparse_tensor(as_span(value))
                    if depth == 0:
                        self.initializers.add(name)

    def node(self, span: Span, depth: int) -> None:
        domain = operator = ""
        for number, value in fields(self.data, span):
            match number:
                case 4:
                    operator = self.text(value)
                case 5:
                    self.attribute(as_span(value), depth)
                case 7:
                    domain = self.text(value)
        _check_domain(domain, f"the operator {operator!r}")
        name = operator if domain in ("", "ai.onnx") else f"{domain}::{operator}"
        self.operators[name] = self.operators.get(name, 0) + 1

    def attribute(self, span: Span, depth: int) -> None:
        for number, value in fields(self.data, span):
            match number:
                case 5 | 10:
                    self.tensor(as_span(value))
                case 6 | 11:
                    self.graph(as_span(value), depth + 1)
                case 22 | 23:
                    self.sparse_tensor(as_span(value))

    def tensor(self, span: Span) -> str:
        name, external = "", False
        for number, value in fields(self.data, span):
            match number:
                case 8:
                    name = self.text(value)
                case 13:
                    external = True
                case 14:
                    # Anything but DEFAULT: readers cut enumerations to 32 bits, so 2**32 + 1 is EXTERNAL too.
                    external = external or as_integer(value) != 0
        if external:
            raise _RefusedError(
                f"keeps data in another file (external data of tensor {name!r}): save it as one file, "
                "as  admth-export onnx  does"
            )
        return name

    def sparse_tensor(self, span: Span) -> str:
        names = [self.tensor(as_span(value)) for number, value in fields(self.data, span) if number in (1, 2)]
        return names[0] if names else ""

    def function(self, span: Span) -> None:
        domain = name = ""
        for number, value in fields(self.data, span):
            match number:
                case 1:
                    name = self.text(value)
                case 7:
                    self.node(as_span(value), depth=1)
                case 9:
                    self.opset(as_span(value))
                case 10:
                    domain = self.text(value)
                case 11:
                    self.attribute(as_span(value), depth=1)
        _check_domain(domain, f"the function {name!r}")

    def opset(self, span: Span) -> tuple[str, int]:
        domain, version = "", 0
        for number, value in fields(self.data, span):
            match number:
                case 1:
                    domain = self.text(value)
                case 2:
                    version = as_integer(value)
        _check_domain(domain, "an operator set")
        return "" if domain == "ai.onnx" else domain, version

    def metadata_entry(self, span: Span) -> None:
        key = text = ""
        for number, value in fields(self.data, span):
            match number:
                case 1:
                    key = self.text(value)
                case 2:
                    text = self.text(value)
        if key in self.metadata:
            raise _RefusedError(
                f"holds the metadata {key!r} twice, and readers disagree on which counts: export it again"
            )
        self.metadata[key] = text

    def value_info(self, span: Span) -> TensorInfo:
        name, dtype, shape = "", "not a tensor", None
        for number, value in fields(self.data, span):
            match number:
                case 1:
                    name = self.text(value)
                case 2:
                    for kind, inner in fields(self.data, as_span(value)):
                        if kind == 1:
                            dtype, shape = self.tensor_type(as_span(inner))
        return TensorInfo(name, dtype, shape)

    def tensor_type(self, span: Span) -> tuple[str, tuple[int | str | None, ...] | None]:
        dtype, shape = "untyped", None
        for number, value in fields(self.data, span):
            match number:
                case 1:
                    dtype = _DTYPES.get(as_integer(value), f"type {as_integer(value)}")
                case 2:
                    dimensions = [inner for kind, inner in fields(self.data, as_span(value)) if kind == 1]
                    shape = tuple(self.dimension(as_span(dimension)) for dimension in dimensions)
        return dtype, shape

    def dimension(self, span: Span) -> int | str | None:
        size: int | str | None = None
        for number, value in fields(self.data, span):
            match number:
                case 1:
                    size = as_integer(value)
                case 2:
                    size = self.text(value) or None
        return size

    def text(self, value: int | Span | None) -> str:
        start, stop = as_span(value)
        try:
            return bytes(self.data[start:stop]).decode()
        except UnicodeDecodeError:
            raise DamagedError(f"text at byte {start} is not UTF-8") from None


def _check_domain(domain: str, what: str) -> None:
    if domain not in ALLOWED_DOMAINS:
        raise _RefusedError(
            f"uses {what} of the unknown domain {domain!r}: only ONNX's own and com.microsoft operators are run; "
            "export the model again with  admth-export onnx"
        )
