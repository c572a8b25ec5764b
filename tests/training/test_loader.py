"""Pixels in batches: the same cached and on the fly, bounded, and unharmed by broken images."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from PIL import Image

from admth_runtime.errors import DataError, ImageError, InputError
from admth_runtime.preprocessing import PreprocessingSpec, preprocess
from admth_training.data import ArraySource, ImageDataset, PathSource
from admth_training.data import memory as memory_module
from admth_training.data.dataset import one_hot
from admth_training.data.memory import available_memory_bytes
from admth_training.loader import PixelLoader, default_workers

SPEC = PreprocessingSpec(16, 16)
BROKEN = {3: b"", 40: b"no image", 77: None}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """120 files of mixed kinds and sizes; :data:`BROKEN` names those that are broken (None: missing)."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    paths = []
    for number in range(120):
        path = folder / f"{number:03}.{('png', 'jpg', 'bmp')[number % 3]}"
        if number in BROKEN:
            if BROKEN[number] is not None:
                path.write_bytes(BROKEN[number])
        else:
            size = rng.integers(10, 60, 2)
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        paths.append(path)
    labels = one_hot(np.arange(120) % 3, 3)
    return ImageDataset("pictures", labels, ("a", "b", "c"), PathSource(tuple(paths), tuple(p.name for p in paths)))


GOOD = np.asarray([i for i in range(120) if i not in BROKEN])


def collect(loader, order=None, batch_size=7):
    return list(loader.batches(order, batch_size))


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for field in ("pixels", "labels", "indices"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


@pytest.mark.parametrize("indices", [GOOD, np.arange(120)], ids=["good", "some broken"])
def test_cached_and_on_the_fly_are_equal_for_any_number_of_workers(pictures, indices):
    order = np.random.default_rng(1).permutation(len(indices))
    results = []
    for workers, limit in ((1, 0), (4, 0), (1, None), (4, None)):
        loader = PixelLoader(pictures, indices, SPEC, workers=workers, memory_limit_bytes=limit, max_broken_rate=0.05)
        loader.prepare()
        assert loader.cached == (limit is None)
        results.append(collect(loader, order))
        assert [image.index for image in loader.broken] == sorted(set(indices) & set(BROKEN))
    for other in results[1:]:
        assert_equal(results[0], other)


def test_batches_hold_what_preprocessing_gives(pictures):
    loader = PixelLoader(pictures, GOOD, SPEC)
    loader.prepare()
    batches = collect(loader, [5, 2, 5], batch_size=2)
    assert [len(batch) for batch in batches] == [2, 1]
    first = batches[0]
    assert first.indices.tolist() == [GOOD[5], GOOD[2]] and first.indices.dtype == np.int64
    assert first.pixels.dtype == np.uint8 and first.pixels.shape == (2, 16, 16, 3)
    for row, index in enumerate(first.indices):
        np.testing.assert_array_equal(first.pixels[row], preprocess(pictures.sources.path(index), SPEC))
        np.testing.assert_array_equal(first.labels[row], pictures.labels[index])
    np.testing.assert_array_equal(batches[1].pixels[0], first.pixels[0])


def test_arrays_are_loaded_too():
    images = np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8)
    dataset = ImageDataset("a", one_hot(np.arange(9) % 2, 2), ("x", "y"), ArraySource(images, (("a", 9),)))
    loader = PixelLoader(dataset, np.arange(9), PreprocessingSpec(28, 28))
    loader.prepare()
    np.testing.assert_array_equal(np.concatenate([b.pixels for b in collect(loader)])[..., 1], images)


def test_an_order_may_be_empty(pictures):
    assert collect(PixelLoader(pictures, GOOD, SPEC), []) == []


def test_broken_images_are_named_with_reasons(pictures, capsys):
    loader = PixelLoader(pictures, np.arange(120), SPEC, max_broken_rate=0.025)
    loader.prepare()
    reasons = {image.index: (image.path, image.reason) for image in loader.broken}
    assert reasons[3] == (str(pictures.sources.path(3)), "is empty")
    assert "not an image" in reasons[40][1] and "no such file" in reasons[77][1]
    error = capsys.readouterr().err
    assert error.startswith("warning: 3 of 120 images are broken and left out: ") and error.count("\n") == 1


def test_on_the_fly_a_broken_image_is_warned_of_once(pictures, capsys):
    loader = PixelLoader(pictures, np.arange(120), SPEC, max_broken_rate=0.025, memory_limit_bytes=1000)
    loader.prepare()
    assert "120 images take 0 MiB decoded" in capsys.readouterr().err and loader.broken == []
    for _ in range(2):
        assert sum(len(batch) for batch in collect(loader)) == 117
    assert capsys.readouterr().err.count("warning") == 1


@pytest.mark.parametrize("limit", [0, None], ids=["on the fly", "cached"])
def test_more_than_one_percent_broken_stops(pictures, limit):
    loader = PixelLoader(pictures, np.arange(120), SPEC, memory_limit_bytes=limit)
    with pytest.raises(DataError, match=r"of 120 images are broken, more than 1\.0%.*003\.png \(is empty\)") as caught:
        loader.prepare()
        collect(loader)
    assert "\n" not in str(caught.value) and not loader.cached


def test_one_percent_broken_passes(pictures):
    loader = PixelLoader(pictures, np.asarray([3, *GOOD[:99]]), SPEC)
    loader.prepare()
    assert len(loader.broken) == 1 and sum(len(batch) for batch in collect(loader)) == 99


def test_a_batch_of_broken_images_is_passed_over(pictures):
    for limit in (0, None):
        loader = PixelLoader(pictures, np.arange(120), SPEC, memory_limit_bytes=limit, max_broken_rate=1.0)
        loader.prepare()
        assert [batch.indices.tolist() for batch in collect(loader, [3, 77, 4], batch_size=2)] == [[4]]


def test_decoding_ahead_is_bounded_and_stops_with_the_consumer(pictures):
    started = []
    lock = threading.Lock()

    class Counting(ImageDataset):
        def load(self, index, spec):
            with lock:
                started.append(index)
            return super().load(index, spec)

    dataset = Counting("c", pictures.labels, pictures.class_names, pictures.sources)
    loader = PixelLoader(dataset, np.tile(GOOD, 10), SPEC, workers=2, memory_limit_bytes=0)
    before = threading.active_count()
    batches = loader.batches(None, 8)
    next(batches)
    time.sleep(0.3)
    # The batch that was given, and two that are decoded ahead.
    assert len(started) <= 3 * 8
    batches.close()
    assert len(started) <= 3 * 8 and threading.active_count() == before


def test_an_unexpected_error_in_a_worker_comes_out(pictures):
    class Failing(ImageDataset):
        def load(self, index, spec):
            if index == 5:
                raise ZeroDivisionError("a bug")
            return super().load(index, spec)

    dataset = Failing("f", pictures.labels, pictures.class_names, pictures.sources)
    for limit in (0, None):
        loader = PixelLoader(dataset, GOOD, SPEC, memory_limit_bytes=limit)
        with pytest.raises(ZeroDivisionError):
            loader.prepare()
            collect(loader)


def test_prepare_decodes_once(pictures, monkeypatch):
    loader = PixelLoader(pictures, GOOD, SPEC)
    loader.prepare()
    monkeypatch.setattr(ImageDataset, "load", lambda *_: pytest.fail("decoded again"))
    loader.prepare()
    assert sum(len(batch) for batch in collect(loader)) == len(GOOD)
    assert loader.needed_bytes == len(GOOD) * 16 * 16 * 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"indices": np.asarray([], np.int64)}, "not integers"),
        ({"indices": np.asarray([0.5])}, "not integers"),
        ({"indices": np.asarray([120])}, "leave the 120 images"),
        ({"indices": np.asarray([-1])}, "leave the 120 images"),
        ({"workers": 0}, "workers 0"),
        ({"memory_limit_bytes": -1}, "-1 bytes is negative"),
        ({"max_broken_rate": 1.5}, "1.5 is not from 0 to 1"),
    ],
)
def test_bad_arguments(pictures, fields, message):
    arguments = {"indices": GOOD, **fields}
    with pytest.raises(InputError, match=message):
        PixelLoader(pictures, arguments.pop("indices"), SPEC, **arguments)


@pytest.mark.parametrize(
    ("order", "batch_size", "message"),
    [
        ([0], 0, "batch size 0"),
        ([117], 1, "leaves the 117 images"),
        ([-1], 1, "leaves the 117 images"),
        ([0.0], 1, "not integers"),
        ([[0]], 1, "not integers"),
    ],
)
def test_bad_orders_are_refused_before_any_work(pictures, order, batch_size, message):
    with pytest.raises(InputError, match=message):
        PixelLoader(pictures, GOOD, SPEC).batches(order, batch_size)


def test_memory_and_workers_are_plausible():
    assert 1 << 20 < available_memory_bytes() < 1 << 50
    assert 1 <= default_workers() <= 8


def test_a_container_limits_the_memory(tmp_path, monkeypatch):
    free = available_memory_bytes()
    (tmp_path / "max").write_text("1000000\n")
    (tmp_path / "current").write_text("700000\n")
    (tmp_path / "stat").write_text("anon 1\ninactive_file 200000\n")
    files = tuple(str(tmp_path / name) for name in ("max", "current", "stat"))
    monkeypatch.setattr(memory_module, "_CGROUP_V2", files)
    assert available_memory_bytes() == 500_000
    (tmp_path / "max").write_text("max\n")
    assert available_memory_bytes() > min(free // 2, 500_000)


def test_image_errors_alone_count_as_broken(pictures):
    with pytest.raises(ImageError):
        pictures.load(3, SPEC)
