"""The threads and queues behind a pipeline, how they end, and the account that they keep."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from time import perf_counter

from admth_runtime.cpu import usable_cores
from admth_runtime.errors import AdmthError, PipelineError, QueueFullError
from admth_runtime.pipeline.frames import Entry, Frame, FrameResult
from admth_runtime.pipeline.options import PipelineOptions
from admth_runtime.pipeline.queues import BoundedQueue, Closed, OrderedQueue, StalledError
from admth_runtime.pipeline.sinks import Sink
from admth_runtime.pipeline.sources import Source
from admth_runtime.pipeline.stages import Assembler, Decoder, Inference, UInt8Array, one_line, results_of
from admth_runtime.pipeline.stats import PipelineStats, QueueStats, StageClock
from admth_runtime.runtime import HashRuntime

__all__ = ["StageThreads"]

_STAGES = ("source", "decode", "preprocess", "batch", "infer", "sink")


class StageThreads:
    """Runs the stages in threads.

    ::

        source -> [decode] -> decoders -> [batch] -> batcher -> [infer] -> inference -> [sink] -> sink

    Names in brackets are bounded queues, called after the stage that reads them. Whatever ends a thread closes the
    queue that it fills, so the stages after it finish what there is and end too.

    Args:
        runtime: the model.
        source: where frames come from; None when :meth:`enter` is called from outside.
        sink: where results go.
        on_error: takes the results that have an error, instead of the sink.
        batch_size: the most images in one inference call.
        options: the rest.
    """

    def __init__(
        self,
        runtime: HashRuntime,
        source: Source | None,
        sink: Sink,
        on_error: Callable[[FrameResult], object] | None,
        batch_size: int,
        options: PipelineOptions,
    ) -> None:
        self._source, self._sink, self._on_error = source, sink, on_error
        self._batch_size, self._options = batch_size, options
        self._decoders = options.decode_threads or usable_cores()
        stall = options.stall_timeout_s
        self._entrance = BoundedQueue[Entry]("decode", options.queue_size, policy=options.policy, stall_s=stall)
        self._decoded = OrderedQueue[Entry]("batch", batch_size + self._decoders, stall_s=stall)
        self._ready = BoundedQueue[tuple[list[Entry], UInt8Array]]("infer", 1, stall_s=stall)
        batches = max(2, options.queue_size // batch_size)
        self._done = BoundedQueue[tuple[list[FrameResult], list[float]]]("sink", batches, stall_s=stall)

        spec = runtime.manifest.preprocessing
        self._clocks = {stage: StageClock() for stage in _STAGES}
        self._latency = StageClock()
        self._decode = Decoder(spec, self._clocks["decode"], self._clocks["preprocess"])
        self._assemble = Assembler(batch_size, spec.shape, self._clocks["batch"])
        self._infer = Inference(runtime, options.max_engine_failures, self._clocks["infer"])

        self.ended = threading.Event()
        self.error: AdmthError | None = None
        self.threads: tuple[threading.Thread, ...] = ()
        self._alive: set[threading.Thread] = set()
        self._running_decoders = self._decoders
        self._lock = threading.Lock()  # of what several threads write as they end
        self._entering = threading.Lock()  # ids are given in the order of the queue
        self._stop = threading.Event()
        self._frames = self._rejected = self._delivered = self._failed = 0
        # Times, each 0 until it has come: of start and end; of the order to stop and of the order to discard; and
        # when the sink last took or finished something.
        self._started = self._finished = self._told = self._cut = self._sink_moved = 0.0

    @property
    def done(self) -> int:
        """Frames that the sink, or ``on_error``, has taken."""
        return self._delivered + self._failed

    def start(self) -> None:
        """Start the threads."""
        jobs: list[tuple[str, Callable[[], None]]] = [("decode", self._run_decoder)] * self._decoders
        # A batch of one needs no assembling, and a thread less on its way.
        jobs += [] if self._batch_size == 1 else [("batch", self._run_batcher)]
        jobs += [("infer", self._run_inference), ("sink", self._run_sink)]
        if self._source is not None:
            jobs.append(("source", self._run_source))
        # Daemons: a source that never returns must not keep the interpreter alive.
        self.threads = tuple(
            threading.Thread(target=self._guarded, args=job, name=f"admth-{job[0]}", daemon=True) for job in jobs
        )
        self._alive = set(self.threads)
        self._started = self._sink_moved = perf_counter()
        for thread in self.threads:
            thread.start()

    def enter(self, frame: Frame) -> int:
        """Give a frame its id and queue it.

        Raises:
            QueueFullError: it was rejected, and counted.
            StalledError: nobody drains the queue.
            Closed: the pipeline takes no more.
        """
        with self._entering:
            number = self._options.first_id + self._frames
            self._frames += 1
            uri = frame.uri or f"frame:{number}"
            try:
                self._entrance.put(Entry(number, frame, uri, frame.timestamp, perf_counter()))
            except QueueFullError:
                self._rejected += 1
                raise
        return number

    def stop(self, *, drain: bool) -> None:
        """Take in no more, and deliver or discard what is inside."""
        self._told = self._told or perf_counter()
        self._stop.set()
        self._entrance.close(discard=not drain)
        if not drain:
            self._cut_off()
            self._done.close(discard=True)

    def fail(self, stage: str, error: BaseException) -> AdmthError:
        """Keep the first error, and end as far as that error makes it useless to go on.

        Returns:
            The error that the pipeline ends with.
        """
        if isinstance(error, StalledError):
            error = self._last_stalled(error)
        if not isinstance(error, AdmthError):
            failure = PipelineError(f"the {stage} failed ({one_line(error)})")
            failure.__cause__ = error
            error = failure
        with self._lock:
            kept = self.error = self.error or error
        if isinstance(error, StalledError) or stage == "sink":
            self.stop(drain=False)
        elif stage == "source":
            self.stop(drain=True)  # what it gave before is good
        else:
            self._cut_off()  # what has its codes is still delivered
            self.stop(drain=True)
        return kept

    def watch(self) -> None:
        """Notice that a thread will not return, and end without it. Whoever waits for the end calls this regularly."""
        now, patience = perf_counter(), self._options.stop_timeout_s
        with self._lock:
            alive = {thread.name.removeprefix("admth-") for thread in self._alive}
        lost = alive == {"source"} and self._told and now - self._told > patience
        if lost or (alive and self._cut and now - self._cut > patience):
            names = " and ".join(sorted(alive))
            with self._lock:
                self.error = self.error or PipelineError(
                    f"the {names} did not return within {patience:g} s of the stop and was left behind: "
                    "make it give up sooner, or give it longer with stop_timeout_s"
                )
                self._end()
        # A stage that is stuck is noticed by the one before it, except when that has ended.
        stall = self._options.stall_timeout_s
        if alive in ({"sink"}, {"sink", "source"}) and stall is not None and now - self._sink_moved > stall:
            self.fail("sink", StalledError("sink", stall, len(self._done)))

    def stats(self) -> PipelineStats:
        """Return the account so far."""
        ended = self.ended.is_set()
        delivered, failed, dropped, rejected = self._delivered, self._failed, self._entrance.dropped, self._rejected
        frames = self._frames  # last, so that nothing is out that was never in
        rest = frames - delivered - failed - dropped - rejected
        end = self._finished if ended else perf_counter()
        return PipelineStats(
            frames=frames,
            delivered=delivered,
            errors=failed,
            dropped=dropped,
            rejected=rejected,
            discarded=rest if ended else 0,
            under_way=0 if ended else rest,
            seconds=end - self._started if self._started else 0.0,
            latency=self._latency.stats(),
            stages={stage: clock.stats() for stage, clock in self._clocks.items()},
            queues={
                queue.stage: QueueStats(len(queue), queue.peak, queue.capacity)
                for queue in (self._entrance, self._decoded, self._ready, self._done)
            },
        )

    def _run_source(self) -> None:
        assert self._source is not None
        frames = self._source.frames(self._stop)
        try:
            for frame in islice(self._timed(frames), self._options.max_frames):
                with suppress(QueueFullError):
                    self.enter(frame)
                if self._stop.is_set():
                    break
        finally:
            if close := getattr(frames, "close", None):
                close()
            self._entrance.close()

    def _timed(self, frames: Iterator[Frame]) -> Iterator[Frame]:
        clock = self._clocks["source"]
        while True:
            start = perf_counter()
            frame = next(frames, None)
            if frame is None:
                return
            clock.add(perf_counter() - start, errors=frame.error is not None)
            yield frame

    def _run_decoder(self) -> None:
        try:
            while True:
                number, entry = self._entrance.take()
                self._decode(entry)
                self._decoded.put(number, entry)
        finally:
            with self._lock:
                self._running_decoders -= 1
                last = self._running_decoders == 0
            if last:
                self._decoded.close()

    def _run_batcher(self) -> None:
        try:
            for entries, pixels in self._batches():
                self._ready.put((entries, pixels))
        finally:
            self._ready.close()

    def _batches(self) -> Iterator[tuple[list[Entry], UInt8Array]]:
        wait_s = self._options.max_wait_ms / 1e3
        while True:
            entries = self._decoded.collect(self._batch_size, wait_s, lambda: self._ready.has_room)
            yield entries, self._assemble(entries)

    def _ready_batches(self) -> Iterator[tuple[list[Entry], UInt8Array]]:
        while True:
            _, batch = self._ready.take()
            self._decoded.poke()  # there is room for a batch, even one that is not full
            yield batch

    def _run_inference(self) -> None:
        try:
            for entries, pixels in self._batches() if self._batch_size == 1 else self._ready_batches():
                codes = self._infer(entries, pixels)
                self._done.put((results_of(entries, codes), [entry.entered for entry in entries]))
        finally:
            self._done.close()

    def _run_sink(self) -> None:
        failed = True
        try:
            while True:
                try:
                    _, (results, entered) = self._done.take()
                except Closed:
                    failed = False
                    break
                self._deliver(results, entered)
        finally:
            self._sink.close(failed)

    def _deliver(self, results: list[FrameResult], entered: list[float]) -> None:
        self._sink_moved = start = perf_counter()
        good = [result for result in results if result.error is None]
        if self._on_error is None:
            self._sink.write(results)
        else:
            for result in results:
                if result.error is not None:
                    self._on_error(result)
            if good:
                self._sink.write(good)
        self._sink_moved = end = perf_counter()
        self._delivered += len(good)
        self._failed += len(results) - len(good)
        self._clocks["sink"].add(end - start, frames=len(results))
        for begin in entered:
            self._latency.add(end - begin)

    def _guarded(self, stage: str, work: Callable[[], None]) -> None:
        """Run a stage; what ends it by force ends the pipeline."""
        try:
            work()
        except Closed:
            pass
        except BaseException as error:
            if stage == "sink" and isinstance(error, BrokenPipeError):
                self.stop(drain=False)  # the reader has what it wanted
            else:
                self.fail(stage, error)
        finally:
            with self._lock:
                self._alive.discard(threading.current_thread())
                if not self._alive:
                    self._end()

    def _last_stalled(self, error: StalledError) -> StalledError:
        """Blame the last stage that has a full queue: the queues before it are full because of it."""
        for queue in (self._done, self._ready, self._decoded):
            if not queue.has_room:
                # Where batches are of one, there is no batch stage: inference reads that queue.
                stage = "infer" if queue is self._decoded and self._batch_size == 1 else queue.stage
                return StalledError(stage, error.stall_s, len(queue))
        return error

    def _cut_off(self) -> None:
        """Discard all that has no codes yet."""
        self._cut = self._cut or perf_counter()
        for queue in (self._entrance, self._decoded, self._ready):
            queue.close(discard=True)

    def _end(self) -> None:
        if not self.ended.is_set():
            self._finished = perf_counter()
            self.ended.set()
