from __future__ import annotations

import threading

import numpy as np
import pytest
from _codes import LENGTHS, encoded_images, random_tables, same_hits, trained_codes
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from admth_runtime import HashCodes, HashIndex, InputError
from admth_runtime.index import state as state_module
from admth_runtime.index.row_starts import FewRepeated, ManyRepeated, row_starts
from admth_runtime.index.segment import Uris

QUERIES = HashCodes(random_tables(3, (16, 64), seed=77, values=3))


def rows_of(ids):
    """Codes that follow from ids, so that a model of the index is a set of ids."""
    ids = np.asarray(ids, dtype=np.int64)
    seeds = (ids.astype(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)) >> np.arange(0, 60, 6, dtype=np.uint64)
    table = (seeds % np.uint64(3)).astype(np.uint8)
    return {16: np.ascontiguousarray(table[:, :2]), 64: np.ascontiguousarray(table[:, 2:])}


class Changes(RuleBasedStateMachine):
    """Whatever is added, deleted, saved and loaded, the index equals one that is built of what is left."""

    @initialize(ids=st.sets(st.integers(-50, 200), max_size=40), tables=st.booleans())
    def begin(self, ids, tables):
        self.ids = set(ids)
        self.index = HashIndex(encoded_images(rows_of(sorted(ids)), ids=sorted(ids), model_sha256="a" * 64))
        if tables:
            self.index.add_multi_index()

    @rule(ids=st.sets(st.integers(-50, 200), min_size=1, max_size=12))
    def add(self, ids):
        there = sorted(ids & self.ids)
        new = encoded_images(rows_of(list(ids)), ids=list(ids), model_sha256="a" * 64)
        if there:
            with pytest.raises(InputError, match=rf"{len(there)} ids are in the index already, {there[0]} first"):
                self.index.add(new)
        self.index.add(new, replace=bool(there))
        self.ids |= ids

    @precondition(lambda self: self.ids)
    @rule(data=st.data())
    def delete(self, data):
        doomed = data.draw(st.sets(st.sampled_from(sorted(self.ids)), min_size=1, max_size=30))
        absent = 999
        with pytest.raises(InputError, match=r"the ids \[999\] are not in this index"):
            self.index.delete([*doomed, absent])
        self.index.delete(list(doomed))
        self.ids -= doomed

    @rule()
    def compact(self):
        self.index.compact()

    @invariant()
    def equals_a_rebuilt_one(self):
        ids = np.array(sorted(self.ids), dtype=np.int64)
        assert len(self.index) == len(ids)
        assert np.array_equal(self.index.ids, ids)
        if len(ids) == 0:
            return
        rebuilt = HashIndex(encoded_images(rows_of(ids), ids=ids))
        for mode, length in (("exact", 16), ("exact", 64), ("coarse", 64)):
            hits = self.index.search(QUERIES, len(ids), length, mode=mode, recall=1.0)
            other = rebuilt.search(QUERIES, len(ids), length)
            assert same_hits(hits, (other.ids, other.distances))
        allowed = [*ids[::2], 12345]
        hits = self.index.search(QUERIES, len(ids[::2]), allow=allowed)
        other = rebuilt.search(QUERIES, len(ids[::2]), allow=allowed)
        assert same_hits(hits, (other.ids, other.distances))
        assert self.index.uris_of(ids[::-1]) == [f"images/{i}.jpg" for i in ids[::-1]]
        codes = self.index.codes_of(ids)
        assert all(np.array_equal(codes[length], table) for length, table in rows_of(ids).items())


Changes.TestCase.settings = settings(max_examples=20, stateful_step_count=12, deadline=None)
TestChanges = Changes.TestCase


def test_many_small_additions_are_joined():
    index = HashIndex(encoded_images(rows_of(np.arange(1000))))
    for first in range(1000, 1600, 10):
        index.add(encoded_images(rows_of(np.arange(first, first + 10)), ids=np.arange(first, first + 10)))
        assert len(index._state.slots) <= state_module._MOST_SEGMENTS
    assert index.facts()["segments"] > 1
    index.compact()
    assert index.facts()["segments"] == 1
    assert len(index) == 1600


def test_a_segment_with_many_deleted_rows_is_made_anew():
    index = HashIndex(encoded_images(rows_of(np.arange(100))))
    index.delete(np.arange(20))
    assert index.facts()["deleted"] == 20
    index.delete(np.arange(20, 40))
    assert index.facts()["deleted"] == 0
    index.delete(np.arange(40, 100))
    assert (len(index), index.facts()["segments"]) == (0, 0)
    index.add(encoded_images(rows_of([3])))
    assert len(index) == 1


def test_codes_of_another_model_or_other_lengths_cannot_be_added():
    index = HashIndex(encoded_images(rows_of([1]), ids=[1], model_sha256="a" * 64))
    with pytest.raises(InputError, match=r"the new codes' model bbbbbbbbbbbb\.\.\. is not the index's aaaaaaaaaaaa"):
        index.add(encoded_images(rows_of([2]), ids=[2], model_sha256="b" * 64))
    with pytest.raises(InputError, match=r"codes of \[16\] bits cannot join an index of \[16, 64\]"):
        index.add(encoded_images({16: rows_of([2])[16]}, ids=[2]))
    assert len(index) == 1


def test_readers_see_the_old_state_or_the_new_one():
    """Ids 0 to 9 are replaced over and over by codes that are all one value: a torn read would mix two values."""
    values = [np.full((10, 8), value, np.uint8) for value in (0, 255)]
    short = [table[:, :2].copy() for table in values]
    others = np.arange(100, 3100)
    index = HashIndex(encoded_images({16: short[0], 64: values[0]}))
    index.add(encoded_images(random_tables(3000, (16, 64)), ids=others))
    queries = HashCodes({16: short[0][:1], 64: values[0][:1]})
    stop, problems, reads = threading.Event(), [], [0]

    def read(mode):
        while not stop.is_set():
            hits = index.search(queries, 10, mode=mode, recall=1.0, allow=np.arange(10))
            batch = next(iter(index.batches(10)))
            if hits.ids[0].tolist() != list(range(10)) or len(set(hits.distances[0].tolist())) != 1:
                problems.append(hits)
            if len(np.unique(batch.codes[64])) != 1 or batch.uris[3] != "images/3.jpg":
                problems.append(batch)
            reads[0] += 1

    threads = [threading.Thread(target=read, args=(mode,)) for mode in ("exact", "coarse", "flat")]
    for thread in threads:
        thread.start()
    for turn in range(60):
        new = {16: short[turn % 2], 64: values[turn % 2]}
        index.add(encoded_images(new), replace=True)
        index.delete(others[turn * 10 : turn * 10 + 10])
    while reads[0] < 30:
        pass
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(index) == 10 + 3000 - 600


def test_a_reader_goes_on_with_the_state_it_began_with():
    index = HashIndex(encoded_images(rows_of(np.arange(30))))
    batches = index.batches(10)
    first = next(batches)
    index.delete(np.arange(10, 30))
    assert [len(first), *(len(part) for part in batches)] == [10, 10, 10]
    assert [len(part) for part in index.batches(7)] == [7, 3]
    with pytest.raises(InputError, match="size 0"):
        next(index.batches(0))


def test_an_index_learns_again_when_it_has_doubled():
    codes = trained_codes(3000)
    index = HashIndex(encoded_images(codes))
    index.search(codes, 1, mode="coarse")
    assert list(index._state.tunings) == ["logits-64"]
    more = trained_codes(2000, seed=8)
    index.add(encoded_images(more, ids=np.arange(3000, 5000)))
    assert list(index._state.tunings) == ["logits-64"]
    index.add(encoded_images(trained_codes(2000, seed=9), ids=np.arange(5000, 7000)))
    assert not index._state.tunings
    sample = index._state.sample
    assert sample.stands_for == 7000
    assert 900 < len(sample.keys) <= 2000


@pytest.mark.parametrize("base", [0, -(2**62), 2**62])
def test_ids_of_any_size(base):
    ids = np.array([base, base + 5, base + 3, base // 2 if base else 7, -1], np.int64)
    index = HashIndex(encoded_images(rows_of(range(5)), ids=ids))
    assert index.ids.tolist() == sorted(ids.tolist())
    assert index.uris_of(ids) == [f"images/{i}.jpg" for i in ids]
    for absent in (base + 1, 2**63 - 1, -(2**63)):
        with pytest.raises(InputError, match="not in this index"):
            index.uris_of([absent])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=60), st.booleans())
def test_both_ways_to_say_where_rows_begin_agree(counts, few):
    if few:
        counts = [1] * 99 + counts[:3]
    ends = np.cumsum(counts)
    starts = ends - counts
    made = row_starts(starts, int(ends[-1]))
    repeated = np.flatnonzero(np.array(counts) > 1)
    assert isinstance(made, FewRepeated) == (16 * len(repeated) <= len(counts))
    before = np.concatenate([[0], np.cumsum(np.array(counts)[repeated] - 1)]).astype(np.uint32)
    for way in (
        made,
        ManyRepeated(np.append(starts, ends[-1]).astype(np.uint32)),
        FewRepeated(len(counts), repeated.astype(np.uint32), before),
    ):
        groups = np.arange(len(counts))
        assert (len(way), way.rows) == (len(counts), ends[-1])
        assert way.at(np.arange(len(counts) + 1)).tolist() == [*starts, ends[-1]]
        assert way.counts(groups).tolist() == counts
        assert way.groups_of(np.arange(ends[-1])).tolist() == np.repeat(groups, counts).tolist()


def test_uris_of_any_text():
    texts = ["", "ü/ß 画像.jpg", "a\nb", "x" * 70_000, "\udcff not UTF-8"]
    uris = Uris.concatenate([Uris.from_texts(texts[:2]), Uris.from_texts([]), Uris.from_texts(texts[2:])])
    assert uris.texts(np.arange(5)) == texts
    assert uris.in_order(np.array([4, 0, 3])).texts(np.arange(3)) == [texts[4], texts[0], texts[3]]


def test_codes_of_every_length_are_given_back():
    codes = trained_codes(200)
    index = HashIndex(encoded_images(codes, ids=np.arange(200)[::-1]))
    back = index.codes_of(np.arange(200)[::-1])
    assert all(np.array_equal(back[length], codes[length]) for length in LENGTHS)
