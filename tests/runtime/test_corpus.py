"""A corpus as Python meets it: its schema, its bytes, going on, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from _corpus import make_parquet, make_pictures, make_tar, part_files, picture
from _tiny_model import LENGTHS, save_tiny_model, tiny_manifest

from admth_runtime import AdmthError, HashIndex, HashRuntime, InputError, OutputError, PreprocessingSpec, read_codes
from admth_runtime.corpus import CorpusOptions, encode_corpus, read_corpus
from admth_runtime.corpus.options import default_batch
from admth_runtime.encoding import TooManyUnreadableError

ONE = CorpusOptions(workers=1, shard_size=16)


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_path) -> Path:
    """A folder of 70 pictures, two of them bad, and the corpus of them, made by two workers, with logits."""
    folder = tmp_path_factory.mktemp("corpus")
    make_pictures(folder / "pictures", 70, bad=(5, 36))
    options = CorpusOptions(workers=2, shard_size=16, batch=7, logits=True, max_error_rate=0.1)
    encode_corpus([folder / "pictures"], tiny_path, folder / "corpus", options)
    return folder


@pytest.fixture
def copied(home, tmp_path) -> Path:
    """The same corpus, to be spoilt."""
    shutil.copytree(home / "corpus", tmp_path / "corpus")
    return tmp_path / "corpus"


def again(home: Path, tiny_path: Path, folder: Path, **changes):
    options = {"workers": 1, "logits": True, "max_error_rate": 0.1, **changes}
    return encode_corpus([home / "pictures"], tiny_path, folder, CorpusOptions(**options))


class TestWhatIsWritten:
    def test_files(self, home):
        names = sorted(path.name for path in (home / "corpus").iterdir())
        parts = [name for n in range(5) for name in (f"part-0000{n}.parquet", f"part-0000{n}_stats.json")]
        assert names == [".lock", "corpus.json", "errors.parquet", "listing.parquet", *parts, "summary.json"]

    def test_schema_and_metadata(self, home, tiny_path):
        with HashRuntime(tiny_path) as runtime:
            model_sha256, spec = runtime.model_sha256, runtime.manifest.preprocessing
        for shard in range(5):
            schema = pq.read_schema(home / "corpus" / f"part-0000{shard}.parquet")
            kinds = {field.name: (field.type, field.nullable) for field in schema}
            assert kinds == {
                "id": (pa.int64(), False),
                "uri": (pa.string(), False),
                **{f"code_{n}": (pa.binary(n // 8), True) for n in LENGTHS},
                **{f"logits_{n}": (pa.list_(pa.float32(), n), True) for n in LENGTHS},
                "status": (pa.string(), False),
            }
            facts = json.loads(schema.metadata[b"admth.codes"])
            assert facts["model_sha256"] == model_sha256
            assert facts["bit_order"] == "msb"
            assert facts["preprocessing"] == spec.to_dict()
            assert facts["preprocessing_sha256"] == spec.digest()
            assert facts["shard"] == shard

    def test_every_image_of_the_listing_has_its_row_with_the_runtimes_codes(self, home, tiny_path):
        table = pa.concat_tables([pq.read_table(path) for path in sorted((home / "corpus").glob("part-*.parquet"))])
        listing = pq.read_table(home / "corpus" / "listing.parquet")
        assert table["uri"].to_pylist() == listing["uri"].to_pylist()
        ids = table["id"].to_numpy()
        assert (np.diff(ids) == 1).all()
        assert ids[0] >= 0
        assert ids[-1] < 1 << 53
        status = table["status"].to_pylist()
        assert sorted(set(status)) == ["error: is not an image that Pillow can read", "ok"]
        good = [uri for uri, state in zip(table["uri"].to_pylist(), status, strict=True) if state == "ok"]
        assert len(good) == 68
        with HashRuntime(tiny_path) as runtime:
            codes = runtime.encode(good)
        for length in LENGTHS:
            rows = [row for row in table[f"code_{length}"].to_pylist() if row is not None]
            assert rows == [code.tobytes() for code in codes[length]]
            found = [row for row in table[f"logits_{length}"].to_pylist() if row is not None]
            assert np.array_equal(np.float32(found), codes.logits[length])
        assert table["code_64"].null_count == table["logits_16"].null_count == 2

    def test_errors_stats_and_summary(self, home):
        errors = pq.read_table(home / "corpus" / "errors.parquet").to_pylist()
        assert [Path(row["uri"]).name for row in errors] == ["0005.png", "0036.png"]
        assert {row["reason"] for row in errors} == {"is not an image that Pillow can read"}
        stats = [json.loads((home / "corpus" / f"part-0000{n}_stats.json").read_text()) for n in range(5)]
        assert [each["images"] for each in stats] == [16, 16, 16, 16, 6]
        assert sum(each["errors"] for each in stats) == 2
        assert all(each["seconds"] > 0 and each["engine"].startswith("onnxruntime ") for each in stats)
        summary = json.loads((home / "corpus" / "summary.json").read_text())
        assert (summary["images"], summary["errors"], summary["parts"]) == (70, 2, 5)
        assert summary["image_bytes"] == sum(path.stat().st_size for path in (home / "pictures").rglob("*.png"))
        assert summary["part_bytes"] == sum(path.stat().st_size for path in (home / "corpus").glob("part-*.parquet"))

    def test_ids_come_from_listing_and_model(self, home, tiny_path, tmp_path):
        first = read_corpus(home / "corpus").plan.first_id
        other_model = save_tiny_model(tmp_path / "other.onnx", seed=1)
        encode_corpus([home / "pictures"], other_model, tmp_path / "a", CorpusOptions(workers=1, max_error_rate=0.1))
        encode_corpus([home / "pictures" / "sub"], tiny_path, tmp_path / "b", CorpusOptions(max_error_rate=0.1))
        assert len({first, *(read_corpus(tmp_path / name).plan.first_id for name in "ab")}) == 3

    @pytest.mark.parametrize("changes", [{"workers": 1}, {"workers": 3, "threads": 2}])
    def test_the_bytes_do_not_depend_on_the_workers(self, home, tiny_path, tmp_path, changes):
        again(home, tiny_path, tmp_path / "corpus", shard_size=16, batch=7, **changes)
        assert part_files(tmp_path / "corpus") == part_files(home / "corpus")

    def test_archives_give_the_codes_of_files(self, home, tiny_path, tmp_path):
        images = [path.read_bytes() for path in sorted((home / "pictures").glob("*.png"))]
        with HashRuntime(tiny_path) as runtime:
            files = [path for path in sorted((home / "pictures").glob("*.png")) if path.name not in ("0005.png",)]
            expected = runtime.encode(files)[64]
        tar = make_tar(tmp_path / "a.tar", {f"{n}.png": image for n, image in enumerate(images)})
        parquet = make_parquet(tmp_path / "a.parquet", images, struct=True)
        for name, source in (("t", tar), ("p", parquet)):
            encode_corpus(
                [source], tiny_path, tmp_path / name, CorpusOptions(workers=2, shard_size=9, max_error_rate=1)
            )
            assert np.array_equal(read_codes(tmp_path / name).codes[64], expected)

    def test_a_corrupt_tar_member_and_an_empty_row_are_errors_of_one_image(self, tiny_path, tmp_path):
        tar = make_tar(tmp_path / "a.tar", {"0.png": picture(0), "1.png": picture(1)[:300], "2.png": picture(2)})
        parquet = make_parquet(tmp_path / "a.parquet", [picture(3), None, b""])
        summary = encode_corpus([tar, parquet], tiny_path, tmp_path / "c", CorpusOptions(workers=1, max_error_rate=0.5))
        assert summary.errors == 3
        errors = pq.read_table(tmp_path / "c" / "errors.parquet").to_pylist()
        assert [row["uri"].rpartition("!/")[2] for row in errors] == ["1.png", "1", "2"]
        assert errors[0]["reason"].startswith("cannot be decoded (")
        assert [row["reason"] for row in errors[1:]] == [
            "its row holds no image: the column 'image' is null there",
            "is empty",
        ]


class TestReading:
    def test_all_at_once_and_part_by_part(self, home):
        corpus = read_corpus(home / "corpus")
        assert len(corpus) == 68
        assert corpus.complete
        encoded = read_codes(home / "corpus")
        assert len(encoded) == 68
        parts = list(corpus.parts())
        assert np.array_equal(np.concatenate([part.codes[48] for part in parts]), encoded.codes[48])
        assert np.array_equal(np.packbits(encoded.codes.logits[32] > 0, axis=1), encoded.codes[32])
        tables = pa.concat_tables(corpus.tables(["uri", "code_16"]))
        assert tables.column_names == ["uri", "code_16"]
        assert tables["code_16"].to_pylist() == [code.tobytes() for code in encoded.codes[16]]

    def test_a_flat_index_of_it(self, home):
        encoded = read_codes(home / "corpus")
        hits = HashIndex.load(home / "corpus").search(encoded.codes[64][7:8], 1)
        assert hits.ids[0, 0] == encoded.ids[7]

    def test_what_is_refused(self, home, copied, tmp_path):
        with pytest.raises(InputError, match=r"holds codes of another model"):
            read_corpus(copied, model_sha256="0" * 64)
        with pytest.raises(InputError, match=r"holds no corpus.json"):
            read_corpus(tmp_path)
        with pytest.raises(InputError, match=r"no such folder"):
            read_corpus(tmp_path / "none")
        shutil.copy(home / "corpus" / "part-00001.parquet", copied / "part-00000.parquet")
        with pytest.raises(InputError, match=r"part-00000.parquet belongs to another corpus"):
            read_corpus(copied)
        (copied / "part-00000.parquet").write_bytes(b"PAR1")
        with pytest.raises(InputError, match=r"part-00000.parquet is damaged: run the same encoding again"):
            read_corpus(copied)
        (copied / "part-00000.parquet").unlink()
        with pytest.raises(InputError, match=r"is not finished, 4 of 5 parts are there"):
            read_corpus(copied)
        assert len(read_corpus(copied, allow_incomplete=True)) == 53

    def test_edited_plans_are_refused(self, copied):
        path = copied / "corpus.json"
        facts = json.loads(path.read_text())
        for changes, message in (
            ({"batch": 9}, "it was edited"),
            ({"format_version": 2}, "is newer than 1"),
            ({"format_version": None}, "names no format version"),
            ({"images": "70"}, "images is '70'"),
        ):
            path.write_text(json.dumps(facts | changes))
            with pytest.raises(InputError, match=message):
                read_corpus(copied)
        path.write_text("{")
        with pytest.raises(InputError, match=r"is damaged"):
            read_corpus(copied)


class TestGoingOn:
    def test_missing_and_damaged_parts_are_made_again_and_are_the_same(self, home, tiny_path, copied):
        (copied / "part-00001.parquet").unlink()
        (copied / "part-00003.parquet").write_bytes((copied / "part-00003.parquet").read_bytes()[:-20])
        (copied / ".part-00002.abc_1.tmp.parquet").write_bytes(b"left by a kill")
        kept = (copied / "part-00000.parquet").stat().st_mtime_ns
        summary = again(home, tiny_path, copied)
        assert summary.images_encoded == 32
        assert part_files(copied) == part_files(home / "corpus")
        assert (copied / "part-00000.parquet").stat().st_mtime_ns == kept
        assert not list(copied.glob("*.tmp.*"))

    def test_a_finished_corpus_is_left_alone(self, home, tiny_path, copied):
        before = {path: path.read_bytes() for path in copied.iterdir() if path.name != ".lock"}
        assert again(home, tiny_path, copied).images_encoded == 0
        assert {path: path.read_bytes() for path in copied.iterdir() if path.name != ".lock"} == before

    def test_the_listing_stays_frozen(self, home, tiny_path, tmp_path):
        folder = make_pictures(tmp_path / "pictures", 20)
        encode_corpus([folder], tiny_path, tmp_path / "c", ONE)
        (folder / "new.png").write_bytes(picture(0))
        (tmp_path / "c" / "part-00001.parquet").unlink()
        assert encode_corpus([folder], tiny_path, tmp_path / "c", ONE).images == 20
        restarted = CorpusOptions(workers=1, shard_size=8, restart=True)
        assert encode_corpus([folder], tiny_path, tmp_path / "c", restarted).images == 21
        assert len(list((tmp_path / "c").glob("part-*.parquet"))) == 3

    def test_from_another_working_folder(self, tiny_path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        make_pictures(tmp_path / "pictures", 20)
        encode_corpus(["pictures"], tiny_path, "c", ONE)
        before = part_files(tmp_path / "c")
        (tmp_path / "c" / "part-00000.parquet").unlink()
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        encode_corpus(["../pictures"], tiny_path, "../c", ONE)
        assert part_files(tmp_path / "c") == before
        assert read_codes(tmp_path / "c").uris[0] == "pictures/0001.png"

    def test_errors_are_tried_again_when_asked(self, tiny_path, tmp_path):
        folder = make_pictures(tmp_path / "pictures", 40, bad=(7,))
        encode_corpus([folder], tiny_path, tmp_path / "c", CorpusOptions(workers=1, shard_size=16, max_error_rate=0.1))
        (folder / "0007.png").write_bytes(picture(7))
        assert encode_corpus([folder], tiny_path, tmp_path / "c", CorpusOptions(max_error_rate=0.1)).errors == 1
        retried = encode_corpus([folder], tiny_path, tmp_path / "c", CorpusOptions(retry_errors=True))
        assert (retried.errors, retried.images_encoded) == (0, 16)
        assert pq.read_table(tmp_path / "c" / "errors.parquet").num_rows == 0

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"logits": False}, "was begun with --logits: give the same again"),
            ({"batch": 8, "shard_size": 4}, "--shard-size 16, not 4 and --batch 7, not 8"),
            ({"recursive": False}, "was begun with --recursive"),
            ({"column": "jpg"}, "was begun with --column image, not jpg"),
        ],
    )
    def test_another_way_is_refused(self, home, tiny_path, copied, changes, message):
        with pytest.raises(InputError, match=message):
            again(home, tiny_path, copied, **changes)

    def test_another_model_preprocessing_or_source_is_refused_by_name(self, home, tiny_path, copied, tmp_path):
        other = save_tiny_model(tmp_path / "other.onnx", seed=1)
        with pytest.raises(InputError, match=r"another model \(SHA-256 .{12}\.\.\., not .{12}\.\.\.\): give the same"):
            again(home, other, copied)
        spec = PreprocessingSpec(12, 12, crop_fraction=0.875)
        other = save_tiny_model(tmp_path / "other.onnx", manifest=tiny_manifest(preprocessing=spec))
        with pytest.raises(
            InputError, match=r"another model .* and another preprocessing \(crop_fraction 1.0, not 0.875"
        ):
            again(home, other, copied)
        with pytest.raises(InputError, match=r"another source \(.*pictures, not .*sub\)"):
            encode_corpus([home / "pictures" / "sub"], tiny_path, copied, CorpusOptions(logits=True))

    def test_another_list_is_refused(self, home, tiny_path, tmp_path):
        lines = [str(path) for path in sorted((home / "pictures" / "sub").glob("*.png"))][:3]
        (tmp_path / "l.txt").write_text("\n".join(lines))
        encode_corpus([tmp_path / "l.txt"], tiny_path, tmp_path / "c", ONE)
        (tmp_path / "l.txt").write_text("\n".join(lines[:2]))
        with pytest.raises(InputError, match=r"another content of the list .*l.txt"):
            encode_corpus([tmp_path / "l.txt"], tiny_path, tmp_path / "c", ONE)


class TestBadInput:
    def test_too_many_unreadable_images(self, tiny_path, tmp_path):
        folder = make_pictures(tmp_path / "pictures", 50, bad=tuple(range(4)))
        with pytest.raises(
            TooManyUnreadableError, match=r"4 of 50 images cannot be read, more than --max-error-rate 0.01"
        ):
            encode_corpus([folder], tiny_path, tmp_path / "c", ONE)
        assert pq.read_table(tmp_path / "c" / "errors.parquet").num_rows == 4
        with pytest.raises(InputError, match=r"is not finished, 4 of 4 parts"):
            read_corpus(tmp_path / "c")
        accepted = encode_corpus([folder], tiny_path, tmp_path / "c", CorpusOptions(max_error_rate=0.08))
        assert (accepted.errors, accepted.images_encoded) == (4, 0)
        assert len(read_codes(tmp_path / "c")) == 46

    def test_a_hopeless_run_stops_early_and_keeps_whole_parts(self, tiny_path, tmp_path):
        folder = make_pictures(tmp_path / "pictures", 300, bad=tuple(range(100, 300)))
        options = CorpusOptions(workers=1, shard_size=32, batch=8)
        with pytest.raises(
            TooManyUnreadableError, match=r"stopped after \d+ of 300 images: \d\d cannot be read, more"
        ) as stop:
            encode_corpus([folder], tiny_path, tmp_path / "c", options)
        assert len(stop.value.unreadable) == 20
        corpus = read_corpus(tmp_path / "c", allow_incomplete=True)
        assert 1 <= len(corpus.parts_facts) < 9

    def test_nothing_readable(self, tiny_path, tmp_path):
        folder = make_pictures(tmp_path / "pictures", 3, bad=(0, 1, 2))
        with pytest.raises(TooManyUnreadableError, match=r"3 of 3 images cannot be read: there is nothing to encode"):
            encode_corpus([folder], tiny_path, tmp_path / "c", CorpusOptions(max_error_rate=1))

    def test_a_folder_that_vanished_is_no_list_of_bad_images(self, tiny_path, tmp_path):
        folder = make_pictures(tmp_path / "pictures", 20)
        encode_corpus([folder], tiny_path, tmp_path / "c", ONE)
        (tmp_path / "c" / "part-00000.parquet").unlink()
        folder.rename(tmp_path / "away")
        for _ in range(2):
            with pytest.raises(InputError, match=r"the source .*pictures has vanished"):
                encode_corpus_of_gone(folder, tiny_path, tmp_path / "c")
            folder.mkdir(exist_ok=True)  # what an unmounted disk leaves
        shutil.rmtree(folder)
        (tmp_path / "away").rename(folder)
        assert encode_corpus([folder], tiny_path, tmp_path / "c", ONE).errors == 0

    def test_a_shard_of_which_no_file_can_be_opened(self, home, tiny_path, tmp_path):
        there = [str(path) for path in sorted((home / "pictures" / "sub").glob("*.png")) if path.name != "0036.png"][
            :20
        ]
        (tmp_path / "l.txt").write_text("\n".join([*there, *(f"{tmp_path}/none/{n}.png" for n in range(20))]))
        options = CorpusOptions(workers=1, shard_size=20, max_error_rate=0.6)
        with pytest.raises(
            InputError, match=r"none of the 20 images of shard 1 can be opened .*: is their disk mounted"
        ):
            encode_corpus([tmp_path / "l.txt"], tiny_path, tmp_path / "c", options)
        assert not (tmp_path / "c" / "part-00001.parquet").exists()
        encode_corpus([tmp_path / "l.txt"], tiny_path, tmp_path / "c", CorpusOptions(workers=1, max_error_rate=1))
        errors = pq.read_table(tmp_path / "c" / "errors.parquet")
        assert errors["reason"].to_pylist() == ["cannot be opened: no such file"] * 20

    def test_an_archive_that_was_changed_or_is_gone(self, tiny_path, tmp_path):
        tar = make_tar(tmp_path / "a.tar", {f"{n}.png": picture(n) for n in range(4)})
        encode_corpus([tar], tiny_path, tmp_path / "c", CorpusOptions(workers=1, shard_size=2))
        (tmp_path / "c" / "part-00001.parquet").unlink()
        make_tar(tmp_path / "a.tar", {f"{n}.png": picture(n) for n in (3, 2, 1, 0)})
        with pytest.raises(InputError, match=r"a.tar was changed since it was listed: put the old file back"):
            encode_corpus([tar], tiny_path, tmp_path / "c")

    def test_a_folder_of_something_else(self, home, tiny_path, tmp_path):
        (tmp_path / "c").mkdir()
        (tmp_path / "c" / "thesis.tex").write_text("years")
        for options in (CorpusOptions(), CorpusOptions(restart=True)):
            with pytest.raises(OutputError, match=r"holds no corpus but 'thesis.tex': choose a new or an empty folder"):
                encode_corpus([home / "pictures"], tiny_path, tmp_path / "c", options)
        assert [path.name for path in (tmp_path / "c").iterdir()] == ["thesis.tex"]

    def test_a_corpus_that_never_began_leaves_no_folder(self, tiny_path, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match=r"no images in"):
            encode_corpus([tmp_path / "empty"], tiny_path, tmp_path / "c")
        assert not (tmp_path / "c").exists()

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"workers": 0}, "workers 0 is not a positive integer"),
            ({"shard_size": True}, "shard_size True"),
            ({"max_error_rate": 1.5}, "max_error_rate 1.5 is not between 0 and 1"),
            ({"restart": True, "retry_errors": True}, "pass one of them"),
        ],
    )
    def test_options(self, values, message):
        with pytest.raises(InputError, match=message):
            CorpusOptions(**values)

    @pytest.mark.parametrize(("side", "batch"), [(12, 32), (96, 16), (160, 4), (224, 4), (320, 1), (4096, 1)])
    def test_the_batch_that_fits_a_cpus_caches(self, side, batch):
        assert default_batch(side, side, gpu=False) == batch
        assert default_batch(side, side, gpu=True) == 32

    def test_no_source(self, tiny_path, tmp_path):
        with pytest.raises(AdmthError, match=r"no sources were given"):
            encode_corpus([], tiny_path, tmp_path / "c")


def encode_corpus_of_gone(folder: Path, model: Path, out: Path) -> None:
    """Go on with a corpus whose folder is gone: it cannot even be recognised, so make the workers meet it."""
    from admth_runtime.corpus.plan import read_plan
    from admth_runtime.corpus.shard_encoder import ShardEncoder, WorkerConfig

    assert read_plan(out).sources[0].place == str(folder)
    with ShardEncoder(WorkerConfig(str(out), str(model), "cpu", None, 1, 1, False)) as encoder:
        list(encoder.encode(0))
