"""Vespa: an application with ``tensor<int8>`` fields under the Hamming distance, its feed, and queries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from admth_runtime.handover.buckets import nearest_buckets
from admth_runtime.handover.rows import Handover, Rows

__all__ = ["Vespa"]


class Vespa:
    """Writer for Vespa 8."""

    suffix = ".jsonl"
    rows_per_file = 5_000_000

    def __init__(self) -> None:
        self._name = "images"

    def check(self, name: str, code_lengths: tuple[int, ...]) -> None:
        """Take the schema's name, which every document's id holds."""
        self._name = name

    def write_rows(self, path: Path, blocks: Iterator[Rows]) -> None:
        """Write documents, one a line: codes as hexadecimal, Vespa's short form of int8 tensors."""
        with path.open("w", encoding="utf-8") as file:
            for rows in blocks:
                file.writelines(self._documents(rows))

    def texts(self, handover: Handover) -> dict[str, str]:
        """Return the application, queries and instructions."""
        return {
            "app/services.xml": _services(handover),
            f"app/schemas/{handover.name}.sd": _schema(handover),
            "query.json": json.dumps(_exact(handover), indent=2) + "\n",
            "query-coarse.json": json.dumps(_coarse(handover), indent=2) + "\n",
            "README.md": _readme(handover),
        }

    def _documents(self, rows: Rows) -> Iterator[str]:
        codes = {length: rows.hex(length) for length in rows.codes}
        buckets = codes[min(codes)]
        for row, (image, uri) in enumerate(zip(rows.ids.tolist(), rows.uris, strict=True)):
            fields: dict[str, Any] = {"id": image, "uri": uri, "bucket": buckets[row]}
            fields |= {f"code_{length}": {"values": texts[row]} for length, texts in codes.items()}
            document = {"put": f"id:{self._name}:{self._name}::{image}", "fields": fields}
            yield json.dumps(document, separators=(",", ":")) + "\n"


def _services(handover: Handover) -> str:
    return f"""\
<?xml version="1.0" encoding="utf-8" ?>
<services version="1.0" xmlns:deploy="vespa">
  <container id="default" version="1.0">
    <document-api/>
    <search/>
    <nodes><node hostalias="node1"/></nodes>
  </container>
  <content id="{handover.name}" version="1.0">
    <min-redundancy>1</min-redundancy>
    <documents><document type="{handover.name}" mode="index"/></documents>
    <nodes><node hostalias="node1" distribution-key="0"/></nodes>
  </content>
</services>
"""


def _schema(handover: Handover) -> str:
    fields = "\n".join(_field(length, indexed=length == handover.longest) for length in handover.code_lengths)
    profiles = "\n".join(_profile(length) for length in handover.code_lengths)
    return f"""\
# {handover.origin}
schema {handover.name} {{
    document {handover.name} {{
        field id type long {{
            indexing: summary | attribute
        }}
        field uri type string {{
            indexing: summary
        }}
        field bucket type string {{
            indexing: attribute
            match: word
            attribute: fast-search
            rank: filter
        }}
{fields}
    }}
{profiles}
{_coarse_profile(handover)}}}
"""


def _field(length: int, *, indexed: bool) -> str:
    index = (
        """
            index {
                hnsw {
                    max-links-per-node: 16
                    neighbors-to-explore-at-insert: 200
                }
            }"""
        if indexed
        else ""
    )
    return f"""\
        field code_{length} type tensor<int8>(x[{length // 8}]) {{
            indexing: attribute{" | index" if indexed else ""}
            attribute {{
                distance-metric: hamming
            }}{index}
        }}"""


def _profile(length: int) -> str:
    return f"""\
    rank-profile hamming_{length} {{
        inputs {{
            query(query_{length}) tensor<int8>(x[{length // 8}])
        }}
        first-phase {{
            expression: closeness(field, code_{length})
        }}
        match-features: distance(field, code_{length})
    }}"""


def _coarse_profile(handover: Handover) -> str:
    """Rank what the buckets hold by the longest code."""
    length = handover.longest
    return f"""\
    rank-profile coarse {{
        inputs {{
            query(query_{length}) tensor<int8>(x[{length // 8}])
        }}
        function distance_{length}() {{
            expression: sum(hamming(query(query_{length}), attribute(code_{length})))
        }}
        first-phase {{
            expression: {length} - distance_{length}()
        }}
        match-features: distance_{length}()
    }}
"""


def _exact(handover: Handover) -> dict[str, Any]:
    length = handover.longest
    nearest = f"{{targetHits: 10, approximate: false}}nearestNeighbor(code_{length}, query_{length})"
    return {
        "yql": f"select id, uri from {handover.name} where {nearest}",
        "ranking": f"hamming_{length}",
        "hits": 10,
        f"input.query(query_{length})": handover.example.signed(length)[0],
    }


def _coarse(handover: Handover) -> dict[str, Any]:
    """Take the documents of the nearest buckets and rank them by the longest code."""
    length = handover.longest
    buckets = ", ".join(f'"{bucket}"' for bucket in nearest_buckets(handover.example.codes[handover.shortest][0]))
    return {
        "yql": f"select id, uri from {handover.name} where bucket in ({buckets})",
        "ranking": "coarse",
        "hits": 10,
        f"input.query(query_{length})": handover.example.signed(length)[0],
    }


def _readme(handover: Handover) -> str:
    long = handover.longest
    return f"""\
# {handover.images:,} images for Vespa

{handover.origin}

    vespa deploy app
    cat rows-*.jsonl | vespa feed -
    curl -X POST http://localhost:8080/search/ -H 'Content-Type: application/json' -d @query.json

`query.json` asks for the first image's code at {long} bits, exactly; with `approximate: true` it takes the HNSW index.
`query-coarse.json` takes the images whose {handover.shortest}-bit code, the field `bucket`, is among the nearest ones,
and ranks them by {long} bits. For another query:

    from admth_runtime.handover import nearest_buckets
    nearest_buckets(codes[{handover.shortest}][0], codes.logits[{handover.shortest}][0], count=137)

Fields `code_L` are `tensor<int8>(x[L / 8])`, most significant bit first. The feed has them in hexadecimal, as admth
prints them. Queries take them as signed bytes: 255 is -1. In Python: `codes[{long}].view("int8")[0].tolist()`.
"""
