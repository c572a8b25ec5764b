"""The pipeline: source -> decode -> preprocess -> batch -> infer -> sink."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType

import numpy as np

from admth_runtime.errors import AdmthError, InputError, PipelineError
from admth_runtime.pipeline.frames import Frame, FrameImage, FrameResult
from admth_runtime.pipeline.options import PipelineOptions
from admth_runtime.pipeline.queues import Closed, StalledError
from admth_runtime.pipeline.sinks import Sink, as_sink
from admth_runtime.pipeline.sources import Source, as_source, uri_of
from admth_runtime.pipeline.stats import PipelineStats
from admth_runtime.pipeline.threads import StageThreads
from admth_runtime.runtime import HashRuntime, ImageLike

__all__ = ["HashPipeline"]

_LOOK_S = 0.2  # how often a thread that waits for the end looks at how things stand


class HashPipeline:
    """Encodes the frames of a source and hands the results to a sink, until the source ends or it is stopped.

    Results come in the order of their frames. A frame that cannot be read becomes a result with its error, and the
    pipeline goes on. When the source or the sink fails, the pipeline ends and :meth:`join` raises. It runs once::

        HashPipeline(runtime, "pictures", print).run()

        with HashPipeline(runtime, None, on_result) as pipeline:  # frames of the program's own
            pipeline.submit(array)

    As a context manager it starts, and at the end of the block it stops: what has been taken in is still delivered,
    unless the block raised. Call :meth:`join` in the block to wait for the end of the source.

    Args:
        runtime: the model; it may be shared with other pipelines and threads, and is not closed.
        source: a source of :mod:`admth_runtime.pipeline`, a path or paths, an array uint8 ``[n, H, W, 3]``, any
            iterable of images, or None for :meth:`submit`.
        sink: a sink of :mod:`admth_runtime.pipeline`, or a function that is called with every ``FrameResult``.
        options: batch, waiting, queue, policy.
        on_error: called instead of the sink with the results that have an error, in the sink's thread.

    Raises:
        InputError: an argument is of the wrong kind, or ``batch_size`` is more than the runtime's.
    """

    def __init__(
        self,
        runtime: HashRuntime,
        source: Source | ImageLike | Iterable[ImageLike | Frame] | None,
        sink: Sink | Callable[[FrameResult], object],
        options: PipelineOptions | None = None,
        *,
        on_error: Callable[[FrameResult], object] | None = None,
    ) -> None:
        if not isinstance(runtime, HashRuntime):
            raise InputError(f"runtime is a {type(runtime).__name__}: pass  HashRuntime('model.onnx')")
        self._options = options or PipelineOptions()
        batch_size = self._options.batch_size or runtime.batch_size
        if batch_size > runtime.batch_size:
            raise InputError(
                f"batch_size {batch_size} is more than the runtime's {runtime.batch_size}: open  "
                f"HashRuntime(..., batch_size={batch_size})"
            )
        self._runtime = runtime
        self._source = None if source is None else as_source(source)
        self._sink = as_sink(sink)
        self._threads = StageThreads(runtime, self._source, self._sink, on_error, batch_size, self._options)
        self._started = False

    @property
    def options(self) -> PipelineOptions:
        """How it works."""
        return self._options

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._started and not self._threads.ended.is_set()

    def run(self, advance: Callable[[int], None] = lambda frames: None) -> PipelineStats:
        """Start, wait for the end, and return the account.

        Ctrl-C stops reading the source, delivers what has been read, closes the sink, and is then raised; a second
        one gives up at once.

        Args:
            advance: called in this thread, a few times a second, with the number of frames done since the last call.

        Raises:
            InputError: there is no source, or it has run before.
            AdmthError: as :meth:`start` and :meth:`join` say.
        """
        if self._source is None:
            raise InputError("this pipeline has no source to run: call start() and submit(image), or pass a source")
        self.start()
        done = 0
        try:
            ended = False
            while not ended:
                ended = self.join(_LOOK_S)
                now = self._threads.done
                advance(now - done)
                done = now
        except KeyboardInterrupt:
            self.stop()
            try:
                self.join()
            except KeyboardInterrupt:
                self.stop(drain=False)
            raise
        return self.stats()

    def start(self) -> HashPipeline:
        """Open the sink and start the threads; return itself.

        Raises:
            InputError: it has run before, or the runtime is closed.
            AdmthError: the sink cannot be opened.
        """
        if self._started:
            raise InputError("a pipeline runs once: make another")
        _ = self._runtime.engine  # raises when it is closed
        self._sink.open(self._runtime)
        self._started = True
        self._threads.start()
        return self

    def submit(
        self, image: FrameImage, *, uri: str | None = None, timestamp: float | None = None, copy: bool = False
    ) -> int:
        """Put one frame into a pipeline that has no source of its own; may be called from several threads.

        Args:
            image: a path, a Pillow image, uint8 ``[H, W, 3]`` in RGB order, or a function that returns one of these
                and is called in a decoding thread.
            uri: where it is from; None takes the path, or ``"frame:ID"``.
            timestamp: when it was taken, in seconds since the epoch; None takes now.
            copy: copy an array first. Without, do not write over it until its result has come.

        Returns:
            The frame's id.

        Raises:
            QueueFullError: the policy is ``"reject"`` and the queue is full; the frame is counted.
            PipelineError: the pipeline has ended, or nobody drains its queue.
            InputError: it has a source, or has not been started.
        """
        if self._source is not None:
            raise InputError("this pipeline reads its source: pass None as the source to submit frames")
        if not self._started:
            raise InputError("the pipeline has not been started: call start(), or use it in a with block")
        if copy and isinstance(image, np.ndarray):
            image = image.copy()
        try:
            return self._threads.enter(
                Frame(image, uri or uri_of(image) or "", time.time() if timestamp is None else timestamp)
            )
        except Closed:
            error = self._threads.error
            raise PipelineError(f"the pipeline takes no more frames: {error or 'it was stopped'}") from error
        except StalledError as error:
            raise self._threads.fail("decode", error) from None

    def stop(self, drain: bool = True) -> None:
        """Take in no more; :meth:`join` waits for the end. Stopping twice, or after the end, does nothing more.

        It may be called from any thread, the sink's function included.

        Args:
            drain: deliver what has been taken in; otherwise it is discarded, and only the batch that the sink has in
                hand is finished.
        """
        self._threads.stop(drain=drain)

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end.

        Args:
            timeout: seconds to wait; None waits for ever.

        Returns:
            Whether it has ended.

        Raises:
            PipelineError: the source or the sink failed, a stage is stuck, or a thread does not return after
                :meth:`stop`.
            AdmthError: what else ended the pipeline.
            InputError: it has not been started, or this is one of its own threads.
        """
        if not self._started:
            raise InputError("the pipeline has not been started: call start() or run()")
        threads = self._threads
        if threading.current_thread() in threads.threads:
            raise InputError("a pipeline cannot wait for itself: call stop() in the callback and join() elsewhere")
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while not threads.ended.wait(max(0.0, min(_LOOK_S, deadline - time.monotonic()))):
            threads.watch()
            if time.monotonic() >= deadline:
                return False
        if threads.error is not None:
            raise threads.error
        return True

    def stats(self) -> PipelineStats:
        """Return the account so far; may be called from any thread at any time."""
        return self._threads.stats()

    def __enter__(self) -> HashPipeline:
        return self if self._started else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop(drain=error is None)
        if error is None:
            self.join()
            return
        with suppress(AdmthError):  # the block's own error says more
            self.join()
