from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from _codes import LENGTHS, encoded_images, random_tables, trained_codes

from admth_runtime import HashIndex, InputError, OutputError, write_codes
from admth_runtime.index import add_sources, build_index, describe_index, is_index, verify_files
from admth_runtime.index import building as building_module
from admth_runtime.index.arrays_file import read_arrays, write_arrays

QUERIES = trained_codes(5, seed=3)


@pytest.fixture
def saved(tmp_path):
    index = HashIndex(encoded_images(trained_codes(400), model_sha256="d" * 64))
    index.add_multi_index()
    index.save(tmp_path / "photos.index")
    return tmp_path / "photos.index"


def equal(one, other):
    for mode in ("exact", "flat", "multi-index", "coarse"):
        a, b = (index.search(QUERIES, 9, mode=mode, rerank="asymmetric") for index in (one, other))
        if not (np.array_equal(a.ids, b.ids) and np.array_equal(a.scores, b.scores)):
            return False
    return one.uris == other.uris and one.model_sha256 == other.model_sha256


@pytest.mark.parametrize("memory_map", [True, False])
def test_loaded_equals_saved(saved, memory_map):
    index = HashIndex(encoded_images(trained_codes(400), model_sha256="d" * 64))
    index.add_multi_index()
    loaded = HashIndex.load(saved, memory_map=memory_map)
    assert equal(index, loaded)
    assert set(loaded._state.tunings) == {"logits-64", "distance-64"}  # learnt before it was saved
    assert loaded._state.sample.stands_for == 400
    words = loaded._state.slots[0].segment.words[64]
    assert words.flags.writeable != memory_map


def test_a_change_writes_only_what_is_new(saved):
    index = HashIndex.load(saved)
    before = {path.name: path.stat().st_ino for path in saved.iterdir()}
    index.add(encoded_images(trained_codes(50, seed=4), ids=np.arange(1000, 1050)))
    index.delete([3, 1001])
    index.save(saved)
    after = {path.name: path.stat().st_ino for path in saved.iterdir()}
    kept = {name for name in before if name.startswith(("segment", "names", "tables"))}
    assert kept <= set(after)
    assert all(before[name] == after[name] for name in kept)
    assert equal(HashIndex.load(saved), index)
    index.compact()
    index.save(saved)
    names = {path.name.split("-")[0] for path in saved.iterdir()}
    assert names == {"segment", "names", "tables", "tuning", "index.json", ".lock"}
    assert len(list(saved.glob("segment-*"))) == 1
    assert equal(HashIndex.load(saved), index)
    assert describe_index(saved)["images"] == 448
    assert verify_files(saved) == 4


def test_an_old_reader_goes_on_after_a_save(saved):
    reader, writer = HashIndex.load(saved), HashIndex.load(saved)
    expected = reader.search(QUERIES, 400)
    writer.delete(np.arange(300))
    writer.save(saved)
    assert np.array_equal(reader.search(QUERIES, 400).ids, expected.ids)
    reader.delete([0])
    with pytest.raises(OutputError, match="saved since or by others: load it again, then change it"):
        reader.save(saved)
    assert len(HashIndex.load(saved)) == 100


def test_an_index_is_not_written_over_something_else(saved, tmp_path):
    index = HashIndex(encoded_images(trained_codes(10)))
    with pytest.raises(OutputError, match="holds an index that was saved since or by others: remove it first"):
        index.save(saved)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"mine is not empty, it holds thesis.tex"):
        index.save(tmp_path / "mine")
    assert sorted(p.name for p in (tmp_path / "mine").iterdir() if p.name != ".lock") == ["thesis.tex"]
    with pytest.raises(OutputError, match="cannot create the folder"):
        index.save(tmp_path / "mine" / "thesis.tex" / "x")


def test_copies_are_indexes_of_their_own(saved, tmp_path):
    index = HashIndex.load(saved)
    index.save(tmp_path / "copy")
    index.delete([0])
    index.save(tmp_path / "copy")
    assert (len(HashIndex.load(saved)), len(HashIndex.load(tmp_path / "copy"))) == (400, 399)


def test_an_empty_index_is_saved(tmp_path):
    index = HashIndex(encoded_images({16: np.empty((0, 2), np.uint8), 64: np.empty((0, 8), np.uint8)}))
    index.save(tmp_path / "empty")
    back = HashIndex.load(tmp_path / "empty")
    assert (len(back), back.code_lengths, back.ids.tolist(), back.uris) == (0, (16, 64), [], ())
    back.add(encoded_images(random_tables(4, (16, 64))))
    back.save(tmp_path / "empty")
    assert len(HashIndex.load(tmp_path / "empty")) == 4


def edit(path, **changes):
    facts = json.loads((path / "index.json").read_text())
    (path / "index.json").write_text(json.dumps(facts | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bit_order": "lsb"}, "its bit order 'lsb' is not 'msb'"),
        ({"format_version": 2}, r"format version 2 is not 1, which this admth reads: run  pip install -U admth"),
        ({"format": "other"}, "is not of an admth index"),
        ({"images": 399}, "holds 400 images, not the 399 that index.json says"),
        ({"code_lengths": [16, 64]}, r"has code lengths \[16, 32, 48, 64\], not \[16, 64\]"),
        ({"segments": None}, "is malformed"),
        ({"code_lengths": [12]}, "code length 12 is not a positive multiple of 8"),
    ],
)
def test_a_changed_manifest(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(InputError, match=message):
        HashIndex.load(saved)


def test_broken_files_are_named(saved):
    segment = next(saved.glob("segment-*"))
    whole = segment.read_bytes()
    for size in (0, 5, 30, 300, len(whole) // 2, len(whole) - 1):
        segment.write_bytes(whole[:size])
        with pytest.raises(
            InputError, match=rf"the index file .*{segment.name} is unusable, .*: build the index again"
        ):
            HashIndex.load(saved)
    segment.write_bytes(whole + b"x")
    with pytest.raises(InputError, match="bytes"):
        HashIndex.load(saved)
    segment.write_bytes(whole)
    names = next(saved.glob("names-*"))
    flipped = bytearray(names.read_bytes())
    flipped[-99] ^= 1  # within the uris: no search goes wrong, but a check finds it
    names.write_bytes(flipped)
    HashIndex.load(saved)
    with pytest.raises(InputError, match=rf"the index file .*{names.name} is damaged"):
        verify_files(saved)
    segment.unlink()
    with pytest.raises(InputError, match="it is missing"):
        HashIndex.load(saved)
    (saved / "index.json").write_text("{")
    with pytest.raises(InputError, match=r"index\.json is not JSON"):
        HashIndex.load(saved)


def test_headers_that_lie_are_refused(tmp_path):
    path = tmp_path / "x.admth"
    write_arrays(path, {"a": np.arange(9, dtype=np.uint32)}, {"k": 1})
    file = read_arrays(path, {"a": "<u4"})
    assert (file.arrays["a"].tolist(), file.facts) == (list(range(9)), {"k": 1})
    assert not file.arrays["a"].flags.writeable
    file.release()
    assert file.arrays["a"].tolist() == list(range(9))
    whole = path.read_bytes()
    for old, new in (
        (b'"<u4"', b'"|O8"'),
        (b"[9]", b"[-1"),
        (b"[9]", b"[99"),
        (b'"size"', b'"sizf"'),
        (b"ADMTH", b"OTHER"),
    ):
        path.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(InputError, match="is unusable"):
            read_arrays(path)
    path.write_bytes(whole)
    with pytest.raises(InputError, match="lacks the array b of <u4"):
        read_arrays(path, {"b": "<u4"})


class TestSources:
    @pytest.fixture
    def sources(self, tmp_path):
        parts = np.array_split(np.arange(300), 3)
        codes = trained_codes(300)
        for number, rows in enumerate(parts):
            part = type(codes)({n: t[rows] for n, t in codes.items()}, {n: t[rows] for n, t in codes.logits.items()})
            suffix = "npz" if number else "parquet"
            write_codes(tmp_path / f"{number}.{suffix}", encoded_images(part, ids=rows, model_sha256="e" * 64))
        return [tmp_path / "0.parquet", tmp_path / "1.npz", tmp_path / "2.npz"]

    @pytest.mark.parametrize("most_rows", [50, 1 << 24])
    def test_several_files_make_one_index(self, sources, tmp_path, most_rows, monkeypatch):
        monkeypatch.setattr(building_module, "_MOST_ROWS", most_rows)
        read = []
        index = build_index(sources, tmp_path / "all.index", multi_index=True, advance=read.append)
        whole = HashIndex(encoded_images(trained_codes(300), model_sha256="e" * 64))
        assert read == [100, 100, 100]
        assert is_index(tmp_path / "all.index")
        assert index.facts()["segments"] == (3 if most_rows == 50 else 1)
        found, expected = (each.search(QUERIES, 20) for each in (index, whole))
        assert np.array_equal(found.ids, expected.ids)
        assert index.uris == whole.uris
        assert index.facts()["sampled_logits"] == 300
        with pytest.raises(OutputError, match="holds an index already: choose another --out"):
            build_index(sources, tmp_path / "all.index")

    def test_added_ones_keep_or_change_their_ids(self, sources, tmp_path):
        index = build_index(sources[:1], tmp_path / "some.index")
        assert add_sources(index, sources[1:]) == 200
        with pytest.raises(InputError, match="100 ids are in the index already, 0 first"):
            add_sources(index, sources[:1])
        assert len(index) == 300
        add_sources(index, sources[:2], renumber=True)
        assert index.ids.tolist() == list(range(500))
        assert index.uris_of([300, 499]) == ["images/0.jpg", "images/199.jpg"]
        add_sources(index, sources[:1], replace=True)
        assert len(index) == 500

    def test_of_two_models_are_refused(self, sources, tmp_path):
        write_codes(tmp_path / "other.npz", encoded_images(trained_codes(3), model_sha256="f" * 64))
        with pytest.raises(InputError, match=r"other.npz is of the model ffffffffffff\.\.\."):
            build_index([*sources, tmp_path / "other.npz"], tmp_path / "mixed.index")
        assert not (tmp_path / "mixed.index").exists()
        with pytest.raises(InputError, match="no such file"):
            build_index([tmp_path / "absent.npz"], tmp_path / "mixed.index")


KILLED = """
import sys, numpy as np
sys.path.insert(0, {tests!r})
from _codes import encoded_images, trained_codes
from admth_runtime import HashIndex
index = HashIndex.load({folder!r})
print("ready", flush=True)
first = 10_000
while True:
    index.add(encoded_images(trained_codes(20, seed=first), ids=np.arange(first, first + 20)))
    index.delete(np.arange(first, first + 3))
    index.save({folder!r})
    first += 20
"""


def test_killed_while_saving_it_is_the_old_index_or_the_new_one(saved):
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(saved))
    for turn in range(6):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.07 * turn)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        index = HashIndex.load(saved)
        verify_files(saved)
        assert (len(index) - 400) % 17 == 0
        assert len(index.uris) == len(index)
        index.delete(index.ids[index.ids >= 10_000])
        index.save(saved)  # also removes what the kill left
        assert not list(saved.glob(".*.tmp.*"))
    assert set(HashIndex.load(saved).code_lengths) == set(LENGTHS)
