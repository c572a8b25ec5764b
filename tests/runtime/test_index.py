from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from admth_runtime import CodeLengthError, HashCodes, HashIndex, InputError, hamming_matrix, write_codes
from admth_runtime.codes_file import EncodedImages
from admth_runtime.index import flat


def random_codes(count: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, length]).integers(0, 256, (count, length // 8), dtype=np.uint8)


def brute_force(queries, database, k):
    """All distances, sorted by (distance, row)."""
    distances = hamming_matrix(queries, database)
    order = np.lexsort((np.broadcast_to(np.arange(len(database)), distances.shape), distances), axis=1)[:, :k]
    return order, np.take_along_axis(distances, order, axis=1)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 5), st.integers(1, 60), st.sampled_from([8, 16, 24, 64]),
    st.integers(1, 90), st.integers(0, 99), st.sampled_from([2, 256]),
)  # fmt: skip
def test_equals_brute_force_whatever_the_block(count, queries, k, length, block, seed, values):
    generator = np.random.default_rng(seed)
    database = generator.integers(0, values, (count, length // 8), dtype=np.uint8)  # few values: many ties
    wanted = generator.integers(0, values, (queries, length // 8), dtype=np.uint8)
    k = min(k, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat, "_BLOCK", block)
        hits = HashIndex.from_codes({length: database}).search(wanted, k)
    rows, distances = brute_force(wanted, database, k)
    assert hits.ids.dtype == np.int64
    assert hits.distances.dtype == np.uint16
    assert np.array_equal(hits.ids, rows)
    assert np.array_equal(hits.distances, distances)


def test_ties_go_to_the_lower_id_even_when_ids_are_not_in_order():
    database = np.zeros((6, 2), np.uint8)
    database[4] = 255
    ids = np.array([50, 10, 40, 20, 5, 30], np.int64)
    index = HashIndex.from_codes({16: database}, ids=ids, uris=[f"u{i}" for i in ids])
    hits = index.search(np.zeros((1, 2), np.uint8), 6)
    assert hits.ids.tolist() == [[10, 20, 30, 40, 50, 5]]
    assert hits.distances.tolist() == [[0, 0, 0, 0, 0, 16]]
    assert index.uris_of(hits.ids[0]) == ["u10", "u20", "u30", "u40", "u50", "u5"]
    assert index.ids.tolist() == sorted(ids)
    assert index.uris == ("u5", "u10", "u20", "u30", "u40", "u50")


def test_many_codes_in_several_blocks():
    database, queries = random_codes(200_000, 16), random_codes(70, 16, seed=1)
    hits = HashIndex.from_codes({16: database}).search(queries, 25)
    rows, distances = brute_force(queries[:8], database, 25)
    assert np.array_equal(hits.ids[:8], rows)
    assert np.array_equal(hits.distances[:8], distances)


def test_lengths_are_chosen_by_name_by_width_or_the_longest():
    tables = {16: random_codes(9, 16), 64: random_codes(9, 64)}
    index = HashIndex.from_codes(HashCodes(tables))
    assert (len(index), index.code_lengths, repr(index)) == (9, (16, 64), "HashIndex(count=9, code_lengths=(16, 64))")
    every = HashCodes({length: table[:2] for length, table in tables.items()})
    assert np.array_equal(index.search(every, 3).ids, index.search(tables[64][:2], 3).ids)
    assert np.array_equal(index.search(every, 3, 16).ids, index.search(tables[16][:2], 3).ids)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((random_codes(1, 24), 3), CodeLengthError, "code length 24 is not there: this model or file has 16, 64"),
        ((random_codes(1, 16), 3, 12), CodeLengthError, "code length 12"),
        ((random_codes(1, 16), 3, 64), InputError, "query codes have 16 bits, not 64"),
        ((random_codes(1, 16), 0), InputError, "k 0 is not between 1 and 9"),
        ((random_codes(1, 16), 10), InputError, "k 10 is not between 1 and 9"),
        ((random_codes(1, 16), True), InputError, "k True"),
        ((random_codes(1, 16)[0], 3), InputError, r"uint8 \[2\], not packed"),
        ((np.zeros((1, 16)), 3), InputError, "float64"),
    ],
)
def test_bad_queries(arguments, error, message):
    index = HashIndex.from_codes({64: random_codes(9, 64), 16: random_codes(9, 16)})
    with pytest.raises(error, match=message):
        index.search(*arguments)


def test_no_queries_give_no_hits():
    hits = HashIndex.from_codes({16: random_codes(9, 16)}).search(np.empty((0, 2), np.uint8), 3)
    assert hits.ids.shape == hits.distances.shape == (0, 3)


def test_codes_of_another_model_are_refused():
    index = HashIndex.from_codes({16: random_codes(9, 16)}, model_sha256="a" * 64)
    index.search(random_codes(1, 16), 1)
    index.search(random_codes(1, 16), 1, model_sha256="a" * 64)
    with pytest.raises(InputError, match=r"model bbbbbbbbbbbb\.\.\. is not the index's aaaaaaaaaaaa"):
        index.search(random_codes(1, 16), 1, model_sha256="b" * 64)
    HashIndex.from_codes({16: random_codes(9, 16)}).search(random_codes(1, 16), 1, model_sha256="b" * 64)


@pytest.mark.parametrize("suffix", ["npz", "parquet"])
def test_saved_and_loaded(tmp_path, suffix):
    index = HashIndex.from_codes(
        {16: random_codes(9, 16)},
        ids=np.arange(9, dtype=np.int64)[::-1] * 7,
        uris=list("abcdefghi"),
        model_sha256="c" * 64,
    )
    index.save(tmp_path / f"index.{suffix}")
    back = HashIndex.load(tmp_path / f"index.{suffix}")
    assert back.uris == index.uris
    assert back.model_sha256 == "c" * 64
    query = random_codes(4, 16, seed=5)
    assert np.array_equal(back.search(query, 9).ids, index.search(query, 9).ids)


def test_an_encoded_file_is_an_index(tmp_path):
    codes = HashCodes({16: random_codes(3, 16)}, {16: np.ones((3, 16), np.float32)})
    encoded = EncodedImages(np.array([2, 0, 1]), ("c", "a", "b"), codes)
    write_codes(tmp_path / "codes.npz", encoded)
    index = HashIndex.load(tmp_path / "codes.npz")
    assert index.uris == ("a", "b", "c")
    assert index.search(codes[16][:1], 1).ids.tolist() == [[2]]


def test_bad_tables():
    with pytest.raises(InputError, match="no codes"):
        HashIndex.from_codes({})
    with pytest.raises(InputError, match="ids repeat"):
        HashIndex.from_codes({16: random_codes(2, 16)}, ids=np.zeros(2, np.int64))
    with pytest.raises(InputError, match="one for each uri"):
        HashIndex.from_codes({16: random_codes(2, 16)}, uris=["a"])
    with pytest.raises(InputError, match="code_16 is float64"):
        HashIndex.from_codes({16: np.zeros((2, 2))})


def test_ids_that_are_not_there():
    with pytest.raises(InputError, match=r"ids \[7\] are not in this index"):
        HashIndex.from_codes({16: random_codes(3, 16)}).uris_of(np.array([1, 7]))
