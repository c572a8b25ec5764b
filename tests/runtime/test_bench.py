from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from admth_runtime import HashRuntime, ImageError, InputError
from admth_runtime.bench import GENERATED_SIZE, STAGES, StageTimes, generated_pictures, measure_latency


@pytest.fixture
def runtime(tiny_path):
    with HashRuntime(tiny_path, threads=1) as opened:
        yield opened


def test_percentiles():
    times = StageTimes.of([n / 1000 for n in range(101)])
    assert (times.p50, times.p90, times.max, times.mean) == pytest.approx((50, 90, 100, 50))
    assert times.p99 == pytest.approx(99)


def test_every_stage_is_measured_and_the_whole_is_their_sum(runtime):
    steps, batches = [], []
    run = runtime.engine.run
    runtime.engine.run = lambda batch: (batches.append(len(batch)), run(batch))[1]
    with generated_pictures() as pictures:
        times = measure_latency(runtime, pictures, batch=3, queries=5, warmup=2, advance=steps.append)
    assert tuple(times) == STAGES
    assert batches == [3] * 7
    assert sum(steps) == 7
    *parts, whole = times.values()
    assert whole.mean == pytest.approx(sum(part.mean for part in parts), rel=1e-6)
    assert all(0 < stage.p50 <= stage.p90 <= stage.p99 <= stage.max for stage in times.values())


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
    with pytest.raises(InputError, match="no pictures"):
        measure_latency(runtime, [])
    with pytest.raises(ImageError, match="no such file"):
        measure_latency(runtime, [tmp_path / "none.jpg"])
