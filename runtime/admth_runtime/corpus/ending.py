"""What stands at the end of a corpus: the list of unreadable images, and the totals."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from admth_runtime.corpus.layout import ERRORS_FILE, part_path, stats_path
from admth_runtime.corpus.parquet_images import open_parquet
from admth_runtime.corpus.parts import ERROR_PREFIX, OK
from admth_runtime.corpus.plan import CorpusPlan
from admth_runtime.files import atomic_path

__all__ = ["Totals", "engines_of", "totals_of", "write_errors"]


@dataclass(frozen=True)
class Totals:
    """Sums over the statistics of shards.

    Attributes:
        image_bytes: bytes of the images.
        part_bytes: bytes of the parts.
        worker_seconds: seconds of all workers together.
    """

    image_bytes: int
    part_bytes: int
    worker_seconds: float


def write_errors(folder: Path, plan: CorpusPlan, shards: Iterable[int]) -> None:
    """Collect the unreadable images of parts into ``errors.parquet``, by rename, in the order of the listing.

    Args:
        folder: the corpus.
        plan: what it is.
        shards: those with unreadable images, in order.

    Raises:
        InputError: a part is damaged.
        OutputError: it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("uri", pa.string(), nullable=False),
            pa.field("reason", pa.string(), nullable=False),
        ],
        metadata={"admth.errors": json.dumps({"corpus": plan.identity, "model_sha256": plan.model_sha256})},
    )
    with (
        atomic_path(folder / ERRORS_FILE) as temporary,
        temporary.open("wb") as file,
        pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for shard in shards:
            writer.write_table(_errors_of(part_path(folder, shard), schema))


def totals_of(folder: Path, shards: Iterable[int]) -> Totals:
    """Add up the statistics of shards; those that somebody removed count nothing."""
    found = list(_stats_of(folder, shards))
    return Totals(
        sum(facts["image_bytes"] for facts in found),
        sum(facts["part_bytes"] for facts in found),
        round(sum(facts["seconds"] for facts in found), 3),
    )


def engines_of(folder: Path, shards: Iterable[int]) -> set[str]:
    """Name the engines, with their versions, that encoded shards."""
    return {facts["engine"] for facts in _stats_of(folder, shards)}


def _stats_of(folder: Path, shards: Iterable[int]) -> Iterator[dict[str, Any]]:
    for shard in shards:
        try:
            facts = json.loads(stats_path(folder, shard).read_bytes())
            facts["image_bytes"] + facts["part_bytes"] + facts["seconds"]
            facts["engine"] + ""
        except (OSError, ValueError, KeyError, TypeError):
            continue
        yield facts


def _errors_of(path: Path, schema: Any) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    with open_parquet(path) as file:
        table = file.read(columns=["id", "uri", "status"])
    table = table.filter(pc.not_equal(table["status"], OK))
    reasons = pc.utf8_slice_codeunits(table["status"], len(ERROR_PREFIX))
    return pa.table([table["id"], table["uri"], reasons], schema=schema)
