from __future__ import annotations

import sys

import numpy as np
import pytest
from _codes import LENGTHS, brute_force, encoded_images, random_tables, same_hits, trained_codes
from hypothesis import given, settings
from hypothesis import strategies as st

from admth_runtime import CodeLengthError, HashCodes, HashIndex, InputError
from admth_runtime.index import coarse, flat, multi_index
from admth_runtime.index.probing import key_costs, likely_probes

SHAPES = st.sampled_from([(8, 24), (16, 64), (16, 32, 48, 64), (24, 40), (32, 128), (16, 512), (64,)])


def made(lengths, count, seed, values, *, parts=1, scattered=True):
    """An index, in one segment or several, and its ids."""
    tables = random_tables(count, lengths, seed=seed, values=values)
    generator = np.random.default_rng(seed)
    ids = generator.permutation(3 * count)[:count].astype(np.int64) - count if scattered else np.arange(count)
    index = HashIndex(encoded_images({length: table[:0] for length, table in tables.items()}))
    for rows in np.array_split(np.arange(count), parts):
        if len(rows):
            index.add(encoded_images({length: table[rows] for length, table in tables.items()}, ids=ids[rows]))
    return index, tables, ids


@settings(max_examples=80, deadline=None)
@given(
    SHAPES, st.integers(1, 150), st.integers(1, 4), st.integers(1, 150), st.sampled_from([2, 3, 256]),
    st.integers(0, 999), st.integers(1, 3), st.sampled_from(["flat", "multi-index", "coarse", "exact"]),
    st.booleans(), st.integers(1, 40),
)  # fmt: skip
def test_every_mode_equals_brute_force(lengths, count, queries, k, values, seed, parts, mode, gather, block):
    index, tables, ids = made(lengths, count, seed, values, parts=parts)
    k = min(k, count)
    wanted = HashCodes(random_tables(queries, lengths, seed=seed + 1, values=values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat, "_BLOCK", block)
        patch.setattr(flat, "_MOST_KEPT", 5)
        if gather:  # never give up for a scan
            patch.setattr(coarse, "_SCAN_PAYS", 0)
            patch.setattr(multi_index, "_SCAN_PAYS", 0)
            patch.setattr(coarse, "_FIRST_QUOTA", 3)
            patch.setattr(multi_index, "_MOST_FLIPS", 16)
            patch.setattr(multi_index, "_MOST_HOPE", 16)
            patch.setattr(multi_index, "_FEWEST_GROUPS", 0)
        for length in lengths:
            if mode == "multi-index" and length > 16:
                index.add_multi_index(length)
            hits = index.search(wanted, k, length, mode=mode, recall=1.0)
            assert same_hits(hits, brute_force(wanted[length], tables[length], ids, k))
            assert hits.scores is None


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("values", [2, 256])
def test_faiss_and_numpy_find_the_same(length, values, monkeypatch):
    pytest.importorskip("faiss")
    index, tables, ids = made(LENGTHS, 20_000, 3, values)
    queries = random_tables(20, seed=9, values=values)[length]
    calls = []
    search_faiss = flat._search_faiss
    monkeypatch.setattr(flat, "_FAISS_PAYS", 0)
    monkeypatch.setattr(flat, "_MORE_FOR_TIES", 1)  # so that ties are cut off, and must be looked for
    monkeypatch.setattr(flat, "_search_faiss", lambda *arguments: calls.append(1) or search_faiss(*arguments))
    for k in (1, 10, 60):
        assert same_hits(index.search(queries, k), brute_force(queries, tables[length], ids, k))
    assert bool(calls) == (length > 16)  # the shortest code is not scanned


def test_without_faiss_nothing_is_imported(monkeypatch):
    monkeypatch.setattr(flat, "_FAISS_PAYS", 0)
    flat._has_faiss.cache_clear()
    monkeypatch.setattr(flat.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it would raise
    try:
        index, tables, ids = made((16, 64), 3000, 1, 256)
        queries = random_tables(3, (16, 64), seed=4)[64]
        assert same_hits(index.search(queries, 5), brute_force(queries, tables[64], ids, 5))
    finally:
        flat._has_faiss.cache_clear()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 120), st.integers(0, 99), st.integers(1, 3), st.sampled_from(["exact", "coarse"]),
    st.floats(0, 1), st.sampled_from(["allow", "deny", "both"]), st.sampled_from([1, 8, 10**9]),
)  # fmt: skip
def test_filters_equal_brute_force_over_what_they_leave(count, seed, parts, mode, share, kind, few):
    index, tables, ids = made((16, 64), count, seed, 2, parts=parts)
    generator = np.random.default_rng(seed)
    allow = generator.choice(ids, int(share * count), replace=False) if kind != "deny" else None
    deny = generator.choice(ids, count // 2, replace=False) if kind != "allow" else None
    left = np.ones(count, bool) if allow is None else np.isin(ids, allow)
    if deny is not None:
        left &= ~np.isin(ids, deny)
    wanted = HashCodes(random_tables(2, (16, 64), seed=seed + 1, values=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat, "_FEW", few)
        if not left.any():
            with pytest.raises(InputError, match="the filter leaves no image"):
                index.search(wanted, 1, mode=mode, allow=allow, deny=deny)
            return
        for length, k in ((16, int(left.sum())), (64, max(1, int(left.sum()) // 2))):
            hits = index.search(wanted, k, length, mode=mode, recall=1.0, allow=allow, deny=deny)
            assert same_hits(hits, brute_force(wanted[length], tables[length][left], ids[left], k))
    if left.sum() < count:
        with pytest.raises(InputError, match="the number of images that the filter leaves"):
            index.search(wanted, int(left.sum()) + 1, mode=mode, allow=allow, deny=deny)


def test_ids_in_a_filter_that_are_not_in_the_index_are_no_matter():
    index, tables, ids = made((16, 64), 50, 0, 256)
    queries = tables[64][:1]
    hits = index.search(queries, 2, allow=[10**15, -(10**15), *ids[:3]], deny=[2**63 - 1, int(ids[0])])
    assert sorted(hits.ids[0]) == sorted(ids[1:3])
    with pytest.raises(InputError, match="allow holds float64, not ids"):
        index.search(queries, 1, allow=[0.5])


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 16), st.integers(0, 999), st.booleans())
def test_probes_come_best_first_and_none_is_left_out(bits, seed, confident):
    generator = np.random.default_rng(seed)
    keys = generator.integers(0, 1 << bits, 3).astype(np.uint16)
    weights = np.abs(generator.normal(size=(3, bits))).astype(np.float32) if confident else np.ones((3, bits), "f4")
    probes = likely_probes(keys, weights)
    everything = np.arange(1 << bits, dtype=np.uint16)
    for number, key in enumerate(keys):
        differs = ((everything[:, None] ^ key) >> np.arange(bits - 1, -1, -1)) & 1
        costs = differs @ weights[number].astype(np.float64)
        assert np.allclose(key_costs(everything, key, weights[number]), costs, atol=1e-5)
        assert np.all(np.diff(probes.costs[number]) >= 0)
        assert np.allclose(costs[probes.keys[number]], probes.costs[number], atol=1e-5)
        assert len(set(probes.keys[number].tolist())) == probes.keys.shape[1]
        missing = np.setdiff1d(everything, probes.keys[number])
        assert len(missing) == 0 or costs[missing].min() >= probes.complete_below[number] - 1e-5


class TestCoarse:
    index = HashIndex(encoded_images(trained_codes(20_000, seed=1)))
    queries = trained_codes(200, seed=2)
    exact = index.search(queries, 10)
    assert index.facts()["distinct_codes"] > 17_000  # with fewer it would scan

    def recall(self, hits):
        return float((hits.distances <= self.exact.distances[:, -1:]).mean())

    @pytest.mark.parametrize("recall", [0.9, 0.99])
    def test_reaches_the_recall_it_aims_at_and_compares_few(self, recall, monkeypatch):
        self.index.search(self.queries, 10, mode="coarse")  # learns how far to probe
        compared = []
        compare = coarse.gathered_distances
        monkeypatch.setattr(
            coarse, "gathered_distances", lambda *given: compared.append(len(given[1])) or compare(*given)
        )
        hits = self.index.search(self.queries, 10, mode="coarse", recall=recall)
        assert self.recall(hits) >= recall
        assert sum(compared) < 0.1 * len(self.index) * self.queries.count

    def test_works_without_logits_and_for_other_lengths(self):
        bare = HashCodes(dict(self.queries))
        assert self.recall(self.index.search(bare, 10, mode="coarse")) >= 0.97
        for length in (16, 48):
            exact = self.index.search(self.queries, 10, length)
            hits = self.index.search(self.queries, 10, length, mode="coarse")
            assert float((hits.distances <= exact.distances[:, -1:]).mean()) >= 0.98

    def test_an_index_without_logits_takes_queries_with_them(self):
        index = HashIndex(encoded_images(dict(trained_codes(20_000, seed=1))))
        exact = index.search(self.queries, 10)
        hits = index.search(self.queries, 10, mode="coarse")
        assert float((hits.distances <= exact.distances[:, -1:]).mean()) >= 0.97

    def test_a_far_query_is_answered_all_the_same(self):
        far = HashCodes({length: table ^ np.uint8(0xAA) for length, table in self.queries.items()}, self.queries.logits)
        exact, hits = self.index.search(far, 10), self.index.search(far, 10, mode="coarse")
        assert float((hits.distances <= exact.distances[:, -1:]).mean()) >= 0.95

    def test_needs_the_short_code(self):
        with pytest.raises(InputError, match="mode 'coarse' needs the query's 16-bit code too"):
            self.index.search(self.queries[64], 10, mode="coarse")
        with pytest.raises(InputError, match="recall 0 is not above 0"):
            self.index.search(self.queries, 10, mode="coarse", recall=0)


def test_a_look_at_equal_codes_alone_finds_equal_codes(monkeypatch):
    codes = trained_codes(5000, classes=3, spread=0.01)  # nearly all codes repeat
    index = HashIndex(encoded_images(codes))
    index.search(codes, 10, mode="coarse")  # learns how far to probe
    monkeypatch.setattr(coarse, "_SCAN_PAYS", 0)
    monkeypatch.setattr(coarse, "_compare", None)  # whatever goes further fails
    equal = np.flatnonzero((codes[64] == codes[64][7]).all(axis=1))
    assert len(equal) > 10
    first = HashCodes({n: t[7:8] for n, t in codes.items()}, {n: t[7:8] for n, t in codes.logits.items()})
    hits = index.search(first, 10, mode="coarse")
    assert hits.distances.tolist() == [[0] * 10]
    assert set(hits.ids[0]) <= set(equal)


class TestRerank:
    codes = trained_codes(3000, seed=3)
    index = HashIndex(encoded_images(codes))
    queries = trained_codes(6, seed=4)

    @pytest.mark.parametrize("rerank", ["weighted", "asymmetric"])
    @pytest.mark.parametrize("mode", ["exact", "coarse"])
    @pytest.mark.parametrize("parts", [1, 3])
    def test_equals_a_plain_loop(self, rerank, mode, parts):
        index = HashIndex(encoded_images({n: t[:0] for n, t in self.codes.items()}))
        for rows in np.array_split(np.arange(3000), parts):
            index.add(encoded_images({n: t[rows] for n, t in self.codes.items()}, ids=rows))
        hits = index.search(self.queries, 7, mode=mode, recall=1.0, rerank=rerank, rerank_depth=40)
        for number in range(6):
            distances = np.unpackbits(self.queries[64][number] ^ self.codes[64], axis=1).sum(axis=1)
            near = np.flatnonzero(distances <= np.sort(distances)[39])
            scores = np.zeros(len(near))
            for length in LENGTHS:
                bits = np.unpackbits(self.codes[length][near], axis=1).astype(float)
                logits = self.queries.logits[length][number].astype(float)
                if rerank == "weighted":
                    scores += (np.abs(logits) * ((logits > 0) != bits)).sum(axis=1)
                else:
                    scores += ((np.tanh(logits) - (2 * bits - 1)) ** 2).sum(axis=1)
            order = np.lexsort((near, scores.astype(np.float32)))[:7]
            assert np.allclose(hits.scores[number], scores[order], rtol=1e-4)
            assert np.array_equal(hits.distances[number], distances[near[order]])
            assert set(hits.ids[number]) == set(near[order])

    def test_a_depth_of_everything_ignores_the_distance(self):
        hits = self.index.search(self.queries, 3000, rerank="asymmetric", rerank_depth=3000)
        assert np.all(np.diff(hits.scores, axis=1) >= 0)
        assert np.array_equal(np.sort(hits.ids, axis=1), np.tile(np.arange(3000), (6, 1)))

    def test_needs_logits_and_a_name_that_it_knows(self):
        with pytest.raises(InputError, match="reranking needs the query's logits"):
            self.index.search(self.queries[64], 3, rerank="asymmetric")
        with pytest.raises(InputError, match="rerank 'cosine' is unknown: use weighted or asymmetric"):
            self.index.search(self.queries, 3, rerank="cosine")
        with pytest.raises(InputError, match="rerank_depth 0 is less than 1"):
            self.index.search(self.queries, 3, rerank="weighted", rerank_depth=0)
        wrong = HashCodes(dict(self.queries), {64: np.zeros((6, 60), np.float32)})
        with pytest.raises(InputError, match=r"logits of 64 bits are \[6, 60\]"):
            self.index.search(wrong, 3, rerank="weighted")


def test_what_cannot_be_searched_is_said():
    index, tables, _ = made((16, 64), 20, 0, 256)
    with pytest.raises(InputError, match="mode 'fast' is unknown: use one of exact, flat, multi-index, coarse"):
        index.search(tables[64], 1, mode="fast")
    with pytest.raises(InputError, match="no tables for 64 bits: build it with --multi-index"):
        index.search(tables[64], 1, mode="multi-index")
    with pytest.raises(CodeLengthError, match="16 bits are found fastest without tables"):
        index.add_multi_index(16)
    with pytest.raises(CodeLengthError, match="code length 32 is not there: the query has 16, 64"):
        HashIndex(encoded_images(random_tables(3, (16, 32)))).search(HashCodes(tables), 1)
    empty = HashIndex(encoded_images({16: np.empty((0, 2), np.uint8)}))
    assert len(empty) == 0
    with pytest.raises(InputError, match="the index is empty: add images first"):
        empty.search(np.zeros((1, 2), np.uint8), 1)
