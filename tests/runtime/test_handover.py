"""Handing an index over: every row arrives, whole, in the form that each server documents; nothing half-written."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from admth_runtime.errors import AdmthError, CodeLengthError, InputError, OutputError
from admth_runtime.handover import TARGETS, export_index, nearest_buckets
from admth_runtime.index import HashIndex
from admth_runtime.packing import from_hex, hamming_distance, to_hex

LENGTHS = (16, 32, 48, 64)
ROWS = 500


@pytest.fixture(scope="module")
def index() -> HashIndex:
    generator = np.random.default_rng(3)
    codes = {length: generator.integers(0, 256, (ROWS, length // 8), dtype=np.uint8) for length in LENGTHS}
    ids = np.sort(generator.choice(1 << 50, ROWS, replace=False))
    uris = [f'photos/{number}/it\'s a "tab"\t\\N ü 図 {"x" * (number % 50)}.jpg' for number in range(ROWS)]
    return HashIndex.from_codes(codes, ids=ids, uris=uris, model_sha256="ab" * 32)


def read_rows(folder: Path, target: str) -> list[tuple[int, str, dict[int, bytes]]]:
    """Read the rows of a folder back by each format's own rules, without the code that wrote them."""
    parts = sorted(folder.glob("rows-*"))
    return [row for part in parts for row in READERS[target](part)]


def read_copy(path: Path):
    """PostgreSQL's manual, COPY, binary format."""
    data = path.read_bytes()
    assert data[:11] == b"PGCOPY\n\xff\r\n\0" and data[11:19] == bytes(8)
    place = 19
    while (fields := struct.unpack_from(">h", data, place)[0]) != -1:
        place += 2
        values = []
        for _ in range(fields):
            (length,) = struct.unpack_from(">i", data, place)
            values.append(data[place + 4 : place + 4 + length])
            place += 4 + length
        bits = [(struct.unpack(">i", value[:4])[0], value[4:]) for value in values[2:]]
        assert all(8 * len(code) == length for length, code in bits)
        yield struct.unpack(">q", values[0])[0], values[1].decode(), dict(bits)
    assert place + 2 == len(data)


def read_parquet(path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    assert table.schema.field("id").type == pa.int64() and table.schema.field("uri").type == pa.string()
    for row in table.to_pylist():
        yield row["id"], row["uri"], {length: bytes(row[f"code_{length}"]) for length in LENGTHS}


def read_vespa(path: Path):
    for line in path.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        fields = document["fields"]
        assert document["put"] == f"id:images:images::{fields['id']}"
        assert fields["bucket"] == fields["code_16"]["values"]
        codes = {length: bytes.fromhex(fields[f"code_{length}"]["values"]) for length in LENGTHS}
        yield fields["id"], fields["uri"], codes


def read_bulk(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n")
    lines = iter(text.splitlines())
    for action, line in zip(lines, lines, strict=True):
        document = json.loads(line)
        assert json.loads(action) == {"index": {"_id": str(document["id"])}}
        assert document["bucket"] == document["code_16"]
        yield document["id"], document["uri"], {n: bytes.fromhex(document[f"code_{n}"]) for n in LENGTHS}


READERS = {"pgvector": read_copy, "milvus": read_parquet, "vespa": read_vespa, "elasticsearch": read_bulk}


def rows_of(index: HashIndex) -> list[tuple[int, str, dict[int, bytes]]]:
    codes = index.codes_of(index.ids)
    return [
        (int(image), uri, {length: codes[length][row].tobytes() for length in LENGTHS})
        for row, (image, uri) in enumerate(zip(index.ids, index.uris_of(index.ids), strict=True))
    ]


@pytest.mark.parametrize("rows_per_file", [None, 100, 333, ROWS, 1])
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_row_is_there_once_and_whole(target, rows_per_file, index, tmp_path):
    if rows_per_file == 1:
        index = HashIndex.from_codes(
            index.codes_of(index.ids[:5]), ids=index.ids[:5], uris=index.uris_of(index.ids[:5])
        )
    made = export_index(index, target, tmp_path / "out", rows_per_file=rows_per_file)
    assert read_rows(tmp_path / "out", target) == rows_of(index)
    files = {
        path.relative_to(tmp_path / "out").as_posix(): path.stat().st_size
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert dict(made.files) == files and made.images == len(index)
    parts = [name for name in files if name.startswith("rows-")]
    assert len(parts) == -(-len(index) // (rows_per_file or len(index)))
    facts = json.loads((tmp_path / "out" / "handover.json").read_text())
    assert facts["images"] == len(index) and facts["code_lengths"] == list(LENGTHS) and facts["bit_order"] == "msb"
    assert facts["files"] == {name: size for name, size in files.items() if name != "handover.json"}


def test_chosen_lengths_and_name_are_in_schemas_and_queries(index, tmp_path):
    for target in TARGETS:
        folder = tmp_path / target
        export_index(index, target, folder, name="photos_2026", lengths=[64, 16])
        texts = [path.read_text() for path in folder.rglob("*") if path.is_file() and not path.name.startswith("rows")]
        together = "\n".join(texts)
        assert "code_16" in together and "code_64" in together and "photos_2026" in together
        assert "code_32" not in together and "code_48" not in together


def test_one_length_alone_is_handed_over(index, tmp_path):
    for target in TARGETS:
        export_index(index, target, tmp_path / target, lengths=[48])
        for path in (tmp_path / target).rglob("*.json"):
            json.loads(path.read_text())


def test_vespa_schema_declares_what_feed_and_queries_use(index, tmp_path):
    export_index(index, "vespa", tmp_path / "out")
    schema = (tmp_path / "out/app/schemas/images.sd").read_text()
    assert schema.count("{") == schema.count("}")
    fields = dict(re.findall(r"field (\w+) type (\S+) \{", schema))
    assert fields == {
        "id": "long",
        "uri": "string",
        "bucket": "string",
        **{f"code_{length}": f"tensor<int8>(x[{length // 8}])" for length in LENGTHS},
    }
    assert schema.count("distance-metric: hamming") == len(LENGTHS)
    document = json.loads((tmp_path / "out/rows-00000.jsonl").read_text().splitlines()[0])
    assert set(document["fields"]) == set(fields)
    for name in ("query.json", "query-coarse.json"):
        query = json.loads((tmp_path / "out" / name).read_text())
        profile = re.search(rf"rank-profile {query['ranking']} \{{(.*?)\n    \}}", schema, re.DOTALL)
        assert profile is not None
        for key, values in query.items():
            if key.startswith("input."):
                name_of_input = key.removeprefix("input.query(").removesuffix(")")
                assert f"query({name_of_input}) tensor<int8>(x[{len(values)}])" in profile[1]
                code = np.array(values, dtype=np.int8).view(np.uint8)
                assert code.tobytes() == rows_of(index)[0][2][8 * len(values)]


def test_elasticsearch_mapping_declares_what_rows_and_queries_use(index, tmp_path):
    export_index(index, "elasticsearch", tmp_path / "out")
    read = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    fields = read["index.json"]["mappings"]["properties"]
    document = json.loads((tmp_path / "out/rows-00000.ndjson").read_text().splitlines()[1])
    assert set(document) == set(fields)
    for length in LENGTHS:
        field = fields[f"code_{length}"]
        assert (field["type"], field["element_type"], field["dims"]) == ("dense_vector", "bit", length)
    first = rows_of(index)[0][2]
    assert fields[read["query.json"]["knn"]["field"]]["index"] is True
    assert bytes.fromhex(read["query.json"]["knn"]["query_vector"]) == first[64]
    for name in ("query-exact.json", "query-coarse.json"):
        script = read[name]["query"]["script_score"]["script"]
        assert script["source"] == "64 - hamming(params.code, 'code_64')"
        assert np.array(script["params"]["code"], dtype=np.int8).tobytes() == first[64]
    (terms,) = read["query-coarse.json"]["query"]["script_score"]["query"]["bool"]["filter"]["terms"].values()
    assert terms[0] == first[16].hex() and len(terms) == len(set(terms)) == 137


def test_milvus_collection_declares_the_columns_of_the_rows(index, tmp_path):
    import pyarrow.parquet as pq

    export_index(index, "milvus", tmp_path / "out")
    collection = json.loads((tmp_path / "out/collection.json").read_text())
    fields = {field["fieldName"]: field for field in collection["schema"]["fields"]}
    assert list(fields) == pq.read_schema(tmp_path / "out/rows-00000.parquet").names
    longest = max(len(uri.encode()) for _, uri, _ in rows_of(index))
    assert int(fields["uri"]["elementTypeParams"]["max_length"]) >= longest
    for length in LENGTHS:
        assert fields[f"code_{length}"]["elementTypeParams"] == {"dim": str(length)}
    assert {entry["fieldName"] for entry in collection["indexParams"]} == {f"code_{length}" for length in LENGTHS}
    for script in ("load.py", "query.py"):
        compile((tmp_path / "out" / script).read_text(), script, "exec")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([8, 16]), st.integers(1, 300), st.booleans())
def test_nearest_buckets_come_in_the_order_of_their_cost(seed, length, count, with_logits):
    generator = np.random.default_rng(seed)
    code = generator.integers(0, 256, length // 8, dtype=np.uint8)
    logits = generator.normal(size=length).astype(np.float32) if with_logits else None
    found = nearest_buckets(code, logits, count=count)
    assert len(found) == len(set(found)) == min(count, 2**length)
    every = np.arange(2**length, dtype=f">u{length // 8}").view(np.uint8).reshape(-1, length // 8)
    flips = np.unpackbits(every ^ code, axis=1)
    costs = flips @ (np.ones(length) if logits is None else np.abs(logits.astype(np.float64)))
    of_text = dict(zip(to_hex(every), costs, strict=True))
    mine = [of_text[text] for text in found]
    np.testing.assert_allclose(mine, np.sort(costs)[: len(found)], atol=1e-9)
    assert found[0] == code.tobytes().hex()


def test_nearest_buckets_refuses_what_does_not_fit():
    code = np.zeros(2, np.uint8)
    for arguments, said in [
        ((code[None],), "not one packed code"),
        ((code.astype(np.int64),), "not one packed code"),
        ((code, np.zeros(8, np.float32)), "not those of a code of 16 bits"),
    ]:
        with pytest.raises(InputError, match=said):
            nearest_buckets(*arguments)
    with pytest.raises(InputError, match="count 0"):
        nearest_buckets(code, count=0)
    assert hamming_distance(from_hex(nearest_buckets(code)), code).max() == 2


def test_bad_arguments_are_said_before_anything_is_written(index, tmp_path):
    empty = HashIndex.from_codes({16: np.empty((0, 2), np.uint8)})
    out = tmp_path / "out"
    for arguments, kind, said in [
        ((index, "redis", out), InputError, "--to redis is unknown: use one of milvus"),
        ((empty, "vespa", out), InputError, "nothing to hand over"),
        ((index, "vespa", tmp_path / "absent" / "out"), OutputError, "does not exist; create it first"),
    ]:
        with pytest.raises(kind, match=re.escape(said)):
            export_index(*arguments)
    for options, kind, said in [
        ({"name": "Robert'); DROP TABLE"}, InputError, "is not lower-case letters"),
        ({"lengths": [24]}, CodeLengthError, "code length 24"),
        ({"rows_per_file": 0}, InputError, "--rows-per-file 0"),
    ]:
        with pytest.raises(kind, match=re.escape(said)):
            export_index(index, "pgvector", out, **options)
    five = {length: np.zeros((1, length // 8), np.uint8) for length in (8, 16, 24, 32, 40)}
    with pytest.raises(InputError, match="leave some out with --lengths"):
        export_index(HashIndex.from_codes(five), "milvus", out)
    assert list(tmp_path.iterdir()) == []


def test_folders_that_hold_something_are_left_alone(index, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="it holds files"):
        export_index(index, "vespa", tmp_path / "kept")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="a file has that name"):
        export_index(index, "vespa", tmp_path / "file")
    (tmp_path / "empty").mkdir()
    export_index(index, "vespa", tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "kept"]


def test_a_row_that_a_server_would_refuse_is_named_and_nothing_stays(tmp_path):
    codes = {16: np.zeros((2, 2), np.uint8)}
    null = HashIndex.from_codes(codes, uris=["a.jpg", "b\0.jpg"])
    with pytest.raises(InputError, match="the uri of image 1 has a null byte"):
        export_index(null, "pgvector", tmp_path / "out")
    long = HashIndex.from_codes(codes, uris=["a.jpg", "x" * 70_000])
    with pytest.raises(InputError, match="the uri of image 1 has more than the 65,535 bytes"):
        export_index(long, "milvus", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_a_failure_in_the_middle_leaves_nothing(target, index, tmp_path):
    def stop(images):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_index(index, target, tmp_path / "out", advance=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_memory_is_a_blocks_and_not_the_indexs(target, tmp_path, monkeypatch):
    monkeypatch.setattr("admth_runtime.handover.export._BLOCK", 500)
    count = 12_000
    codes = np.random.default_rng(0).integers(0, 256, (count, 8), dtype=np.uint8)
    large = HashIndex.from_codes({64: codes}, uris=["x" * 200] * count)
    export_index(large, target, tmp_path / "warm-up")
    tracemalloc.start()
    export_index(large, target, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2e6  # the rows alone are 12,000 * (200 + 8 + 8) = 2.6 MB


def test_command_line(index, tmp_path):
    index.save(tmp_path / "codes.parquet")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "admth_runtime", "index", "export", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)

    done = run("codes.parquet", "--to", "pgvector", "--out", "out", "--lengths", "16,64")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("wrote out: 500 images for pgvector, 6 files")
    assert next(codes.keys() for _, _, codes in read_copy(tmp_path / "out/rows-00000.pgcopy")) == {16, 64}
    again = run("codes.parquet", "--to", "pgvector", "--out", "out")
    assert again.returncode == 1 and again.stderr.startswith("error: cannot write out: it holds files")
    listed = run("codes.parquet", "--to", "vespa", "--out", "feed", "--json")
    assert json.loads(listed.stdout)["images"] == ROWS
    for arguments, said in [
        (["codes.parquet", "--to", "solr", "--out", "x"], "error: --to solr is unknown"),
        (["absent.parquet", "--to", "vespa", "--out", "x"], "error: absent.parquet"),
        (["codes.parquet", "--to", "vespa", "--out", "x", "--lengths", "a"], "error: --lengths 'a'"),
    ]:
        failed = run(*arguments)
        assert failed.returncode == 1 and failed.stderr.startswith(said) and failed.stderr.count("\n") == 1
    assert issubclass(OutputError, AdmthError) and not (tmp_path / "x").exists()
