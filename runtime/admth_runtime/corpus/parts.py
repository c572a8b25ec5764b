"""Parts: a shard's codes as one Parquet file, the same bytes whoever makes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.codes_file import BIT_ORDER, CODES_FORMAT_VERSION, CODES_METADATA_KEY
from admth_runtime.corpus.layout import part_path
from admth_runtime.corpus.parquet_images import open_parquet
from admth_runtime.corpus.plan import CorpusPlan
from admth_runtime.errors import InputError

__all__ = ["ERROR_PREFIX", "OK", "PartFacts", "ShardCodes", "part_bytes", "part_facts", "part_schema"]

OK = "ok"
ERROR_PREFIX = "error: "


@dataclass(frozen=True)
class ShardCodes:
    """What encoding a shard gave, a row an image.

    Attributes:
        uris: what the images are called.
        reasons: why an image could not be read, or None where it was.
        codes: uint8 ``[n, L / 8]`` by code length; rows of unreadable images are ignored.
        logits: float32 ``[n, L]`` by code length; empty unless they are kept.
    """

    uris: Sequence[str]
    reasons: list[str | None]
    codes: Mapping[int, NDArray[np.uint8]]
    logits: Mapping[int, NDArray[np.float32]]


@dataclass(frozen=True)
class PartFacts:
    """What the metadata of a whole part says.

    Attributes:
        corpus: the identity of the corpus that it belongs to.
        shard: its number.
        images: its rows.
        errors: rows of unreadable images.
    """

    corpus: str
    shard: int
    images: int
    errors: int


def part_schema(plan: CorpusPlan) -> Any:
    """Return the Arrow schema of a corpus's parts; docs/corpus.md describes it."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("uri", pa.string(), nullable=False),
            *(pa.field(f"code_{length}", pa.binary(length // 8)) for length in plan.code_lengths),
            *(pa.field(f"logits_{n}", pa.list_(pa.float32(), n)) for n in (plan.code_lengths if plan.logits else ())),
            pa.field("status", pa.string(), nullable=False),
        ]
    )


def part_bytes(plan: CorpusPlan, shard: int, result: ShardCodes) -> bytes:
    """Return the content of a part: the same for the same codes, with one version of pyarrow."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = np.array([reason is not None for reason in result.reasons], dtype=bool)
    span = plan.span(shard)
    columns = [
        pa.array(np.arange(span.start, span.stop, dtype=np.int64) + plan.first_id),
        pa.array(result.uris, type=pa.string()),
        *(_codes_column(result.codes[length], bad) for length in plan.code_lengths),
        *(_logits_column(result.logits[length], bad) for length in (plan.code_lengths if plan.logits else ())),
        pa.array([OK if reason is None else f"{ERROR_PREFIX}{reason}" for reason in result.reasons], type=pa.string()),
    ]
    metadata = {
        "format_version": CODES_FORMAT_VERSION,
        "bit_order": BIT_ORDER,
        "code_lengths": list(plan.code_lengths),
        "logits": plan.logits,
        "model_sha256": plan.model_sha256,
        "preprocessing_sha256": plan.preprocessing.digest(),
        "preprocessing": plan.preprocessing.to_dict(),
        "created_by": plan.created_by,
        "corpus": plan.identity,
        "listing_sha256": plan.listing_sha256,
        "shard": shard,
        "images": len(bad),
        "errors": int(bad.sum()),
    }
    schema = part_schema(plan).with_metadata({CODES_METADATA_KEY: json.dumps(metadata, sort_keys=True)})
    # Into memory: a part is some megabytes, and Python's own writing tells a full disk from other errors.
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=schema), sink, compression="zstd", write_page_checksum=True)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def part_facts(folder: Path, shard: int) -> PartFacts | None:
    """Read what a part says of itself, from its footer; None where there is no part, or none that is whole.

    A kill leaves no such part, since parts are renamed when they are whole; a failing disk may.
    """
    path = part_path(folder, shard)
    if not path.exists():
        return None
    try:
        with open_parquet(path) as file:
            facts = json.loads((file.schema_arrow.metadata or {})[CODES_METADATA_KEY.encode()])
            found = PartFacts(facts["corpus"], facts["shard"], facts["images"], facts["errors"])
            return found if file.metadata.num_rows == found.images else None
    except (InputError, KeyError, TypeError, ValueError):
        return None


def _codes_column(codes: NDArray[np.uint8], bad: NDArray[np.bool_]) -> Any:
    import pyarrow as pa

    codes = np.where(bad[:, None], np.uint8(0), codes)
    return pa.Array.from_buffers(
        pa.binary(codes.shape[1]), len(codes), [_validity(bad), pa.py_buffer(np.ascontiguousarray(codes))]
    )


def _logits_column(logits: NDArray[np.float32], bad: NDArray[np.bool_]) -> Any:
    import pyarrow as pa

    logits = np.where(bad[:, None], np.float32(0), logits)
    return pa.FixedSizeListArray.from_arrays(pa.array(logits.reshape(-1)), logits.shape[1], mask=pa.array(bad))


def _validity(bad: NDArray[np.bool_]) -> Any:
    import pyarrow as pa

    return pa.py_buffer(np.packbits(~bad, bitorder="little").tobytes()) if bad.any() else None
