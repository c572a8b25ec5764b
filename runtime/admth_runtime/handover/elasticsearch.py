"""Elasticsearch: a mapping with ``dense_vector`` fields of bits, bulk files, and queries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from admth_runtime.errors import InputError
from admth_runtime.handover.buckets import nearest_buckets
from admth_runtime.handover.rows import Handover, Rows

__all__ = ["Elasticsearch"]

_MOST_BITS = 32_768  # 4,096 dimensions of bytes


class Elasticsearch:
    """Writer for Elasticsearch 8.15 or newer, the first with vectors of bits."""

    suffix = ".ndjson"
    rows_per_file = 200_000  # a request holds 100 MB at most: http.max_content_length

    def check(self, name: str, code_lengths: tuple[int, ...]) -> None:
        """Refuse lengths that a dense_vector cannot have."""
        if code_lengths[-1] > _MOST_BITS:
            raise InputError(f"codes of {code_lengths[-1]} bits are longer than the {_MOST_BITS:,} Elasticsearch holds")

    def write_rows(self, path: Path, blocks: Iterator[Rows]) -> None:
        """Write the lines of a bulk request: an action, then a document with its codes in hexadecimal."""
        with path.open("w", encoding="utf-8") as file:
            for rows in blocks:
                file.writelines(_documents(rows))

    def texts(self, handover: Handover) -> dict[str, str]:
        """Return mapping, queries and instructions."""
        bodies = {
            "index.json": _mapping(handover),
            "query.json": _knn(handover),
            "query-exact.json": _exact(handover),
            "query-coarse.json": _coarse(handover),
        }
        texts = {name: json.dumps(body, indent=2) + "\n" for name, body in bodies.items()}
        return {**texts, "README.md": _readme(handover)}


def _documents(rows: Rows) -> Iterator[str]:
    codes = {length: rows.hex(length) for length in rows.codes}
    buckets = codes[min(codes)]
    for row, (image, uri) in enumerate(zip(rows.ids.tolist(), rows.uris, strict=True)):
        document: dict[str, Any] = {"id": image, "uri": uri, "bucket": buckets[row]}
        document |= {f"code_{length}": texts[row] for length, texts in codes.items()}
        yield f'{{"index":{{"_id":"{image}"}}}}\n{json.dumps(document, separators=(",", ":"))}\n'


def _mapping(handover: Handover) -> dict[str, Any]:
    vectors = {
        f"code_{length}": {
            "type": "dense_vector",
            "element_type": "bit",
            "dims": length,
            # A graph for the length that is searched approximately; the others are compared by scripts.
            **({"index": True, "index_options": {"type": "hnsw"}} if length == handover.longest else {"index": False}),
        }
        for length in handover.code_lengths
    }
    return {
        "mappings": {
            "_meta": {"origin": handover.origin},
            "dynamic": "strict",
            "properties": {
                "id": {"type": "long"},
                "uri": {"type": "keyword", "ignore_above": 8191},
                "bucket": {"type": "keyword"},
                **vectors,
            },
        }
    }


def _knn(handover: Handover) -> dict[str, Any]:
    length = handover.longest
    return {
        "size": 10,
        "_source": ["id", "uri"],
        # The score is 1 - distance / L.
        "knn": {
            "field": f"code_{length}",
            "query_vector": handover.example.hex(length)[0],
            "k": 10,
            "num_candidates": 200,
        },
    }


def _exact(handover: Handover) -> dict[str, Any]:
    return _by_hamming(handover, {"match_all": {}})


def _coarse(handover: Handover) -> dict[str, Any]:
    """Take the documents of the nearest buckets and rank them by the longest code."""
    buckets = nearest_buckets(handover.example.codes[handover.shortest][0])
    return _by_hamming(handover, {"bool": {"filter": {"terms": {"bucket": buckets}}}})


def _by_hamming(handover: Handover, query: dict[str, Any]) -> dict[str, Any]:
    length = handover.longest
    return {
        "size": 10,
        "_source": ["id", "uri"],
        "query": {
            "script_score": {
                "query": query,
                "script": {
                    "source": f"{length} - hamming(params.code, 'code_{length}')",
                    "params": {"code": handover.example.signed(length)[0]},
                },
            }
        },
    }


def _readme(handover: Handover) -> str:
    return f"""\
# {handover.images:,} images for Elasticsearch

{handover.origin}

    HOST=http://localhost:9200
    curl -X PUT $HOST/{handover.name} -H 'Content-Type: application/json' -d @index.json
    for part in rows-*.ndjson; do
      curl -sS -X POST $HOST/{handover.name}/_bulk?filter_path=errors -H 'Content-Type: application/x-ndjson' \\
           --data-binary @$part; echo
    done
    curl -X POST $HOST/{handover.name}/_refresh
    curl -X POST $HOST/{handover.name}/_search -H 'Content-Type: application/json' -d @query.json

`query.json` is approximate, by the HNSW index; its score is `1 - distance / {handover.longest}`. `query-exact.json`
compares every document; its score is `{handover.longest} - distance`. `query-coarse.json` compares those whose
{handover.shortest}-bit code, the field `bucket`, is among the nearest ones. For another query:

    from admth_runtime.handover import nearest_buckets
    nearest_buckets(codes[{handover.shortest}][0], codes.logits[{handover.shortest}][0], count=137)

Needs Elasticsearch 8.15 or newer. Fields `code_L` are `dense_vector` with `element_type: bit`, most significant bit
first, written in hexadecimal as admth prints them; a list of L / 8 signed bytes, 255 being -1, is the same.
"""
