"""Handed-over rows in real servers: PostgreSQL with pgvector, and Milvus Lite where it is installed."""

from __future__ import annotations

import json
import os
import subprocess

import numpy as np
import pytest
from _postgres import Postgres, PostgresMissingError

from admth_runtime.handover import export_index, nearest_buckets
from admth_runtime.index import HashIndex

ROWS, CENTRES = 6000, 40


@pytest.fixture(scope="module")
def index() -> HashIndex:
    """Codes that gather around centres, as those of a trained network do."""
    generator = np.random.default_rng(8)
    of = generator.integers(0, CENTRES, ROWS)
    codes = {}
    for length, rate in ((16, 0.05), (64, 0.08)):
        centres = generator.integers(0, 2, (CENTRES, length), dtype=np.uint8)
        codes[length] = np.packbits(centres[of] ^ (generator.random((ROWS, length)) < rate), axis=1)
    uris = [f"photos/{number % 7}/ü 'quoted'\t\\{number}.jpg" for number in range(ROWS)]
    return HashIndex.from_codes(codes, ids=np.arange(ROWS, dtype=np.int64) * 5 + (1 << 52), uris=uris)


@pytest.fixture(scope="module")
def postgres():
    try:
        server = Postgres()
    except PostgresMissingError as reason:
        pytest.skip(str(reason))
    yield server
    server.close()


@pytest.fixture(scope="module")
def loaded(index, postgres, tmp_path_factory):
    folder = tmp_path_factory.mktemp("handover") / "pgvector"
    export_index(index, "pgvector", folder, rows_per_file=2500)
    postgres.psql("-f", "schema.sql", "-f", "load.sql", cwd=folder)
    return folder


def bits(code: np.ndarray) -> str:
    return "".join(map(str, np.unpackbits(code)))


def ask(postgres, folder, index, row: int, k: int = 10) -> list[list[tuple[int, str, int]]]:
    """The answers of query.sql, in its order: exact, HNSW, coarse."""
    codes = index.codes_of(index.ids[row : row + 1])
    given = [f"-vcode_{length}={bits(codes[length][0])}" for length in (16, 64)]
    lines = postgres.psql(*given, f"-vk={k}", "-f", "query.sql", cwd=folder).splitlines()
    hits = [(int(a), b, int(c)) for a, b, c in (line.split("|") for line in lines)]
    return [hits[:k], hits[k : 2 * k], hits[2 * k :]]


def test_postgres_holds_every_row_to_the_bit(index, postgres, loaded):
    text = postgres.psql("-c", "SELECT id, code_16, code_64, uri FROM images ORDER BY id", cwd=loaded)
    codes = index.codes_of(index.ids)
    expected = [
        f"{image}|{bits(codes[16][row])}|{bits(codes[64][row])}|{uri}"
        for row, (image, uri) in enumerate(zip(index.ids, index.uris_of(index.ids), strict=True))
    ]
    assert text.splitlines() == expected


def test_exact_query_is_the_indexs_own(index, postgres, loaded):
    for row in (0, 17, 3000, ROWS - 1):
        hits = index.search(index.codes_of(index.ids[row : row + 1]), 10)
        exact = ask(postgres, loaded, index, row)[0]
        assert [hit[0] for hit in exact] == hits.ids[0].tolist()
        assert [hit[2] for hit in exact] == hits.distances[0].tolist()
        assert [hit[1] for hit in exact] == index.uris_of(hits.ids[0])


def test_exact_and_coarse_queries_never_take_the_graph(postgres, loaded, tmp_path):
    """Ordered by <~> and then by id, PostgreSQL sorts what the graph found: no longer exact, and silently so."""
    text = (loaded / "query.sql").read_text()
    for start in ("SELECT id, uri, bit_count", "WITH bits"):
        assert f"\n{start}" in text
        text = text.replace(f"\n{start}", f"\nEXPLAIN {start}", 1)
    (tmp_path / "explain.sql").write_text(f"SET enable_seqscan = off;\nSET enable_sort = off;\n{text}")
    plans = [line for line in postgres.psql("-f", "explain.sql", cwd=tmp_path).splitlines() if "|" not in line]
    assert len(plans) > 6 and not any("hnsw" in line for line in plans)


def test_graph_is_used_and_finds_the_nearest(index, postgres, loaded):
    plan = postgres.psql(
        "-c",
        f"EXPLAIN SELECT id FROM images ORDER BY code_64 <~> B'{'01' * 32}' LIMIT 10",
        cwd=loaded,
    )
    assert "images_hnsw" in plan
    recalls = []
    for row in range(0, ROWS, 600):
        exact, graph, _ = ask(postgres, loaded, index, row)
        worst = exact[-1][2]
        recalls.append(sum(hit[2] <= worst for hit in graph) / 10)
    assert np.mean(recalls) >= 0.95


def test_coarse_query_ranks_exactly_the_buckets_within_two_bits(index, postgres, loaded):
    plan = postgres.psql(
        "-c", "EXPLAIN SELECT id FROM images WHERE code_16 = ANY (ARRAY[B'0101010101010101'])", cwd=loaded
    )
    assert "images_bucket" in plan
    codes = index.codes_of(index.ids)
    texts = np.array([code.tobytes().hex() for code in codes[16]])
    for row in (5, 4444):
        inside = index.ids[np.isin(texts, nearest_buckets(codes[16][row]))]
        hits = index.search(index.codes_of(index.ids[row : row + 1]), min(10, len(inside)), allow=inside)
        coarse = ask(postgres, loaded, index, row)[2]
        assert [(hit[0], hit[2]) for hit in coarse] == list(zip(hits.ids[0], hits.distances[0], strict=True))


def test_query_without_a_code_asks_for_the_first_image(index, postgres, loaded):
    first = postgres.psql("-f", "query.sql", cwd=loaded).splitlines()[0]
    assert first.startswith(f"{index.ids[0]}|") and first.endswith("|0")


def test_loading_twice_fails_and_keeps_the_rows(postgres, loaded):
    with pytest.raises(AssertionError, match=r"duplicate key|already exists|multiple primary keys"):
        postgres.psql("-f", "schema.sql", "-f", "load.sql", cwd=loaded)
    assert postgres.psql("-c", "SELECT count(*) FROM images", cwd=loaded).strip() == str(ROWS)


def test_milvus_lite_takes_the_rows(index, tmp_path):
    """Runs where ADMTH_MILVUS_PYTHON names a Python with pymilvus, pyarrow and a Milvus Lite of version 2."""
    python = os.environ.get("ADMTH_MILVUS_PYTHON")
    if not python:
        pytest.skip("ADMTH_MILVUS_PYTHON names no Python with pymilvus, pyarrow and 'milvus-lite<3'")
    folder = tmp_path / "milvus"
    export_index(index, "milvus", folder, rows_per_file=2500)

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [python, *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "PYTHONPATH": ""},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f"inserted {ROWS:,} rows" in run("load.py", "./lite.db")
    for length in (16, 64):
        query = index.codes_of(index.ids[100:101])
        hits = index.search(query, 10, length)
        answers = [json.loads(line) for line in run("query.py", query.hex(length)[0], "./lite.db").splitlines()]
        assert [answer["distance"] for answer in answers] == hits.distances[0].tolist()
        assert answers[0]["uri"] in index.uris_of(index.ids)
