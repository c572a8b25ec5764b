"""HashPipeline: order, policies, errors a frame at a time, and every way to end."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from _tiny_model import LENGTHS, SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from admth_runtime import HashPipeline, HashRuntime, PipelineOptions
from admth_runtime.errors import DeviceError, InputError, PipelineError, QueueFullError
from admth_runtime.pipeline import ArraySource, Frame, PipelineStats


@pytest.fixture(scope="module")
def runtime(tiny_path):
    with HashRuntime(tiny_path, device="cpu", threads=1, batch_size=16) as opened:
        yield opened


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(5)
        assert not thread.is_alive(), thread


def adds_up(stats: PipelineStats) -> bool:
    out = stats.delivered + stats.errors + stats.dropped + stats.rejected + stats.discarded
    return stats.under_way == 0 and stats.frames == out


class Gate:
    """A sink function that collects results, and waits until it is opened."""

    def __init__(self) -> None:
        self.results, self.open, self.entered = [], threading.Event(), threading.Event()

    def __call__(self, result) -> None:
        self.entered.set()
        assert self.open.wait(30)
        self.results.append(result)


class TestResults:
    def test_are_those_of_encode_in_order(self, runtime, pixels):
        results = []
        stats = HashPipeline(runtime, pixels, results.append, PipelineOptions(batch_size=8)).run()
        codes = runtime.encode(pixels)
        assert [result.id for result in results] == list(range(len(pixels)))
        for row, result in enumerate(results):
            assert result.ok and result.uri == f"array:{row}"
            for length in LENGTHS:
                assert np.array_equal(result[length], codes[length][row])
                assert result.hex(length) == codes[length][row].tobytes().hex()
                assert np.array_equal(result.codes[length], codes[length][row : row + 1])
                assert np.allclose(result.codes.logits[length][0], codes.logits[length][row], atol=1e-4)
        assert adds_up(stats) and stats.delivered == stats.frames == len(pixels)

    def test_of_every_kind_of_picture(self, runtime, tmp_path):
        picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 20, 3), dtype=np.uint8))
        picture.save(tmp_path / "a.png")
        array = np.asarray(picture)
        given = [tmp_path / "a.png", str(tmp_path / "a.png"), picture, array, lambda: array, lambda: picture]
        results = []
        HashPipeline(runtime, ArraySource(given), results.append).run()
        assert len({result.hex(64) for result in results}) == 1
        assert results[0].hex(64) == runtime.encode(picture).hex(64)[0]
        assert results[0].uri == str(tmp_path / "a.png") and results[2].uri == "array:2"

    def test_of_views_and_strides(self, runtime, pixels):
        results = []
        HashPipeline(runtime, [image[:, ::-1] for image in pixels], results.append).run()
        expected = runtime.encode(np.ascontiguousarray(pixels[:, :, ::-1]))
        assert [result.hex(64) for result in results] == expected.hex(64)

    def test_carry_what_a_frame_says(self, runtime, pixels):
        results = []
        frames = [Frame(pixels[0], "clip.mp4#t=1.5", 12.25), Frame(None, "clip.mp4#t=2", 13.0, "lost")]
        HashPipeline(runtime, frames, results.append, PipelineOptions(first_id=7)).run()
        assert results[0].to_dict() == {
            "id": 7,
            "uri": "clip.mp4#t=1.5",
            "timestamp": 12.25,
            "codes": {str(length): results[0].hex(length) for length in LENGTHS},
        }
        assert results[1].to_dict() == {"id": 8, "uri": "clip.mp4#t=2", "timestamp": 13.0, "error": "lost"}
        with pytest.raises(InputError, match=r"frame 8 \(clip.mp4#t=2\) has no codes \(lost\)"):
            results[1][64]


class TestEveryPolicy:
    @settings(max_examples=60, deadline=None)
    @given(
        policy=st.sampled_from(["block", "drop-oldest", "reject"]),
        kinds=st.lists(st.sampled_from(["ready", "large", "float", "missing", "raises"]), max_size=60),
        queue_size=st.integers(1, 8),
        batch_size=st.integers(1, 6),
        decoders=st.integers(1, 3),
        max_wait_ms=st.sampled_from([0.0, 1.0]),
        slow=st.booleans(),
        pushed=st.booleans(),
    )
    def test_every_frame_is_accounted_for_once(
        self, runtime, policy, kinds, queue_size, batch_size, decoders, max_wait_ms, slow, pushed
    ):
        generator = np.random.default_rng(len(kinds))
        images = [_image(kind, generator) for kind in kinds]
        options = PipelineOptions(
            batch_size=batch_size,
            queue_size=queue_size,
            policy=policy,
            decode_threads=decoders,
            max_wait_ms=max_wait_ms,
        )
        results, rejected = [], 0

        def take(result):
            time.sleep(0.001 if slow else 0)
            results.append(result)

        if pushed:
            with HashPipeline(runtime, None, take, options) as pipeline:
                for image in images:
                    submitted = False
                    with suppress(QueueFullError):
                        pipeline.submit(image)
                        submitted = True
                    rejected += not submitted
            stats = pipeline.stats()
            assert stats.rejected == rejected
        else:
            stats = HashPipeline(runtime, ArraySource(images), take, options).run()
        ids = [result.id for result in results]
        assert ids == sorted(set(ids))
        assert all(0 <= number < len(images) for number in ids)
        assert len(results) + stats.dropped + stats.rejected == stats.frames == len(images)
        assert stats.discarded == 0 and adds_up(stats)
        assert (stats.dropped == 0 or policy == "drop-oldest") and (stats.rejected == 0 or policy == "reject")
        for result in results:
            assert result.ok == (kinds[result.id] in ("ready", "large"))
            if result.ok:
                assert result.hex(64) == runtime.encode(images[result.id]).hex(64)[0]

    def test_drop_oldest_delivers_the_newest(self, runtime, pixels):
        sink = Gate()
        options = PipelineOptions(batch_size=1, queue_size=2, policy="drop-oldest", decode_threads=1)
        with HashPipeline(runtime, None, sink, options) as pipeline:
            for image in pixels:
                pipeline.submit(image)
            sink.open.set()
        stats, ids = pipeline.stats(), [result.id for result in sink.results]
        assert ids[-2:] == [len(pixels) - 2, len(pixels) - 1]
        assert stats.dropped == len(pixels) - len(ids) > 0 and adds_up(stats)

    def test_reject_raises_at_once_and_recovers(self, runtime, pixels):
        sink = Gate()
        options = PipelineOptions(batch_size=1, queue_size=1, policy="reject", decode_threads=1)
        with HashPipeline(runtime, None, sink, options) as pipeline:
            with pytest.raises(QueueFullError, match="the queue is full"):
                for _ in range(100):
                    pipeline.submit(pixels[0])
            sink.open.set()
            deadline = time.monotonic() + 10
            while pipeline.stats().under_way and time.monotonic() < deadline:
                time.sleep(0.005)
            accepted = pipeline.submit(pixels[1])
        assert sink.results[-1].id == accepted
        assert pipeline.stats().rejected == 1 and adds_up(pipeline.stats())

    def test_block_holds_the_source_back(self, runtime, pixels):
        sink, read = Gate(), []

        def source():
            for image in pixels:
                read.append(len(read))
                yield image

        options = PipelineOptions(batch_size=1, queue_size=2, decode_threads=1)
        with HashPipeline(runtime, source(), sink, options) as pipeline:
            sink.entered.wait(10)
            time.sleep(0.2)
            held = len(read)
            sink.open.set()
            pipeline.join()
        # Two wait at the entrance; the rest is in hands, in the small queues, and one is read ahead.
        assert held <= 14
        assert len(sink.results) == len(pixels)

    def test_ids_of_many_submitters_are_unique_and_in_order(self, runtime, pixels):
        results, given = [], []
        with HashPipeline(runtime, None, results.append, PipelineOptions(queue_size=4)) as pipeline:
            threads = [
                threading.Thread(target=lambda: given.extend(pipeline.submit(image, copy=True) for image in pixels))
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
        assert [result.id for result in results] == list(range(4 * len(pixels))) == sorted(given)

    def test_a_copy_may_be_written_over(self, runtime, pixels):
        sink, frame = Gate(), np.empty((SIZE, SIZE, 3), np.uint8)
        with HashPipeline(runtime, None, sink) as pipeline:
            for image in pixels[:20]:
                frame[:] = image
                pipeline.submit(frame, copy=True)
            sink.open.set()
        assert [result.hex(64) for result in sink.results] == runtime.encode(pixels[:20]).hex(64)


def _image(kind: str, generator: np.random.Generator):
    def broken():
        raise RuntimeError("the sensor\nis unplugged")

    return {
        "ready": generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8),
        "large": generator.integers(0, 256, (20, 17, 3), dtype=np.uint8),
        "float": np.zeros((20, 20, 3)),
        "missing": "/nowhere/missing.jpg",
        "raises": broken,
    }[kind]


class TestBatches:
    def batches(self, results) -> list[int]:
        return [result.batch.count for result in results]

    def test_frames_that_wait_travel_together(self, runtime, pixels):
        results = []
        options = PipelineOptions(batch_size=16, max_wait_ms=2000)
        with HashPipeline(runtime, None, results.append, options) as pipeline:
            for image in pixels[:16]:
                pipeline.submit(image)
            start = time.monotonic()
            while len(results) < 16 and time.monotonic() < start + 10:
                time.sleep(0.002)
        assert self.batches(results) == [16] * 16
        assert time.monotonic() - start < 1.5  # full, so it did not wait

    def test_a_lonely_frame_leaves_after_the_wait(self, runtime, pixels):
        results = []
        options = PipelineOptions(batch_size=16, max_wait_ms=100)
        with HashPipeline(runtime, None, results.append, options) as pipeline:
            pipeline.submit(pixels[0])
            time.sleep(0.04)
            assert not results
            start = time.monotonic()
            while not results and time.monotonic() < start + 10:
                time.sleep(0.002)
            assert time.monotonic() - start < 5
        assert self.batches(results) == [1]

    def test_a_batch_may_not_exceed_the_runtimes(self, runtime, pixels):
        with pytest.raises(
            InputError, match=r"batch_size 64 is more than the runtime's 16: open  HashRuntime\(..., ba"
        ):
            HashPipeline(runtime, pixels, print, PipelineOptions(batch_size=64))


class TestBadFrames:
    def test_go_to_the_sink_in_their_place(self, runtime, pixels, tmp_path):
        (tmp_path / "empty.jpg").touch()
        (tmp_path / "text.png").write_text("no picture")
        whole = tmp_path / "whole.png"
        Image.fromarray(pixels[0]).save(whole)
        (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-60])
        results = []
        names = ["whole.png", "empty.jpg", "text.png", "cut.png", "gone.png", "whole.png"]
        frames = [Frame(str(tmp_path / name), name, 0.0) for name in names]
        stats = HashPipeline(runtime, frames, results.append).run()
        assert [result.ok for result in results] == [True, False, False, False, False, True]
        reasons = [result.error for result in results]
        assert "is empty" in reasons[1] and "not an image" in reasons[2]
        assert "cannot be decoded" in reasons[3] and "no such file" in reasons[4]
        assert (stats.delivered, stats.errors) == (2, 4) and adds_up(stats)
        assert stats.stages["decode"].errors == 4

    def test_say_what_a_function_raised_on_one_line(self, runtime):
        results = []
        HashPipeline(runtime, ArraySource([_image("raises", np.random.default_rng(0))]), results.append).run()
        assert results[0].error == "RuntimeError: the sensor is unplugged"

    def test_go_to_on_error_when_there_is_one(self, runtime, pixels):
        good, bad = [], []
        images = [pixels[0], np.zeros((5, 5)), pixels[1]]
        HashPipeline(runtime, images, good.append, on_error=bad.append).run()
        assert [result.id for result in good] == [0, 2] and [result.id for result in bad] == [1]
        assert "is not uint8" in bad[0].error

    def test_name_that_is_no_text(self, runtime):
        results = []
        HashPipeline(runtime, ["\udcff.jpg", "x.jpg"].__iter__(), results.append).run()
        assert results[0].error == "its name is not UTF-8: rename the file"


class FailingRuntime(HashRuntime):
    """Its engine fails on the calls that are listed."""

    failing: tuple[int, ...] = ()
    calls = 0

    def encode_pixels(self, pixels):
        self.calls += 1
        if self.calls - 1 in self.failing:
            raise DeviceError("onnxruntime failed on a batch: try a smaller batch size")
        return super().encode_pixels(pixels)


class TestFailures:
    def test_a_batch_that_fails_is_an_error_of_its_frames(self, tiny_path, pixels):
        results = []
        with FailingRuntime(tiny_path, device="cpu", threads=1, batch_size=10) as failing:
            failing.failing = (1, 3)
            stats = HashPipeline(failing, pixels, results.append, PipelineOptions(max_wait_ms=2000)).run()
        assert [result.ok for result in results] == [row // 10 not in (1, 3) for row in range(len(pixels))]
        assert "failed on a batch" in results[10].error
        assert stats.errors == 20 and adds_up(stats)

    def test_an_engine_that_keeps_failing_ends_it(self, tiny_path, pixels):
        results = []
        with FailingRuntime(tiny_path, device="cpu", threads=1, batch_size=10) as failing:
            failing.failing = tuple(range(1, 100))
            pipeline = HashPipeline(failing, pixels, results.append, PipelineOptions(max_wait_ms=2000))
            with pytest.raises(DeviceError, match="failed on a batch"):
                pipeline.run()
        assert [result.ok for result in results] == [True] * 10 + [False] * 20
        assert adds_up(pipeline.stats()) and pipeline.stats().discarded > 0

    def test_a_closed_runtime_ends_it(self, tiny_path, pixels):
        runtime = HashRuntime(tiny_path, device="cpu", threads=1)
        pipeline = HashPipeline(runtime, None, print).start()
        runtime.close()
        pipeline.submit(pixels[0])
        with pytest.raises(InputError, match="is closed: open the model again"):
            pipeline.join()
        with pytest.raises(InputError, match="is closed: open the model again"):
            HashPipeline(runtime, pixels, print).run()

    def test_a_source_that_raises_ends_it_after_what_it_gave(self, runtime, pixels):
        def source():
            yield from pixels[:30]
            raise OSError("cable pulled")

        results = []
        pipeline = HashPipeline(runtime, source(), results.append)
        with pytest.raises(PipelineError, match=r"^the source failed \(OSError: cable pulled\)$"):
            pipeline.run()
        assert len(results) == 30 and adds_up(pipeline.stats())

    def test_a_sink_that_raises_ends_it(self, runtime, pixels):
        taken = []

        def sink(result):
            taken.append(result.id)
            if result.id == 5:
                raise KeyError("no such column")

        pipeline = HashPipeline(runtime, (pixels[i % 70] for i in range(10_000)), sink)
        with pytest.raises(PipelineError, match=r"^the sink failed \(KeyError: 'no such column'\)$"):
            pipeline.run()
        assert taken == [0, 1, 2, 3, 4, 5]
        stats = pipeline.stats()
        assert stats.frames < 1000 and stats.discarded and adds_up(stats)

    def test_a_reader_that_has_enough_ends_it_quietly(self, runtime, pixels):
        def sink(result):
            raise BrokenPipeError

        pipeline = HashPipeline(runtime, pixels, sink)
        assert adds_up(pipeline.run())

    def test_submit_says_why_it_ended(self, runtime, pixels):
        def sink(result):
            raise ValueError("disk gone")

        pipeline = HashPipeline(runtime, None, sink).start()
        with pytest.raises(PipelineError, match=r"takes no more frames: the sink failed \(ValueError: disk gone\)"):
            for _ in range(10_000):
                pipeline.submit(pixels[0])
                time.sleep(0.001)

    def test_a_sink_that_is_stuck_is_named(self, runtime, pixels):
        sink = Gate()
        options = PipelineOptions(batch_size=1, queue_size=2, stall_timeout_s=0.2, stop_timeout_s=0.3)
        pipeline = HashPipeline(runtime, (pixels[i % 70] for i in range(10_000)), sink, options)
        start = time.monotonic()
        with pytest.raises(
            PipelineError, match=r"the sink stage has taken nothing for 0\.2 s while 2 wait in its queue"
        ):
            pipeline.run()
        assert time.monotonic() - start < 10
        assert adds_up(pipeline.stats())
        sink.open.set()  # only the test needs the thread back

    def test_a_sink_that_is_stuck_at_the_end_is_named_too(self, runtime, pixels):
        sink = Gate()
        options = PipelineOptions(stall_timeout_s=0.2, stop_timeout_s=0.3)
        with pytest.raises(PipelineError, match="the sink stage has taken nothing"):
            HashPipeline(runtime, pixels[:3], sink, options).run()
        sink.open.set()

    def test_a_queue_that_nobody_drains_is_an_error_of_submit(self, runtime, pixels):
        sink = Gate()
        options = PipelineOptions(batch_size=1, queue_size=1, stall_timeout_s=0.2, stop_timeout_s=0.3)
        pipeline = HashPipeline(runtime, None, sink, options).start()
        with pytest.raises(PipelineError, match="stage has taken nothing for"):
            for _ in range(100):
                pipeline.submit(pixels[0])
        with pytest.raises(PipelineError, match="stage has taken nothing for"):
            pipeline.join()
        sink.open.set()

    def test_a_source_that_never_returns_is_left_behind(self, runtime, pixels):
        release = threading.Event()

        def source():
            yield pixels[0]
            release.wait(30)

        results = []
        pipeline = HashPipeline(runtime, source(), results.append, PipelineOptions(stop_timeout_s=0.2)).start()
        while not results:
            time.sleep(0.002)
        pipeline.stop()
        with pytest.raises(
            PipelineError, match=r"the source did not return within 0\.2 s of the stop and was left behind"
        ):
            pipeline.join()
        assert adds_up(pipeline.stats())
        release.set()


class TestLifeCycle:
    def test_stop_delivers_what_is_inside(self, runtime, pixels):
        sink = Gate()
        pipeline = HashPipeline(runtime, None, sink).start()
        for image in pixels[:40]:
            pipeline.submit(image)
        pipeline.stop()
        pipeline.stop()
        assert pipeline.running and not pipeline.join(0.05)
        sink.open.set()
        assert pipeline.join() and not pipeline.running
        assert len(sink.results) == 40 and pipeline.stats().discarded == 0
        with pytest.raises(PipelineError, match="takes no more frames: it was stopped"):
            pipeline.submit(pixels[0])

    def test_stop_without_draining_discards(self, runtime, pixels):
        sink = Gate()
        pipeline = HashPipeline(runtime, None, sink, PipelineOptions(batch_size=4)).start()
        for image in pixels[:40]:
            pipeline.submit(image)
        sink.entered.wait(10)
        pipeline.stop(drain=False)
        sink.open.set()
        assert pipeline.join()
        stats = pipeline.stats()
        assert len(sink.results) == stats.delivered == 4 and stats.discarded == 36 and adds_up(stats)

    def test_an_endless_source_is_stopped_from_the_sink(self, runtime, pixels):
        results = []

        def endless():
            while True:
                yield pixels[0]

        def sink(result):
            results.append(result)
            if len(results) == 50:
                pipeline.stop(drain=False)

        pipeline = HashPipeline(runtime, endless(), sink, PipelineOptions(batch_size=1))
        stats = pipeline.run()
        assert stats.delivered == 50 and adds_up(stats)

    def test_the_block_stops_an_endless_source_and_delivers(self, runtime, pixels):
        results = []

        def endless():
            while True:
                yield pixels[0]

        with HashPipeline(runtime, endless(), results.append) as pipeline:
            while len(results) < 20:
                time.sleep(0.001)
        stats = pipeline.stats()
        assert stats.discarded <= 1 and stats.delivered >= 20 and adds_up(stats)  # one may be at the closing door

    def test_an_error_in_the_block_wins(self, runtime, pixels):
        with pytest.raises(ZeroDivisionError), HashPipeline(runtime, None, print):
            raise ZeroDivisionError

    def test_max_frames_reads_no_more(self, runtime, pixels):
        read, results = [], []

        def source():
            for image in pixels:
                read.append(1)
                yield image

        stats = HashPipeline(runtime, source(), results.append, PipelineOptions(max_frames=13)).run()
        assert len(read) == len(results) == stats.frames == 13

    def test_advance_counts_every_frame(self, runtime, pixels):
        steps = []
        HashPipeline(runtime, pixels, lambda result: time.sleep(0.01)).run(steps.append)
        assert sum(steps) == len(pixels) and len(steps) > 1

    def test_wrong_use_is_one_clear_line(self, runtime, pixels):
        pushed = HashPipeline(runtime, None, print)
        with pytest.raises(InputError, match="has no source to run"):
            pushed.run()
        with pytest.raises(InputError, match="has not been started"):
            pushed.submit(pixels[0])
        with pytest.raises(InputError, match="has not been started"):
            pushed.join()
        pulled = HashPipeline(runtime, pixels[:2], lambda result: None)
        pulled.run()
        with pytest.raises(InputError, match="runs once"):
            pulled.run()
        with pytest.raises(InputError, match="reads its source"):
            pulled.submit(pixels[0])
        with pytest.raises(InputError, match="runtime is a str"):
            HashPipeline("model.onnx", pixels, print)
        with pytest.raises(InputError, match="a sink of type int is unknown"):
            HashPipeline(runtime, pixels, 3)
        with pytest.raises(InputError, match="a source of type int is unknown"):
            HashPipeline(runtime, 3, print)

    def test_waiting_for_itself_is_refused(self, runtime, pixels):
        raised = []

        def sink(result):
            try:
                pipeline.join()
            except InputError as error:
                raised.append(str(error))

        pipeline = HashPipeline(runtime, pixels[:1], sink)
        pipeline.run()
        assert raised[0].startswith("a pipeline cannot wait for itself")

    def test_stats_of_every_stage(self, runtime):
        images = [np.random.default_rng(row).integers(0, 256, (40, 30, 3), dtype=np.uint8) for row in range(50)]
        pipeline = HashPipeline(runtime, images, lambda result: None, PipelineOptions(batch_size=8))
        assert pipeline.stats().seconds == 0
        stats = pipeline.run()
        assert list(stats.stages) == ["source", "decode", "preprocess", "batch", "infer", "sink"]
        for name in ("source", "preprocess", "batch", "infer", "sink"):
            stage = stats.stages[name]
            assert stage.frames == 50 and 0 < stage.p50_ms <= stage.p90_ms <= stage.p99_ms <= stage.max_ms
            assert stage.seconds > 0
        assert stats.stages["infer"].calls == stats.stages["sink"].calls >= 7
        assert stats.latency.frames == 50 and stats.latency.max_ms >= stats.stages["infer"].p50_ms
        assert set(stats.queues) == {"decode", "batch", "infer", "sink"}
        assert all(queue.depth == 0 and queue.peak <= queue.capacity for queue in stats.queues.values())
        assert stats.to_dict()["frames_per_second"] == pytest.approx(50 / stats.seconds)

    def test_two_pipelines_share_a_runtime(self, runtime, pixels):
        first, second = [], []
        with HashPipeline(runtime, pixels, first.append) as one, HashPipeline(runtime, pixels, second.append) as two:
            one.join()
            two.join()
        assert [result.hex(48) for result in first] == [result.hex(48) for result in second]


class TestManyFrames:
    @pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident set from /proc")
    def test_memory_stays_where_it_is(self, runtime, pixels):
        sizes = []

        def resident() -> int:
            return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

        def sink(result):
            if result.id in (20_000, 59_999):
                sizes.append(resident())

        frames = (pixels[number % len(pixels)] for number in range(60_000))
        stats = HashPipeline(runtime, frames, sink).run()
        assert stats.delivered == 60_000
        assert sizes[1] - sizes[0] < 2 << 20


class TestOptions:
    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("policy", "newest", "policy 'newest' is unknown: use one of block, drop-oldest, reject"),
            ("batch_size", 0, "batch_size 0 is not an integer of 1 or more"),
            ("queue_size", True, "queue_size True is not"),
            ("decode_threads", 1.5, "decode_threads 1.5 is not"),
            ("max_wait_ms", -1, "max_wait_ms -1 is not a number of 0 or more"),
            ("max_wait_ms", float("nan"), "max_wait_ms nan is not"),
            ("stall_timeout_s", 0, "stall_timeout_s 0 is not a positive number"),
            ("stop_timeout_s", None, "stop_timeout_s None is not"),
            ("max_frames", 0, "max_frames 0 is not"),
            ("first_id", -1, "first_id -1 is not"),
        ],
    )
    def test_out_of_range(self, field, value, message):
        with pytest.raises(InputError, match=message.replace("(", r"\(")):
            PipelineOptions(**{field: value})
