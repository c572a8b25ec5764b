"""Splits: drawn, described, stored; and the leakage check."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from admth_runtime.errors import DataError, InputError
from admth_training.data import ArraySource, ImageDataset, PathSource
from admth_training.data.dataset import one_hot
from admth_training.leakage import check_leakage
from admth_training.splits import Splits, choose_splits, make_splits, read_splits, write_splits


def array_dataset(classes, *, labels=None, official=None, images=None):
    classes = np.asarray(classes)
    labels = one_hot(classes, int(classes.max()) + 1) if labels is None else labels
    if images is None:
        images = np.random.default_rng(0).integers(0, 256, (len(classes), 4, 4), dtype=np.uint8)
    names = tuple(f"c{i}" for i in range(labels.shape[1]))
    return ImageDataset("toy", labels, names, ArraySource(images, (("toy", len(classes)),)), official)


def ints(*values):
    return np.asarray(values, dtype=np.int64)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=2, max_size=5),
    query=st.integers(1, 10),
    train=st.integers(1, 20),
    seed=st.integers(0, 5),
    inside=st.booleans(),
)
def test_drawn_splits_hold_what_they_promise(counts, query, train, seed, inside):
    classes = np.repeat(np.arange(len(counts)), counts)
    dataset = array_dataset(classes)
    try:
        splits = make_splits(dataset, query_size=query, train_size=train, seed=seed, train_in_database=inside)
    except DataError:
        assert query + train > len(classes) - (not inside)
        return
    assert (len(splits.query), len(splits.train)) == (query, train)
    everything = set(range(len(classes)))
    used, train_set, database = set(splits.query), set(splits.train), set(splits.database)
    assert not used & (train_set | database)
    assert database == (everything - used if inside else everything - used - train_set)
    assert train_set <= database if inside else not train_set & database
    again = make_splits(dataset, query_size=query, train_size=train, seed=seed, train_in_database=inside)
    for name in ("query", "train", "database"):
        np.testing.assert_array_equal(getattr(splits, name), getattr(again, name))
    # No class gives two more queries than another that still had some to give beside the one that it keeps.
    drawn = np.bincount(classes[splits.query], minlength=len(counts))
    if sum(count - 1 for count in counts) >= query:
        assert all(d <= c - 1 for d, c in zip(drawn, counts, strict=True))
        for a, count in zip(drawn, counts, strict=True):
            assert a >= min(drawn.max() - 1, count - 1)


def test_single_label_draws_are_balanced_and_depend_on_the_seed():
    dataset = array_dataset(np.arange(200) % 4)
    one, two = (make_splits(dataset, query_size=40, train_size=60, seed=seed) for seed in (1, 2))
    assert dataset.labels[one.query].sum(axis=0).tolist() == [10] * 4
    assert dataset.labels[one.train].sum(axis=0).tolist() == [15] * 4
    assert one.query.tolist() != two.query.tolist() and one.seed == 1 and one.origin == "drawn"
    assert one.describe() == (
        "40 queries, 60 training images (inside the database), database of 160, drawn with seed 1"
    )


def test_multi_label_draws_are_uniform():
    labels = np.ones((50, 3), np.uint8)
    labels[:40, 2] = 0
    splits = make_splits(array_dataset(np.zeros(50, int), labels=labels), query_size=10, train_size=20, seed=0)
    assert len(splits.query) == 10 and len(splits.database) == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_size": 0}, "query size 0 is not positive"),
        ({"train_size": -1}, "train size -1 is not positive"),
        ({"query_size": 30}, "30 queries and 5 training images exceed the 20 images"),
        ({"query_size": 10, "train_size": 11}, "exceed the 20 images"),
        ({"query_size": 10, "train_size": 10, "train_in_database": False}, "leave no database"),
    ],
)
def test_sizes_that_do_not_fit(arguments, message):
    dataset = array_dataset(np.arange(20) % 2)
    with pytest.raises(DataError, match=message):
        make_splits(dataset, **{"query_size": 5, "train_size": 5, "seed": 0, **arguments})


def test_negative_seed():
    with pytest.raises(InputError, match="seed -1"):
        make_splits(array_dataset(np.arange(20) % 2), query_size=1, train_size=1, seed=-1)


def test_choose_splits_prefers_official_ones_and_fills_in_sizes():
    official = Splits(query=ints(0), train=ints(1, 2), database=ints(1, 2, 3))
    dataset = array_dataset(np.arange(100) % 4, official=official)
    assert choose_splits(dataset) is official
    assert "of them" not in official.describe() and official.origin == "official"
    assert choose_splits(dataset, query_size=8, seed=3).seed == 3
    outside = choose_splits(dataset, train_in_database=False)
    assert not np.isin(outside.train, outside.database).any() and len(outside.database)
    plain = array_dataset(np.arange(100) % 4)
    splits = choose_splits(plain)
    assert (len(splits.query), len(splits.train), len(splits.database)) == (10, 90, 90)
    with pytest.raises(DataError, match="exceed the 100 images"):
        choose_splits(plain, query_size=100)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"query": np.asarray([0.5])}, InputError, "query indices of dtype float64"),
        ({"train": ints()}, DataError, "train split is empty"),
        ({"database": ints(1, 1)}, DataError, "names an image twice"),
    ],
)
def test_splits_are_checked_when_they_are_made(fields, error, message):
    with pytest.raises(error, match=message):
        Splits(**{"query": ints(0), "train": ints(1), "database": ints(1, 2), **fields})


def test_official_splits_must_fit_the_data_set():
    with pytest.raises(DataError, match="database split names image 9, but the data set has images 0 to 3"):
        array_dataset([0, 1, 0, 1], official=Splits(query=ints(0), train=ints(1), database=ints(9)))


def test_partly_inside_is_described():
    text = Splits(query=ints(0), train=ints(1, 2), database=ints(2, 3)).describe()
    assert "2 training images (1 of them inside the database)" in text


# --- splits.json ------------------------------------------------------------------------------------------------------


def test_splits_survive_a_file(tmp_path):
    dataset = array_dataset(np.arange(40) % 4)
    splits = make_splits(dataset, query_size=4, train_size=8, seed=7)
    write_splits(tmp_path / "splits.json", splits, dataset)
    read = read_splits(tmp_path / "splits.json", dataset)
    for name in ("query", "train", "database"):
        np.testing.assert_array_equal(getattr(read, name), getattr(splits, name))
        assert getattr(read, name).dtype == np.int64
    assert read.seed == 7
    fields = json.loads((tmp_path / "splits.json").read_text())
    assert fields["dataset"] == "toy" and fields["listing_sha256"] == dataset.listing_digest()


def test_splits_of_another_data_set_are_refused(tmp_path):
    dataset = array_dataset(np.arange(40) % 4)
    write_splits(tmp_path / "s.json", make_splits(dataset, query_size=4, train_size=8, seed=7), dataset)
    other = array_dataset((np.arange(40) + 1) % 4)
    with pytest.raises(DataError, match="is another listing: draw the splits again"):
        read_splits(tmp_path / "s.json", other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("query"), "no splits file"),
        (lambda f: f.update(format_version=2), "format version 2"),
        (lambda f: f.update(query=[99]), "malformed .*image 99"),
        (lambda f: f.update(query=["a"]), "malformed"),
        (lambda f: f.update(query=[]), "malformed .*empty"),
        (lambda f: f.update(query=[[1]]), "malformed"),
        (lambda f: f.update(train=[2**70]), "malformed"),
    ],
)
def test_broken_splits_files(tmp_path, change, message):
    dataset = array_dataset(np.arange(40) % 4)
    path = tmp_path / "s.json"
    write_splits(path, make_splits(dataset, query_size=4, train_size=8, seed=7), dataset)
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(DataError, match=message):
        read_splits(path, dataset)


def test_missing_and_garbled_splits_files(tmp_path):
    dataset = array_dataset([0, 1])
    with pytest.raises(DataError, match="no such file"):
        read_splits(tmp_path / "s.json", dataset)
    (tmp_path / "s.json").write_bytes(b"\xff{")
    with pytest.raises(DataError, match="is not JSON"):
        read_splits(tmp_path / "s.json", dataset)
    (tmp_path / "s.json").write_text("[]")
    with pytest.raises(DataError, match="no splits file"):
        read_splits(tmp_path / "s.json", dataset)
    with pytest.raises(DataError, match="cannot be read"):
        read_splits(tmp_path, dataset)


# --- leakage ----------------------------------------------------------------------------------------------------------


def test_shared_indices_are_an_error():
    dataset = array_dataset(np.arange(8) % 2)
    for fields in ({"database": ints(1, 2)}, {"train": ints(2, 3)}):
        splits = Splits(**{"query": ints(0, 2), "train": ints(4), "database": ints(4, 5), **fields})
        with pytest.raises(DataError, match=rf"1 images are in both query and {next(iter(fields))}, such as toy\[2\]"):
            check_leakage(dataset, splits)


def test_identical_arrays_are_counted_with_examples():
    images = np.arange(8 * 16, dtype=np.uint8).reshape(8, 4, 4)
    images[5], images[6], images[7] = images[0], images[0], images[1]
    dataset = array_dataset(np.arange(8) % 2, images=images)
    splits = Splits(query=ints(0, 1, 2), train=ints(3, 5), database=ints(4, 5, 6, 7))
    report = check_leakage(dataset, splits)
    assert (report.identical_queries, report.identical_in_train, report.train_in_database) == (2, 1, 1)
    assert report.examples == (("toy[0]", "toy[5]"), ("toy[0]", "toy[6]"), ("toy[1]", "toy[7]"))
    assert report.facts() == ["1 of 2 training images are in the database"]
    assert report.warnings() == [
        "2 of 3 queries are identical to a database or training image (1 to a training image), "
        "such as toy[0] and toy[5]"
    ]
    assert json.loads(json.dumps(report.to_dict()))["examples"][0] == ["toy[0]", "toy[5]"]
    unchecked = check_leakage(dataset, splits, content=False)
    assert unchecked.identical_queries == 0 and not unchecked.content_checked


def file_dataset(paths):
    labels = one_hot(np.arange(len(paths)) % 2, 2)
    return ImageDataset("files", labels, ("a", "b"), PathSource(tuple(paths), tuple(path.name for path in paths)))


def test_one_file_under_two_names_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"one"), (tmp_path / "b.png").write_bytes(b"two")
    splits = Splits(query=ints(0), train=ints(1), database=ints(1, 2))
    for link in ("soft.png", "hard.png"):
        (os.symlink if link == "soft.png" else os.link)(tmp_path / "a.png", tmp_path / link)
        dataset = file_dataset([tmp_path / "a.png", tmp_path / "b.png", tmp_path / link])
        with pytest.raises(DataError, match=rf"a\.png and database or training image .*{link} are the same file"):
            check_leakage(dataset, splits)


def test_identical_and_unreadable_files(tmp_path):
    for name, content in (("q0", b"same"), ("q1", b"none"), ("d0", b"same"), ("d1", b"other")):
        (tmp_path / name).write_bytes(content)
    dataset = file_dataset([tmp_path / name for name in ("q0", "q1", "d0", "d1", "missing")])
    report = check_leakage(dataset, Splits(query=ints(0, 1), train=ints(3), database=ints(2, 3, 4)))
    assert (report.identical_queries, report.identical_in_train, report.unreadable) == (1, 0, 1)
    assert report.examples == ((str(tmp_path / "q0"), str(tmp_path / "d0")),)
    assert any("1 files could not be read" in line for line in report.warnings())
