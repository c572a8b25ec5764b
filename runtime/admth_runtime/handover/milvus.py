"""Milvus: a collection with BINARY_VECTOR fields, Parquet files for its bulk import, and scripts that load and ask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from admth_runtime.errors import InputError, require
from admth_runtime.handover.rows import Handover, Rows

__all__ = ["Milvus"]

_LONGEST_TEXT = 65_535  # bytes of a VARCHAR
_MOST_FIELDS = 4  # vector fields of a collection, unless the server's proxy.maxVectorFieldNum says more


class Milvus:
    """Writer for Milvus 2.4 or newer."""

    suffix = ".parquet"
    rows_per_file = 5_000_000  # an import takes files of up to 16 GB; smaller ones are taken in parallel

    def check(self, name: str, code_lengths: tuple[int, ...]) -> None:
        """Refuse more lengths than a collection holds, and ask for pyarrow."""
        require("pyarrow.parquet", extra="parquet", purpose="writing Parquet for Milvus")
        if len(code_lengths) > _MOST_FIELDS:
            raise InputError(
                f"{len(code_lengths)} code lengths are more than the {_MOST_FIELDS} vector fields of a Milvus "
                "collection: leave some out with --lengths"
            )

    def write_rows(self, path: Path, blocks: Iterator[Rows]) -> None:
        """Write a Parquet file as Milvus imports it: binary vectors are lists of uint8."""
        import pyarrow.parquet as pq

        writer: Any = None
        try:
            for rows in blocks:
                table = _table(rows)
                writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()

    def texts(self, handover: Handover) -> dict[str, str]:
        """Return schema, scripts and instructions."""
        return {
            "collection.json": json.dumps(_collection(handover), indent=2) + "\n",
            "load.py": _LOAD,
            "query.py": _query(handover),
            "README.md": _readme(handover),
        }


def _table(rows: Rows) -> Any:
    import pyarrow as pa

    columns: dict[str, Any] = {"id": pa.array(rows.ids), "uri": pa.array(list(rows.uris), type=pa.string())}
    for uri, image in zip(rows.uris, rows.ids, strict=True):
        if len(uri) * 4 > _LONGEST_TEXT and len(uri.encode()) > _LONGEST_TEXT:
            raise InputError(
                f"the uri of image {image} has more than the {_LONGEST_TEXT:,} bytes that Milvus's text holds"
            )
    for length, codes in rows.codes.items():
        width = length // 8
        offsets = pa.array(np.arange(0, (len(rows) + 1) * width, width, dtype=np.int32))
        columns[f"code_{length}"] = pa.ListArray.from_arrays(offsets, pa.array(codes.reshape(-1)))
    return pa.table(columns)


def _collection(handover: Handover) -> dict[str, Any]:
    """Return the body of ``POST /v2/vectordb/collections/create``."""
    longest_uri = min(max(256, 2 * handover.longest_uri), _LONGEST_TEXT)
    vectors = [
        {"fieldName": f"code_{length}", "dataType": "BinaryVector", "elementTypeParams": {"dim": str(length)}}
        for length in handover.code_lengths
    ]
    return {
        "collectionName": handover.name,
        "schema": {
            "autoId": False,
            "enabledDynamicField": False,
            "description": handover.origin,
            "fields": [
                {"fieldName": "id", "dataType": "Int64", "isPrimary": True},
                {"fieldName": "uri", "dataType": "VarChar", "elementTypeParams": {"max_length": str(longest_uri)}},
                *vectors,
            ],
        },
        # Milvus loads a collection only when every vector field has an index. BIN_FLAT is exact; BIN_IVF_FLAT with
        # nlist is the approximate one.
        "indexParams": [
            {
                "fieldName": f"code_{length}",
                "indexName": f"code_{length}",
                "metricType": "HAMMING",
                "params": {"index_type": "BIN_FLAT"},
            }
            for length in handover.code_lengths
        ],
    }


_LOAD = '''\
"""Create the collection of collection.json and insert the rows:  python load.py [URI] [TOKEN]

Needs  pip install pymilvus pyarrow.  URI is http://localhost:19530 unless given, or a file for Milvus Lite.
"""

import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
from pymilvus import DataType, MilvusClient

HERE = Path(__file__).parent
TYPES = {"Int64": DataType.INT64, "VarChar": DataType.VARCHAR, "BinaryVector": DataType.BINARY_VECTOR}

uri = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:19530"
token = sys.argv[2] if len(sys.argv) > 2 else ""
client = MilvusClient(uri, token=token)
wanted = json.loads((HERE / "collection.json").read_text(encoding="utf-8"))
name = wanted["collectionName"]
if client.has_collection(name):
    sys.exit(f"the collection {name} is there already: drop it first, or export with another --name")

schema = client.create_schema(auto_id=False, description=wanted["schema"]["description"])
for field in wanted["schema"]["fields"]:
    sizes = {key: int(value) for key, value in field.get("elementTypeParams", {}).items()}
    schema.add_field(field["fieldName"], TYPES[field["dataType"]], is_primary=field.get("isPrimary", False), **sizes)
indexes = client.prepare_index_params()
for index in wanted["indexParams"]:
    indexes.add_index(
        index["fieldName"], index_type=index["params"]["index_type"], index_name=index["indexName"],
        metric_type=index["metricType"],
    )
client.create_collection(name, schema=schema, index_params=indexes)

vectors = [field["fieldName"] for field in wanted["schema"]["fields"] if field["dataType"] == "BinaryVector"]
done = 0
for part in sorted(HERE.glob("rows-*.parquet")):
    for batch in pq.ParquetFile(part).iter_batches(batch_size=5000):
        rows = batch.to_pylist()
        for row in rows:
            row.update({vector: bytes(row[vector]) for vector in vectors})
        client.insert(name, rows)
        done += len(rows)
        print(f"{done:,} rows", end="\\r", file=sys.stderr)
print(f"inserted {done:,} rows into {name}")
'''


def _query(handover: Handover) -> str:
    return f'''\
"""The nearest images of a code in hexadecimal:  python query.py [CODE] [URI] [TOKEN]

Without a code, the first image's is asked for. Needs  pip install pymilvus.
"""

import json
import sys

from pymilvus import MilvusClient

code = bytes.fromhex(sys.argv[1] if len(sys.argv) > 1 else "{handover.example.hex(handover.longest)[0]}")
uri = sys.argv[2] if len(sys.argv) > 2 else "http://localhost:19530"
client = MilvusClient(uri, token=sys.argv[3] if len(sys.argv) > 3 else "")
(hits,) = client.search(
    "{handover.name}",
    data=[code],
    anns_field=f"code_{{8 * len(code)}}",
    limit=10,
    output_fields=["uri"],
    search_params={{"metric_type": "HAMMING"}},
    consistency_level="Strong",
)
for hit in hits:
    print(json.dumps({{"id": hit["id"], "distance": int(hit["distance"]), "uri": hit["entity"]["uri"]}}))
'''


def _readme(handover: Handover) -> str:
    parts = ", ".join(f'["{part}"]' for part in handover.parts[:3])
    return f"""\
# {handover.images:,} images for Milvus

{handover.origin}

    python load.py http://localhost:19530
    python query.py {handover.example.hex(handover.longest)[0]} http://localhost:19530

`load.py` inserts the rows through the client, which every Milvus takes. A server's own bulk import is faster for many
rows. Put the Parquet files into its bucket, create the collection, and start the import:

    curl -X POST http://localhost:19530/v2/vectordb/collections/create -H 'Content-Type: application/json' \\
         -d @collection.json
    curl -X POST http://localhost:19530/v2/vectordb/jobs/import/create -H 'Content-Type: application/json' \\
         -d '{{"collectionName": "{handover.name}", "files": [{parts}]}}'

Fields `code_L` are BINARY_VECTOR of dimension L with the metric HAMMING. The indexes are BIN_FLAT: exact. Beyond some
ten million rows, write BIN_IVF_FLAT with an `nlist` into collection.json and search with an `nprobe`.
"""
