"""PostgreSQL with the extension pgvector: ``bit(L)`` columns, binary COPY files, an HNSW index, and queries in SQL."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from admth_runtime.errors import InputError
from admth_runtime.handover.rows import Handover, Rows

__all__ = ["PgVector"]

# PostgreSQL's manual, COPY, "Binary Format": signature, flags, length of the header's extension.
_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
_TRAILER = struct.pack(">h", -1)
# pgvector indexes bit columns of up to 64,000 bits; a bit string has a 32-bit length.
_MOST_INDEXED = 64_000


class PgVector:
    """Writer for PostgreSQL with pgvector 0.7 or newer, the first with Hamming distance."""

    suffix = ".pgcopy"
    rows_per_file = 10_000_000

    def check(self, name: str, code_lengths: tuple[int, ...]) -> None:
        """Refuse lengths that pgvector cannot index."""
        if code_lengths[-1] > _MOST_INDEXED:
            raise InputError(f"codes of {code_lengths[-1]} bits are longer than the {_MOST_INDEXED:,} pgvector indexes")

    def write_rows(self, path: Path, blocks: Iterator[Rows]) -> None:
        """Write a file for ``COPY ... WITH (FORMAT binary)``."""
        with path.open("wb") as file:
            file.write(_HEADER)
            for rows in blocks:
                file.write(b"".join(_binary_rows(rows)))
            file.write(_TRAILER)

    def texts(self, handover: Handover) -> dict[str, str]:
        """Return schema, load, query and instructions."""
        return {
            "schema.sql": _schema(handover),
            "load.sql": _load(handover),
            "query.sql": _query(handover),
            "README.md": _readme(handover),
        }


def _binary_rows(rows: Rows) -> Iterator[bytes]:
    fields = struct.pack(">h", 2 + len(rows.codes))
    # A bit value is the number of its bits and the bits, most significant first: admth's own order.
    codes = [
        (struct.pack(">ii", 4 + length // 8, length), length // 8, table.tobytes())
        for length, table in rows.codes.items()
    ]
    for row, (image, uri) in enumerate(zip(rows.ids.tolist(), rows.uris, strict=True)):
        text = uri.encode()
        if b"\0" in text:
            raise InputError(f"the uri of image {image} has a null byte, which PostgreSQL's text cannot hold")
        yield fields
        yield struct.pack(">iqi", 8, image, len(text))
        yield text
        for head, width, data in codes:
            yield head
            yield data[row * width : (row + 1) * width]


def _schema(handover: Handover) -> str:
    columns = "".join(f",\n    code_{length} bit({length}) NOT NULL" for length in handover.code_lengths)
    return f"""\
-- {handover.origin}
CREATE EXTENSION IF NOT EXISTS vector;  -- pgvector 0.7 or newer

CREATE TABLE {handover.name} (
    id bigint NOT NULL,
    uri text NOT NULL{columns}
);
COMMENT ON TABLE {handover.name} IS '{handover.origin.replace("'", "''")}';
"""


def _load(handover: Handover) -> str:
    copies = "\n".join(f"\\copy {handover.name} FROM '{part}' WITH (FORMAT binary)" for part in handover.parts)
    bucket = (
        f"CREATE INDEX {handover.name}_bucket ON {handover.name} (code_{handover.shortest});\n"
        if handover.shortest != handover.longest
        else ""
    )
    return f"""\
-- Run it with psql in this folder. Indexes are made after the rows, which is several times faster than before.
\\set ON_ERROR_STOP on
{copies}
ALTER TABLE {handover.name} ADD PRIMARY KEY (id);
{bucket}CREATE INDEX {handover.name}_hnsw ON {handover.name} USING hnsw (code_{handover.longest} bit_hamming_ops);
ANALYZE {handover.name};
"""


def _query(handover: Handover) -> str:
    short, long, table = handover.shortest, handover.longest, handover.name
    lengths = sorted({short, long})
    defaults = "".join(
        f"\\if :{{?code_{length}}}\n\\else\n\\set code_{length} {handover.example.bits(length)[0]}\n\\endif\n"
        for length in lengths
    )
    given = " ".join(f"-v code_{length}=0101..." for length in lengths)
    code = f":'code_{long}'::bit({long})"
    coarse = f"""
-- 3. Coarse to fine: the buckets whose {short}-bit code differs in at most two bits, ranked by {long} bits. With the
--    query's logits at hand, pass the buckets of its least sure bits instead of this list.
WITH bits AS (SELECT 1::bit({short}) << place AS bit FROM generate_series(0, {short - 1}) AS place),
     masks AS (SELECT 0::bit({short}) AS mask UNION SELECT a.bit | b.bit FROM bits AS a, bits AS b)
SELECT id, uri, bit_count(code_{long} # {code}) AS distance
FROM {table}
WHERE code_{short} = ANY (ARRAY(SELECT :'code_{short}'::bit({short}) # mask FROM masks))
ORDER BY distance, id LIMIT :k;
"""
    return f"""\
-- The nearest images of a code:  psql {given} -v k=10 -f query.sql
-- Without a code, the first image's is asked for.
\\if :{{?k}}
\\else
\\set k 10
\\endif
{defaults}
-- 1. Exact: every row is compared. Ordered by <~>, the planner may take the HNSW index, which is not exact.
SELECT id, uri, bit_count(code_{long} # {code}) AS distance
FROM {table}
ORDER BY distance, id LIMIT :k;

-- 2. Approximate, by the HNSW index: a larger ef_search finds more of the true neighbours and takes longer.
SET hnsw.ef_search = 100;
SELECT id, uri, code_{long} <~> {code} AS distance
FROM {table}
ORDER BY code_{long} <~> {code} LIMIT :k;
{coarse if short != long else ""}"""


def _readme(handover: Handover) -> str:
    return f"""\
# {handover.images:,} images for PostgreSQL with pgvector

{handover.origin}

    psql DATABASE -f schema.sql
    psql DATABASE -f load.sql       # in this folder
    psql DATABASE -f query.sql

Needs pgvector 0.7 or newer. Columns `code_L` are `bit(L)`, most significant bit first, as admth packs them: the code
`a3f0` of 16 bits is `B'1010001111110000'`, or `x'a3f0'::bit(16)`.

`psql DATABASE -c "SET maintenance_work_mem = '4GB'" -f load.sql` builds the HNSW index in memory, which is many times
faster while it fits. More than one load may run at once: each `\\copy` line of load.sql stands for itself.
"""
