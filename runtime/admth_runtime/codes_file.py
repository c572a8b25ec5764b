"""Files of encoded images: Parquet, or NumPy's ``.npz`` where pyarrow is not wanted.

Both hold one row an image: ``id`` (int64, unique), ``uri`` (text), ``code_L`` (L / 8 bytes, MSB first) and, when they
were kept, ``logits_L`` (L float32). Their metadata, JSON under the key ``admth.codes``, names the model and the
preprocessing that made them, so that codes of two models are never compared by mistake.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime._version import __version__
from admth_runtime.errors import InputError, require
from admth_runtime.files import atomic_path
from admth_runtime.packing import check_code_lengths
from admth_runtime.results import HashCodes

__all__ = [
    "BIT_ORDER",
    "CODES_FORMAT_VERSION",
    "CODES_METADATA_KEY",
    "CODES_SUFFIXES",
    "EncodedImages",
    "check_codes_path",
    "read_codes",
    "write_codes",
]

CODES_FORMAT_VERSION = 1
"""Raised when an older reader would read the file wrongly."""

CODES_METADATA_KEY = "admth.codes"
CODES_SUFFIXES = (".parquet", ".npz")
BIT_ORDER = "msb"
"""Most significant bit first within a byte, as in ``numpy.packbits``."""


@dataclass(frozen=True)
class EncodedImages:
    """Codes of many images with what identifies them.

    Attributes:
        ids: int64 ``[n]``, unique.
        uris: where each image came from, as it was given.
        codes: codes by length, and logits where they were kept.
        model_sha256: SHA-256 of the model file that made the codes, or None when it is not known.
        preprocessing_sha256: digest of its preprocessing, or None.
        created_by: the software that wrote them.
    """

    ids: NDArray[np.int64]
    uris: tuple[str, ...]
    codes: HashCodes
    model_sha256: str | None = None
    preprocessing_sha256: str | None = None
    created_by: str = field(default=f"admth {__version__}")

    def __post_init__(self) -> None:
        lengths = check_code_lengths(tuple(self.codes))
        count = len(self.uris)
        if self.ids.dtype != np.int64 or self.ids.shape != (count,):
            raise InputError(f"ids are {self.ids.dtype} {self.ids.shape}, not int64 [{count}], one for each uri")
        if len(np.unique(self.ids)) != count:
            raise InputError("ids repeat: give every image its own")
        for length in lengths:
            _check_table(self.codes[length], np.uint8, (count, length // 8), f"code_{length}")
        for length, logits in self.codes.logits.items():
            _check_table(logits, np.float32, (count, length), f"logits_{length}")

    def __len__(self) -> int:
        return len(self.uris)

    @property
    def code_lengths(self) -> tuple[int, ...]:
        """The code lengths in bits, increasing."""
        return self.codes.code_lengths


def write_codes(path: str | Path, encoded: EncodedImages) -> None:
    """Write encoded images by rename; the ending ``.parquet`` or ``.npz`` chooses the format.

    Raises:
        InputError: another ending.
        MissingExtraError: Parquet is asked for and pyarrow is not installed.
        OutputError: the file cannot be written; whatever was there stays.
    """
    write = _write_parquet if check_codes_path(path) == ".parquet" else _write_npz
    with atomic_path(path) as temporary:
        write(temporary, encoded)


def read_codes(path: str | Path) -> EncodedImages:
    """Read and check a file of encoded images, a part of a corpus, or the folder of a whole corpus.

    Of a corpus, the images that could not be read are left out.

    Raises:
        InputError: the file is missing, truncated, of another format, another bit order or a newer version.
        MissingExtraError: it is Parquet and pyarrow is not installed.
    """
    source = Path(path)
    if source.is_dir() and source.suffix.lower() not in CODES_SUFFIXES:
        from admth_runtime.corpus.corpus import read_corpus

        return read_corpus(source).encoded()
    suffix = check_codes_path(source)
    if not source.is_file():
        state = "is a folder" if source.is_dir() else "no such file"
        raise InputError(f"{source}: {state}: pass a file written by  admth-run encode")
    if source.stat().st_size == 0:
        raise InputError(f"{source} is empty: encode the images again")
    columns, metadata = _read_parquet(source) if suffix == ".parquet" else _read_npz(source)
    try:
        return _assemble(columns, _checked_metadata(metadata))
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def check_codes_path(path: str | Path) -> str:
    """Return a path's ending, lower case, when it names a format of encoded images.

    Raises:
        InputError: it does not.
        MissingExtraError: it is Parquet and pyarrow is not installed.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in CODES_SUFFIXES:
        raise InputError(f"{path}: encoded images are kept as .parquet or .npz: give the file one of these endings")
    if suffix == ".parquet":
        require("pyarrow", extra="parquet", purpose="a Parquet file")
    return suffix


def _metadata_of(encoded: EncodedImages) -> str:
    facts = {
        "format_version": CODES_FORMAT_VERSION,
        "bit_order": BIT_ORDER,
        "code_lengths": list(encoded.code_lengths),
        "logits": bool(encoded.codes.logits),
        "model_sha256": encoded.model_sha256,
        "preprocessing_sha256": encoded.preprocessing_sha256,
        "created_by": encoded.created_by,
    }
    return json.dumps(facts, sort_keys=True)


def _checked_metadata(text: str) -> dict[str, Any]:
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its metadata is not JSON ({error}): encode the images again") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("format_version"), int):
        raise InputError("its metadata names no format version: encode the images again")
    if facts["format_version"] > CODES_FORMAT_VERSION:
        raise InputError(
            f"its format version {facts['format_version']} is newer than {CODES_FORMAT_VERSION}, which this admth "
            "reads: run  pip install -U admth"
        )
    if facts.get("bit_order") != BIT_ORDER:
        raise InputError(f"its bit order {facts.get('bit_order')!r} is not {BIT_ORDER!r}: encode the images again")
    for name in ("model_sha256", "preprocessing_sha256"):
        if not isinstance(facts.get(name), (str, type(None))):
            raise InputError(f"its metadata's {name} {facts[name]!r} is no text: encode the images again")
    if not isinstance(facts.get("code_lengths"), list):
        raise InputError("its metadata names no code lengths: encode the images again")
    return facts


def _assemble(columns: Mapping[str, Any], facts: Mapping[str, Any]) -> EncodedImages:
    lengths = check_code_lengths(facts["code_lengths"])
    logits = lengths if facts.get("logits") else ()
    wanted = ["id", "uri", *(f"code_{length}" for length in lengths), *(f"logits_{length}" for length in logits)]
    if missing := [name for name in wanted if name not in columns]:
        raise InputError(f"it lacks the columns {missing} that its metadata promises: encode the images again")
    if not isinstance(columns["uri"], list):
        raise InputError(f"the column uri is {columns['uri'].dtype}, not text: encode the images again")
    return EncodedImages(
        ids=columns["id"],
        uris=tuple(columns["uri"]),
        codes=HashCodes(
            {length: columns[f"code_{length}"] for length in lengths},
            {length: columns[f"logits_{length}"] for length in logits},
        ),
        model_sha256=facts.get("model_sha256"),
        preprocessing_sha256=facts.get("preprocessing_sha256"),
        created_by=str(facts.get("created_by", "unknown")),
    )


def _check_table(array: NDArray[Any], dtype: type[np.generic], shape: tuple[int, ...], name: str) -> None:
    if array.dtype != dtype or array.shape != shape:
        found = f"{array.dtype} {list(array.shape)}"
        raise InputError(f"the column {name} is {found}, not {np.dtype(dtype).name} {list(shape)}")


def _write_npz(path: Path, encoded: EncodedImages) -> None:
    columns: dict[str, NDArray[Any]] = {
        CODES_METADATA_KEY: np.asarray(_metadata_of(encoded)),
        "id": encoded.ids,
        "uri": np.asarray(encoded.uris, dtype=np.str_),
    }
    columns |= {f"code_{length}": codes for length, codes in encoded.codes.items()}
    columns |= {f"logits_{length}": logits for length, logits in encoded.codes.logits.items()}
    # Compressed, for the sake of uris: NumPy keeps text as four bytes a character, padded to the longest.
    with path.open("wb") as file:
        np.savez_compressed(file, **columns)  # type: ignore[arg-type]


def _read_npz(path: Path) -> tuple[dict[str, Any], str]:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError("it is a single array")
        with archive:
            columns: dict[str, Any] = {name: archive[name] for name in archive.files}
    except Exception as error:  # zipfile, zlib and NumPy raise whatever they met first
        raise InputError(
            f"{path} is damaged or no .npz of encoded images ({_first_line(error)}): encode the images again"
        ) from error
    metadata = columns.pop(CODES_METADATA_KEY, None)
    if metadata is None or metadata.dtype.kind != "U" or metadata.ndim != 0:
        raise InputError(f"{path} is an .npz without admth's metadata: pass a file written by  admth-run encode")
    uri = columns.get("uri")
    if uri is not None and uri.dtype.kind == "U" and uri.ndim == 1:
        columns["uri"] = uri.tolist()
    return columns, str(metadata)


def _write_parquet(path: Path, encoded: EncodedImages) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {"id": pa.array(encoded.ids), "uri": pa.array(encoded.uris, type=pa.string())}
    for length, codes in encoded.codes.items():
        kind = pa.binary(length // 8)
        columns[f"code_{length}"] = pa.Array.from_buffers(
            kind, len(codes), [None, pa.py_buffer(np.ascontiguousarray(codes))]
        )
    for length, logits in encoded.codes.logits.items():
        columns[f"logits_{length}"] = pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), length)
    table = pa.table(columns).replace_schema_metadata({CODES_METADATA_KEY: _metadata_of(encoded)})
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def _read_parquet(path: Path) -> tuple[dict[str, Any], str]:
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = (file.schema_arrow.metadata or {}).get(CODES_METADATA_KEY.encode())
            table = _readable(file.read()).combine_chunks()
        columns = {name: _to_numpy(name, table.column(name)) for name in table.column_names}
    except Exception as error:  # Arrow's own errors, and what damaged lengths and text lead to
        raise InputError(f"{path} is damaged or not Parquet ({_first_line(error)}): encode the images again") from error
    if metadata is None:
        raise InputError(f"{path} is Parquet without admth's metadata: pass a file written by  admth-run encode")
    return columns, metadata.decode(errors="replace")


def _readable(table: Any) -> Any:
    """Leave out the rows of a corpus's part that have no codes."""
    if "status" not in table.column_names:
        return table
    import pyarrow.compute as pc

    return table.filter(pc.equal(table["status"], "ok"))


def _to_numpy(name: str, column: Any) -> NDArray[Any] | list[str]:
    """Return a Parquet column: text as a list, fixed-size binary as uint8 ``[n, width]``, numbers as they are."""
    import pyarrow as pa

    if column.null_count:
        raise InputError(f"the column {name} has {column.null_count} nulls")
    kind = column.type
    # An empty column has no chunk to combine.
    array = column.combine_chunks() if column.num_chunks else pa.array([], type=kind)
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        texts: list[str] = array.to_pylist()
        return texts
    if pa.types.is_fixed_size_binary(kind):
        width = kind.byte_width
        data = np.frombuffer(array.buffers()[1], dtype=np.uint8) if len(array) else np.empty(0, np.uint8)
        start = array.offset * width
        return data[start : start + len(array) * width].reshape(len(array), width)
    if pa.types.is_fixed_size_list(kind):
        flat: NDArray[Any] = array.flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(len(array), kind.list_size)
    numbers: NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return numbers


def _first_line(error: BaseException) -> str:
    text: Sequence[str] = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__
