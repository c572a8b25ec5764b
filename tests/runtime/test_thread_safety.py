"""One runtime in many threads: the same codes, no growing memory, and an end that lets calls in flight end well."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from _tiny_model import SIZE
from PIL import Image

from admth_runtime import HashRuntime, ImageError, InputError
from admth_runtime.decode_threads import DecodeThreads
from admth_runtime.in_flight import CallGate

CALLS = 100_000
GROWTH_KIB = 2048


@pytest.fixture
def runtime(tiny_path):
    with HashRuntime(tiny_path, threads=1, batch_size=8, decode_threads=3) as opened:
        yield opened


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(3)
    paths = [folder / f"{number:02}.{'jpg' if number % 2 else 'png'}" for number in range(20)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (33, 41, 3), dtype=np.uint8)).save(path)
    return paths


def same(a, b) -> bool:
    return all(
        np.array_equal(a[length], b[length]) and np.array_equal(a.logits[length], b.logits[length]) for length in a
    )


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="this system does not say how much memory is resident"
)
def test_sixteen_threads_and_100_000_calls_neither_differ_nor_grow(tiny_path, files):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("_endurance.py"), tiny_path, files[0].parent, str(CALLS)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert found["wrong"] == []
    warm, *later = found["resident_kib"]
    assert len(later) == 9
    assert max(later) - warm <= GROWTH_KIB, found["resident_kib"]


class TestDecodingInThreads:
    def test_the_results_are_those_of_one_thread(self, tiny_path, files, runtime):
        with HashRuntime(tiny_path, threads=1, batch_size=8, decode_threads=1) as serial:
            for images in (files, files[:1], files[:9], [str(path) for path in files]):
                assert same(runtime.encode(images), serial.encode(images))
                assert same(runtime.encode(iter(images)), serial.encode(images))
            mixed = [files[0], Image.open(files[1]), np.asarray(Image.open(files[2]).convert("RGB")), files[3]]
            assert same(runtime.encode(mixed), serial.encode(files[:4]))
        assert runtime.decode_threads == 3

    def test_files_are_decoded_side_by_side_and_one_alone_is_not(self, runtime, files, monkeypatch):
        names = []
        from admth_runtime import runtime as module

        real = module.preprocess
        meeting = threading.Barrier(3, timeout=20)

        def slow(image, spec):
            names.append(threading.current_thread().name)
            if len(names) <= 3:
                meeting.wait()
            return real(image, spec)

        monkeypatch.setattr(module, "preprocess", slow)
        runtime.encode(files[:8])
        assert all(name.startswith("admth-decode") for name in names)
        names[:] = ["-"] * 3
        runtime.encode(files[0])
        assert names[3:] == [threading.current_thread().name]

    def test_an_array_that_a_generator_uses_again(self, runtime):
        pictures = np.random.default_rng(5).integers(0, 256, (11, SIZE, SIZE, 3), dtype=np.uint8)

        def frames():
            buffer = np.empty_like(pictures[0])
            for picture in pictures:
                buffer[:] = picture
                yield buffer

        assert same(runtime.encode(frames()), runtime.encode(pictures))

    def test_the_first_broken_file_is_named_and_nothing_is_left_running(self, runtime, files, tmp_path):
        broken = [tmp_path / "one.jpg", tmp_path / "two.jpg"]
        for path in broken:
            path.write_bytes(b"no image")
        with pytest.raises(ImageError, match=r"one\.jpg"):
            runtime.encode([*files[:3], broken[0], files[4], broken[1]])
        assert runtime.encode(files).count == len(files)

    def test_every_item_is_done_before_an_error_leaves(self):
        threads, running = DecodeThreads(2), []

        def work(number: int) -> int:
            if number == 0:
                raise ImageError("the first")
            running.append(number)
            time.sleep(0.05)
            running.remove(number)
            return number

        with pytest.raises(ImageError, match="the first"):
            threads.map(work, range(6))
        assert running == []
        threads.close()
        threads.close()

    @pytest.mark.parametrize("count", [0, -1, True, 1.5, "2"])
    def test_a_number_of_threads_out_of_range(self, tiny_path, count):
        with pytest.raises(InputError, match=r"decode_threads .* is not a positive integer"):
            HashRuntime(tiny_path, decode_threads=count)


class TestClosing:
    def test_a_call_of_many_batches_ends_well(self, tiny_path, runtime):
        """The engine is freed only after the last batch of a call that began before the close."""
        pictures = np.random.default_rng(5).integers(0, 256, (40, SIZE, SIZE, 3), dtype=np.uint8)
        expected = runtime.encode(pictures)
        opened = HashRuntime(tiny_path, threads=1, batch_size=8)
        engine = opened.engine
        closing = threading.Thread(target=opened.close)

        def frames():
            for number, picture in enumerate(pictures):
                if number == 20:
                    closing.start()
                    while not opened._calls.closed:
                        time.sleep(0.001)
                yield picture

        assert same(opened.encode(frames()), expected)
        closing.join(timeout=20)
        assert not closing.is_alive()
        with pytest.raises(InputError, match="closed: open the model again"):
            opened.encode(pictures)
        with pytest.raises(InputError, match="closed"):
            engine.run(pictures)

    def test_close_returns_only_when_the_calls_in_flight_have(self, tiny_path):
        opened = HashRuntime(tiny_path, threads=1)
        order = []
        inside, leave = threading.Event(), threading.Event()

        def frames():
            inside.set()
            assert leave.wait(20)
            yield np.zeros((SIZE, SIZE, 3), np.uint8)

        def encode() -> None:
            opened.encode(frames())
            order.append("encoded")

        def close() -> None:
            opened.close()
            order.append("closed")

        threads = [threading.Thread(target=encode), threading.Thread(target=close)]
        threads[0].start()
        assert inside.wait(20)
        threads[1].start()
        threads[1].join(timeout=0.1)
        assert threads[1].is_alive()
        with pytest.raises(InputError, match="closed"):  # what comes later is refused meanwhile
            opened.encode(np.zeros((1, SIZE, SIZE, 3), np.uint8))
        leave.set()
        for thread in threads:
            thread.join(timeout=20)
        assert order == ["encoded", "closed"]

    def test_closing_from_inside_a_call_does_not_wait_for_itself(self, tiny_path):
        opened = HashRuntime(tiny_path, threads=1, batch_size=2)

        def frames():
            for number in range(6):
                if number == 3:
                    opened.close()
                yield np.zeros((SIZE, SIZE, 3), np.uint8)

        assert opened.encode(frames()).count == 6
        assert opened._engine is None

    def test_sixteen_threads_get_codes_or_the_closed_error(self, tiny_path, files):
        for _ in range(5):
            opened = HashRuntime(tiny_path, threads=1, batch_size=4, decode_threads=2)
            expected = opened.encode(files)
            started = threading.Barrier(17)

            def work(opened=opened, expected=expected, started=started) -> str:
                started.wait()
                try:
                    while True:
                        assert same(opened.encode(files), expected)
                except InputError as error:
                    return str(error)

            with ThreadPoolExecutor(16) as pool:
                answers = [pool.submit(work) for _ in range(16)]
                started.wait()
                time.sleep(0.02)
                opened.close()
                assert all("is closed: open the model again" in answer.result(20) for answer in answers)

    def test_a_runtime_that_is_forgotten_is_freed_at_once(self, tiny_path):
        gc.disable()
        try:
            engine = weakref.ref(HashRuntime(tiny_path, threads=1).engine)
            assert engine() is None
        finally:
            gc.enable()

    def test_no_thread_is_left(self, tiny_path, files):
        before = threading.active_count()
        with HashRuntime(tiny_path, threads=1, decode_threads=4) as opened:
            opened.encode(files)
            assert threading.active_count() > before
        assert threading.active_count() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_decodes_with_threads_of_its_own(runtime, files):
    expected = runtime.encode(files)

    def child() -> None:
        ok = same(runtime.encode(files), expected)
        runtime.close()
        os._exit(0 if ok else 1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(timeout=30)
    alive = process.is_alive()
    if alive:
        process.kill()
    assert not alive
    assert process.exitcode == 0
    assert same(runtime.encode(files), expected)


class TestCallGate:
    def test_it_releases_once_and_after_the_last(self):
        released = []
        gate = CallGate(lambda: released.append(len(released)), "closed")
        with gate, gate:
            gate.close()
            assert released == []
            with gate:  # a call of a call in flight is in flight too
                gate.check()
        assert released == [0]
        gate.close()
        assert released == [0]
        with pytest.raises(InputError, match=r"^closed$"), gate:
            pass

    def test_an_error_leaves_too(self):
        released = []
        gate = CallGate(lambda: released.append(1), "closed")
        with pytest.raises(ZeroDivisionError), gate:
            raise ZeroDivisionError
        gate.close()
        assert released == [1]
