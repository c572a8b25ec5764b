from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from admth_runtime import HashRuntime, ImageError, InputError
from admth_runtime.bench import (
    GENERATED_SIZE,
    STAGES,
    SingleStream,
    StageTimes,
    generated_pictures,
    measure_latency,
    measure_single_stream,
)
from admth_runtime.bench_offline import Offline, measure_offline
from admth_runtime.bench_picture import bench_svg
from admth_runtime.encoding import TooManyUnreadableError

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def runtime(tiny_path):
    with HashRuntime(tiny_path, threads=1) as opened:
        yield opened


@pytest.fixture
def batches(runtime, monkeypatch) -> list[int]:
    """The sizes of the batches that the engine runs."""
    sizes: list[int] = []
    run = runtime.engine.run
    monkeypatch.setattr(runtime.engine, "run", lambda batch: (sizes.append(len(batch)), run(batch))[1])
    return sizes


def test_percentiles():
    times = StageTimes.of([n / 1000 for n in range(101)])
    assert (times.p50, times.p90, times.max, times.mean) == pytest.approx((50, 90, 100, 50))
    assert times.p99 == pytest.approx(99)


def test_every_stage_is_measured_and_the_whole_is_their_sum(runtime, batches):
    steps = []
    with generated_pictures() as pictures:
        times = measure_latency(runtime, pictures, batch=3, queries=5, warmup=2, advance=steps.append)
    assert tuple(times) == STAGES
    assert batches == [3] * 7
    assert sum(steps) == 7
    *parts, whole = times.values()
    assert whole.mean == pytest.approx(sum(part.mean for part in parts), rel=1e-6)
    assert all(0 < stage.p50 <= stage.p90 <= stage.p99 <= stage.max for stage in times.values())


def test_a_single_stream_of_1024_queries_conforms(runtime, batches, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    stream = measure_single_stream(runtime, [tmp_path / "a.png"], warmup=0)
    assert batches == [1] * 1024
    assert stream.queries == 1024
    assert stream.conforms
    fewer = SingleStream({stage: seconds[:1023] for stage, seconds in stream.seconds.items()})
    assert not fewer.conforms
    assert stream.times["end to end"].p90 == pytest.approx(1e3 * np.percentile(stream.seconds["end to end"], 90))


def test_offline_runs_every_stage_over_all_samples(tiny_path):
    steps = []
    with HashRuntime(tiny_path, threads=1, batch_size=8, decode_threads=2) as runtime, generated_pictures() as pictures:
        sizes = []
        run = runtime.engine.run
        runtime.engine.run = lambda batch: (sizes.append(len(batch)), run(batch))[1]
        offline = measure_offline(runtime, pictures, samples=20, advance=steps.append)
    assert tuple(offline.rates) == STAGES
    assert (offline.samples, offline.batch) == (20, 8)
    assert sum(steps) == 80
    assert sizes == [8, *[8, 8, 4], *[8, 8, 4]]  # once to warm up, on ready pixels, and end to end
    assert all(rate > 0 for rate in offline.rates.values())


def test_generated_pictures_are_the_same_every_time_and_vanish():
    with generated_pictures() as first:
        content = [path.read_bytes() for path in first]
        with Image.open(first[0]) as image:
            assert image.size == GENERATED_SIZE
            assert image.format == "JPEG"
            assert np.asarray(image).std() > 10
    assert not first[0].exists()
    with generated_pictures() as second:
        assert [path.read_bytes() for path in second] == content


@pytest.mark.parametrize("numbers", [{"batch": 0}, {"queries": 0}, {"warmup": -1}, {"batch": 33}])
def test_numbers_out_of_range(runtime, numbers):
    with pytest.raises(InputError, match=f"--{next(iter(numbers))}"):
        measure_latency(runtime, ["a.jpg"], **numbers)


def test_pictures_that_are_not_there(runtime, tmp_path):
    for measure in (measure_latency, measure_offline):
        with pytest.raises(InputError, match="no pictures"):
            measure(runtime, [])
        with pytest.raises((ImageError, TooManyUnreadableError), match="no such file"):
            measure(runtime, [tmp_path / "none.jpg"])
    with pytest.raises(InputError, match="--samples 0"):
        measure_offline(runtime, ["a.jpg"], samples=0)


class TestPicture:
    @pytest.fixture
    def stream(self) -> SingleStream:
        generator = np.random.default_rng(0)
        parts = {stage: generator.gamma(9, 1e-3, 1024) for stage in STAGES[:-1]}
        return SingleStream({**parts, STAGES[-1]: sum(parts.values())})

    @pytest.fixture
    def offline(self) -> Offline:
        return Offline(500, 32, dict(zip(STAGES, (812.0, 1410.0, 160.0, 131.0), strict=True)))

    def drawn(self, *arguments):
        root = ElementTree.fromstring(bench_svg(*arguments))
        return root, [element.text for element in root.iter(f"{SVG}text")]

    def test_it_shows_the_figures(self, stream, offline):
        root, texts = self.drawn(stream, offline, "bench <model> & more", ["a machine", "an engine"])
        times = stream.times["end to end"]
        assert texts[:3] == ["bench <model> & more", "a machine", "an engine"]
        for share, value in ((50, times.p50), (90, times.p90), (99, times.p99)):
            assert f"p{share} {value:.2f} ms" in texts
        assert "1,024 queries of one image" in texts
        assert {"812", "1,410", "160", "131"} <= set(texts)
        bars = [element for element in root.iter(f"{SVG}rect") if element.get("class") == "bar"]
        assert len(bars) == 48
        assert all(float(bar.get("height")) >= 0 for bar in bars)

    def test_everything_lies_on_the_paper(self, stream, offline):
        for shown in (offline, None):
            root, _ = self.drawn(stream, shown, "bench", ["a line " * 40])
            width, height = float(root.get("width")), float(root.get("height"))
            for element in root.iter(f"{SVG}rect"):
                x, y = float(element.get("x", 0)), float(element.get("y", 0))
                assert 0 <= x <= x + float(element.get("width")) <= width
                assert 0 <= y <= y + float(element.get("height")) <= height
            for element in root.iter(f"{SVG}text"):
                assert 0 <= float(element.get("x")) <= width
                assert 0 <= float(element.get("y")) <= height

    def test_too_few_queries_are_called_so(self, stream):
        few = SingleStream({stage: seconds[:7] for stage, seconds in stream.seconds.items()})
        _, texts = self.drawn(few, None, "bench", [])
        assert "7 queries of one image, fewer than the 1,024 that MLPerf asks for" in texts

    def test_equal_times_and_a_straggler(self):
        same = SingleStream({stage: np.full(200, 2e-3) for stage in STAGES})
        self.drawn(same, None, "bench", [])
        seconds = np.full(200, 2e-3)
        seconds[5] = 3.0
        _, texts = self.drawn(SingleStream(dict.fromkeys(STAGES, seconds)), None, "bench", [])
        assert "1 beyond, up to 3000.00 ms" in texts
