"""Parquet and JSON lines as sinks of a pipeline."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from _tiny_model import LENGTHS

from admth_runtime import HashIndex, HashPipeline, HashRuntime, PipelineOptions, read_codes
from admth_runtime.errors import InputError, OutputError, PipelineError
from admth_runtime.pipeline import Frame, NdjsonSink, ParquetSink, next_id


@pytest.fixture(scope="module")
def runtime(tiny_path):
    with HashRuntime(tiny_path, device="cpu", threads=1, batch_size=8) as opened:
        yield opened


def with_bad_ones(pixels, every: int = 10) -> list[Frame]:
    return [
        Frame(None, f"frame {row}", 100.0 + row, "lost") if row % every == 3 else Frame(image, f"ü{row}", 100.0 + row)
        for row, image in enumerate(pixels)
    ]


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestParquet:
    def test_is_a_file_of_encoded_images(self, runtime, pixels, tmp_path):
        path = tmp_path / "codes.parquet"
        HashPipeline(runtime, with_bad_ones(pixels), ParquetSink(path, rows_per_group=20)).run()
        good = [row for row in range(len(pixels)) if row % 10 != 3]
        encoded, expected = read_codes(path), runtime.encode(pixels[good])
        assert encoded.ids.tolist() == good and encoded.uris == tuple(f"ü{row}" for row in good)
        assert encoded.model_sha256 == runtime.model_sha256
        assert encoded.preprocessing_sha256 == runtime.manifest.preprocessing.digest()
        for length in LENGTHS:
            assert np.array_equal(encoded.codes[length], expected[length])
        with pq.ParquetFile(path) as file:
            assert file.num_row_groups == 3  # batches of 8 fill groups of 24, 24 and the rest
            schema = file.schema_arrow
            table = file.read()
        assert [field.name for field in schema] == [
            "id", "uri", "code_16", "code_32", "code_48", "code_64", "status", "timestamp",
        ]  # fmt: skip
        assert all(not field.nullable for field in schema)
        assert set(table.column("status").to_pylist()) == {"ok"}
        assert table.column("timestamp").to_pylist()[1].timestamp() == 101.0
        errors = pq.read_table(tmp_path / "codes.errors.parquet").to_pylist()
        assert [row["id"] for row in errors] == [3, 13, 23, 33, 43, 53, 63]
        assert errors[0]["reason"] == "lost" and errors[0]["uri"] == "frame 3"
        assert listing(tmp_path) == ["codes.errors.parquet", "codes.parquet"]

    def test_can_be_searched(self, runtime, pixels, tmp_path):
        HashPipeline(runtime, pixels, ParquetSink(tmp_path / "codes.parquet")).run()
        hits = HashIndex.load(tmp_path / "codes.parquet").search(runtime.encode(pixels[5])[64], 1, 64)
        assert (hits.ids[0][0], hits.distances[0][0]) == (5, 0)

    def test_keeps_logits_on_request(self, runtime, pixels, tmp_path):
        HashPipeline(runtime, pixels, ParquetSink(tmp_path / "codes.parquet", logits=True)).run()
        encoded = read_codes(tmp_path / "codes.parquet")
        for length in LENGTHS:
            assert np.allclose(encoded.codes.logits[length], runtime.encode(pixels).logits[length], atol=1e-4)

    def test_no_frame_is_an_empty_file_and_errors_of_an_earlier_run_go(self, runtime, pixels, tmp_path):
        HashPipeline(runtime, with_bad_ones(pixels), ParquetSink(tmp_path / "codes.parquet")).run()
        HashPipeline(runtime, [], ParquetSink(tmp_path / "codes.parquet")).run()
        assert len(read_codes(tmp_path / "codes.parquet")) == 0
        assert listing(tmp_path) == ["codes.parquet"]

    def test_a_folder_gets_files_of_so_many_rows_and_goes_on(self, runtime, pixels, tmp_path):
        folder = tmp_path / "codes"
        assert next_id(folder) == 0
        HashPipeline(runtime, with_bad_ones(pixels), ParquetSink(folder, rows_per_file=24)).run()
        first = listing(folder)
        assert first[0] == "codes-00000.errors.parquet" and "codes-00002.parquet" in first
        assert next_id(folder) == len(pixels)
        options = PipelineOptions(first_id=next_id(folder))
        HashPipeline(runtime, pixels, ParquetSink(folder, rows_per_file=24), options).run()
        parts = [read_codes(path) for path in sorted(folder.glob("codes-?????.parquet"))]
        ids = np.concatenate([part.ids for part in parts])
        assert len(set(ids.tolist())) == len(ids) == 2 * len(pixels) - 7
        assert (np.diff(ids) > 0).all() and ids[-1] == 2 * len(pixels) - 1

    def test_a_folder_gets_a_file_after_so_many_seconds(self, runtime, pixels, tmp_path):
        sink = ParquetSink(tmp_path, seconds_per_file=0.0001)
        HashPipeline(runtime, pixels[:24], sink, PipelineOptions(batch_size=8, max_wait_ms=2000)).run()
        assert listing(tmp_path) == [f"codes-0000{number}.parquet" for number in range(3)]

    def test_errors_alone_are_kept_too(self, runtime, tmp_path):
        frames = [Frame(None, f"frame {row}", 1.0, "lost") for row in range(5)]
        HashPipeline(runtime, frames, ParquetSink(tmp_path, rows_per_file=10)).run()
        assert listing(tmp_path) == ["codes-00000.errors.parquet"]
        assert next_id(tmp_path) == 5

    def test_a_folder_gets_no_empty_file(self, runtime, tmp_path):
        HashPipeline(runtime, [], ParquetSink(tmp_path / "codes", rows_per_file=10)).run()
        assert listing(tmp_path / "codes") == []

    def test_a_source_that_fails_does_not_cost_the_rows(self, runtime, pixels, tmp_path):
        def source():
            yield from pixels
            raise OSError("cable pulled")

        with pytest.raises(PipelineError, match="cable pulled"):
            HashPipeline(runtime, source(), ParquetSink(tmp_path / "codes.parquet")).run()
        assert len(read_codes(tmp_path / "codes.parquet")) == len(pixels)

    def test_a_file_that_cannot_be_written_is_known_before_the_work(self, runtime, pixels, tmp_path):
        for path, message in (
            (tmp_path / "no" / "codes.parquet", "its folder does not exist"),
            (tmp_path / "d.parquet", "it is a folder"),
        ):
            (tmp_path / "d.parquet").mkdir(exist_ok=True)
            pipeline = HashPipeline(runtime, pixels, ParquetSink(path))
            with pytest.raises(OutputError, match=message):
                pipeline.run()
            assert not pipeline.running
        with pytest.raises(InputError, match=r"codes\.npz does not end in \.parquet"):
            ParquetSink(tmp_path / "codes.npz")
        with pytest.raises(InputError, match="rows_per_file 0 is not 1 or more"):
            ParquetSink(tmp_path, rows_per_file=0)

    def test_a_foreign_file_among_the_numbered_ones_is_named(self, tmp_path):
        (tmp_path / "codes-00003.parquet").write_text("nonsense")
        with pytest.raises(InputError, match=r"codes-00003\.parquet is damaged or was not written by a pipeline"):
            next_id(tmp_path)


class TestNdjson:
    def test_one_object_a_line(self, runtime, pixels):
        file = io.StringIO()
        HashPipeline(runtime, with_bad_ones(pixels), NdjsonSink(file)).run()
        lines = [json.loads(line) for line in file.getvalue().splitlines()]
        codes = runtime.encode(pixels)
        assert [line["id"] for line in lines] == list(range(len(pixels)))
        for row, line in enumerate(lines):
            if row % 10 == 3:
                assert line == {"id": row, "uri": f"frame {row}", "timestamp": 100.0 + row, "error": "lost"}
            else:
                assert line["codes"] == {str(length): codes.hex(length)[row] for length in LENGTHS}
                assert line["uri"] == f"ü{row}"

    def test_a_reader_that_goes_away_ends_it_quietly(self, runtime, pixels):
        class Gone(io.StringIO):
            def write(self, text: str) -> int:
                raise BrokenPipeError

        sink = NdjsonSink(Gone())
        HashPipeline(runtime, pixels, sink).run()
        assert sink.reader_gone
