"""Encoding one shard in one process: decoding in threads ahead of inference, then the part under its final name."""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from admth_runtime.corpus.image_reader import ImageReader, pixels_of, unopened
from admth_runtime.corpus.layout import LISTING_FILE, part_path, stats_path, sync_folder
from admth_runtime.corpus.listing import Listing
from admth_runtime.corpus.parts import ShardCodes, part_bytes
from admth_runtime.corpus.plan import read_plan
from admth_runtime.corpus.sources import Listed, single_line
from admth_runtime.errors import ImageError, InputError
from admth_runtime.files import write_bytes, write_json
from admth_runtime.runtime import HashRuntime

__all__ = ["ShardEncoder", "ShardProgress", "ShardStats", "WorkerConfig"]

UInt8Array = NDArray[np.uint8]

_MOST_IN_CHUNK = 4  # images a decoding thread takes at a time
_LEAST_AHEAD = 3  # batches that are decoded ahead of the one that inference works on
_SECONDS_BETWEEN_NEWS = 0.2
_LEAST_UNOPENED = 20  # so many files, and all of a shard, that cannot be opened are no accident of single files


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker needs to know beside what ``corpus.json`` says.

    Attributes:
        folder: the corpus, absolute.
        model: the model file, absolute.
        device: see :class:`~admth_runtime.HashRuntime`.
        provider: likewise.
        threads: CPU threads of one inference call.
        decoders: threads that decode.
        believe_unopened: write a shard even when none of its files can be opened.
        self_test: see :class:`~admth_runtime.HashRuntime`.
    """

    folder: str
    model: str
    device: str
    provider: str | None
    threads: int
    decoders: int
    believe_unopened: bool
    self_test: bool = False


@dataclass(frozen=True)
class ShardProgress:
    """What was done of a shard since the last word of it.

    Attributes:
        images: images that are done, readable or not.
        unreadable: uri and reason of those that are not.
    """

    images: int
    unreadable: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class ShardStats:
    """What a shard took, as ``part-XXXXX_stats.json`` keeps it.

    Attributes:
        shard: its number.
        first: position of its first image in the listing.
        images: images, readable or not.
        errors: images that could not be read.
        image_bytes: bytes of the images.
        part_bytes: bytes of the part.
        seconds: from its first image to its last code.
        decode_seconds: processor seconds of reading, decoding and resizing, over all threads.
        inference_seconds: seconds in the engine.
        images_per_second: images through seconds.
        engine: software and version that ran the model.
        device: ``"cpu"`` or ``"cuda"``.
        threads: threads of one inference call.
        worker: process and machine.
        finished: when, UTC, ISO 8601.
    """

    shard: int
    first: int
    images: int
    errors: int
    image_bytes: int
    part_bytes: int
    seconds: float
    decode_seconds: float
    inference_seconds: float
    images_per_second: float
    engine: str
    device: str
    threads: int
    worker: str
    finished: str


@dataclass(frozen=True)
class _Decoded:
    """What a decoding thread did: for each image the reason why it failed or None, bytes, processor seconds."""

    reasons: list[str | None]
    size: int
    seconds: float


class ShardEncoder:
    """One model and one corpus, opened once; encodes shard after shard.

    Args:
        config: where everything is.

    Raises:
        InputError: the corpus or its listing is damaged, or the model is not the one that the corpus was begun with.
        AdmthError: as :class:`~admth_runtime.HashRuntime` says.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._folder = Path(config.folder)
        self._plan = read_plan(self._folder)
        self._listing = Listing(self._folder / LISTING_FILE)
        self._runtime = HashRuntime(
            config.model,
            device=config.device,
            provider=config.provider,
            threads=config.threads,
            batch_size=self._plan.batch,
            self_test=config.self_test,
        )
        if self._runtime.model_sha256 != self._plan.model_sha256:
            raise InputError(f"{config.model} was changed while the corpus was being encoded: put the old model back")
        self._pool = ThreadPoolExecutor(config.decoders, thread_name_prefix="decode")
        # Small batches or many threads: fewer images at a time, more batches ahead, so that every thread has work.
        self._chunk = max(1, min(_MOST_IN_CHUNK, self._plan.batch // config.decoders))
        self._ahead = max(_LEAST_AHEAD, -(-2 * config.decoders * self._chunk // self._plan.batch))

    def __enter__(self) -> ShardEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._runtime.close()
        self._listing.close()

    def encode(self, shard: int) -> Iterator[ShardProgress | ShardStats]:
        """Encode a shard and write its statistics and its part; doing it again writes the same part.

        Yields:
            What is done, a few times a second, and last the statistics, once the part has its name.

        Raises:
            InputError: a source vanished or was changed, or the listing is damaged.
            DeviceError: the engine failed.
            OutputError: the part cannot be written, for example to a full disk.
        """
        start = time.perf_counter()
        rows = self._listing.shard(shard)
        if len(rows) != len(self._plan.span(shard)):
            raise InputError(f"the listing in {self._folder} is damaged: encode the corpus again with --restart")
        result = self._empty(rows)
        spent = _Spent()
        with ImageReader(self._plan) as reader:
            yield from self._fill(result, rows, reader, spent)
        self._check_opened(shard, result.reasons)
        content = part_bytes(self._plan, shard, result)
        stats = self._stats(shard, result, spent, len(content), time.perf_counter() - start)
        if read_plan(self._folder).identity != self._plan.identity:  # a worker that outlived a run before --restart
            raise InputError(
                f"{self._folder} was begun anew while shard {shard} was being encoded: nothing was written"
            )
        # The part last: where it is, its statistics are.
        write_json(stats_path(self._folder, shard), asdict(stats))
        write_bytes(part_path(self._folder, shard), content)
        sync_folder(self._folder)
        yield stats

    def _empty(self, rows: Sequence[Listed]) -> ShardCodes:
        count, lengths = len(rows), self._plan.code_lengths
        return ShardCodes(
            uris=[row.uri for row in rows],
            reasons=[None] * count,
            codes={length: np.zeros((count, length // 8), np.uint8) for length in lengths},
            logits={n: np.zeros((count, n), np.float32) for n in lengths} if self._plan.logits else {},
        )

    def _fill(
        self, result: ShardCodes, rows: Sequence[Listed], reader: ImageReader, spent: _Spent
    ) -> Iterator[ShardProgress]:
        """Decode and encode batch by batch. Batches begin at multiples of their size, whatever can be read of them."""
        size = min(self._plan.batch, len(rows))
        buffers = [np.empty((size, *self._plan.preprocessing.shape), np.uint8) for _ in range(self._ahead + 1)]
        waiting: deque[tuple[int, UInt8Array, list[Future[_Decoded]]]] = deque()
        starts = iter(range(0, len(rows), size))
        told = _Telling()
        try:
            while True:
                while len(waiting) <= self._ahead and (start := next(starts, None)) is not None:
                    batch = rows[start : start + size]
                    pixels = buffers[start // size % len(buffers)][: len(batch)]
                    waiting.append((start, pixels, self._decode(batch, pixels, reader)))
                if not waiting:
                    return
                start, pixels, futures = waiting.popleft()
                done = [future.result() for future in futures]
                reasons = [reason for each in done for reason in each.reasons]
                spent.add(done)
                self._infer(result, start, pixels, reasons, spent)
                unreadable = [(rows[start + i].uri, reason) for i, reason in enumerate(reasons) if reason is not None]
                told.add(len(reasons), unreadable)
                if (news := told.news(whole=not waiting)) is not None:
                    yield news
        finally:  # threads must not go on writing into buffers that nobody holds, nor read what is being closed
            for _, _, futures in waiting:
                for future in futures:
                    future.cancel()
            for _, _, futures in waiting:
                for future in futures:
                    if not future.cancelled():
                        future.exception()

    def _decode(self, batch: Sequence[Listed], pixels: UInt8Array, reader: ImageReader) -> list[Future[_Decoded]]:
        return [
            self._pool.submit(self._decode_chunk, batch[at : at + self._chunk], pixels[at : at + self._chunk], reader)
            for at in range(0, len(batch), self._chunk)
        ]

    def _decode_chunk(self, images: Sequence[Listed], into: UInt8Array, reader: ImageReader) -> _Decoded:
        begin, size = time.thread_time(), 0
        reasons: list[str | None] = []
        for image, place in zip(images, into, strict=True):
            read, reason = self._decode_one(image, place, reader)
            size += read
            reasons.append(reason)
        return _Decoded(reasons, size, time.thread_time() - begin)

    def _decode_one(self, image: Listed, place: UInt8Array, reader: ImageReader) -> tuple[int, str | None]:
        """Fill in one image's pixels; return the bytes that were read, and the reason when there are no pixels."""
        size = 0
        try:
            data = reader.read(image)
            size = len(data)
            place[:] = pixels_of(data, self._plan.preprocessing)
        except ImageError as error:
            return size, single_line(str(error))
        return size, None

    def _infer(
        self, result: ShardCodes, start: int, pixels: UInt8Array, reasons: Sequence[str | None], spent: _Spent
    ) -> None:
        good = [index for index, reason in enumerate(reasons) if reason is None]
        if good:
            begin = time.perf_counter()
            codes = self._runtime.encode_pixels(pixels if len(good) == len(pixels) else pixels[good])
            spent.inference += time.perf_counter() - begin
            rows = slice(start, start + len(pixels)) if len(good) == len(pixels) else np.array(good) + start
            for length, table in result.codes.items():
                table[rows] = codes[length]
            for length, logits in result.logits.items():
                logits[rows] = codes.logits[length]
        for index, reason in enumerate(reasons):
            if reason is not None:
                result.reasons[start + index] = reason

    def _check_opened(self, shard: int, reasons: Sequence[str | None]) -> None:
        lost = [reason for reason in reasons if reason is not None and unopened(reason)]
        if not self._config.believe_unopened and len(lost) == len(reasons) >= _LEAST_UNOPENED:
            raise InputError(
                f"none of the {len(lost):,} images of shard {shard} can be opened (the first {lost[0]}): is their disk "
                "mounted? Mend it and run the same command again, or take them for lost with --max-error-rate 1"
            )

    def _stats(self, shard: int, result: ShardCodes, spent: _Spent, size: int, seconds: float) -> ShardStats:
        images, engine = len(result.uris), self._runtime.engine
        return ShardStats(
            shard=shard,
            first=self._plan.span(shard).start,
            images=images,
            errors=sum(reason is not None for reason in result.reasons),
            image_bytes=spent.size,
            part_bytes=size,
            seconds=round(seconds, 3),
            decode_seconds=round(spent.decode, 3),
            inference_seconds=round(spent.inference, 3),
            images_per_second=round(images / seconds, 1),
            engine=f"{engine.name} {engine.version}",
            device=engine.device,
            threads=engine.threads,
            worker=f"process {os.getpid()} on {socket.gethostname()}",
            finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )


class _Telling:
    """Progress since it was last told, which is a few times a second at most: small batches come by the hundred."""

    def __init__(self) -> None:
        self._images = 0
        self._unreadable: list[tuple[str, str]] = []
        self._next = 0.0

    def add(self, images: int, unreadable: Sequence[tuple[str, str]]) -> None:
        self._images += images
        self._unreadable += unreadable

    def news(self, *, whole: bool) -> ShardProgress | None:
        """Return what there is to tell, when it is time to, or when nothing more will come."""
        now = time.monotonic()
        if now < self._next and not whole:
            return None
        news = ShardProgress(self._images, tuple(self._unreadable))
        self._images, self._unreadable, self._next = 0, [], now + _SECONDS_BETWEEN_NEWS
        return news


class _Spent:
    """What a shard took so far."""

    def __init__(self) -> None:
        self.size = 0
        self.decode = 0.0
        self.inference = 0.0

    def add(self, done: Sequence[_Decoded]) -> None:
        self.size += sum(each.size for each in done)
        self.decode += sum(each.seconds for each in done)
