"""Batches of pixels: decoded once into memory where they fit, otherwise on the fly in a bounded pool of threads.

Threads and not processes, because Pillow leaves the interpreter lock while it decodes and resizes, and because a
broken image in a thread is an exception with a path, never a dead worker.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from admth_runtime.console import note, progress, warn
from admth_runtime.errors import DataError, ImageError, InputError
from admth_runtime.preprocessing import PreprocessingSpec
from admth_training.data import ImageDataset
from admth_training.data.memory import available_memory_bytes

__all__ = ["Batch", "BrokenImage", "PixelLoader", "default_workers"]

_CHUNK = 32
_PREFETCHED_BATCHES = 2
_NAMED = 3


@dataclass(frozen=True, eq=False)
class Batch:
    """Some images in order.

    Attributes:
        pixels: uint8 ``[b, H, W, 3]``.
        labels: uint8 ``[b, classes]``.
        indices: int64 ``[b]``, the images' numbers in the data set.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class BrokenImage:
    """An image that cannot be read.

    Attributes:
        index: its number in the data set.
        path: what the data set calls it.
        reason: why, in one line.
    """

    index: int
    path: str
    reason: str


class PixelLoader:
    """Gives the pixels of some images of a data set in any order.

    The pixels do not depend on the number of threads, nor on whether they are kept in memory.

    Args:
        dataset: the data set.
        indices: int64 ``[n]``, the images of it that this loader gives, by number.
        spec: the network's preprocessing.
        memory_limit_bytes: decoded pixels are kept when they take no more than this; without it, half of the memory
            that is available. 0 keeps none.
        workers: threads that decode; without it, the processors that this process may use, at most 8.
        max_broken_rate: the share of ``indices`` that may be unreadable, from 0 to 1.

    Attributes:
        broken: the unreadable images found so far, by number; they are left out of every batch.

    Raises:
        InputError: an argument is out of range.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        indices: NDArray[np.int64],
        spec: PreprocessingSpec,
        *,
        memory_limit_bytes: int | None = None,
        workers: int | None = None,
        max_broken_rate: float = 0.01,
    ) -> None:
        indices = np.asarray(indices)
        if indices.ndim != 1 or indices.dtype.kind not in "iu" or len(indices) == 0:
            raise InputError(f"indices of dtype {indices.dtype} and shape {indices.shape} are not integers [n], n > 0")
        if indices.min() < 0 or indices.max() >= len(dataset):
            raise InputError(f"indices from {indices.min()} to {indices.max()} leave the {len(dataset)} images")
        if workers is not None and workers < 1:
            raise InputError(f"workers {workers} is not positive: use at least 1")
        if memory_limit_bytes is not None and memory_limit_bytes < 0:
            raise InputError(f"memory limit of {memory_limit_bytes} bytes is negative: use 0 to keep nothing in memory")
        if not 0.0 <= max_broken_rate <= 1.0:
            raise InputError(f"rate of broken images {max_broken_rate} is not from 0 to 1")
        self.dataset = dataset
        self.indices: NDArray[np.int64] = indices.astype(np.int64)
        self.spec = spec
        self.workers = workers or default_workers()
        self.max_broken_rate = max_broken_rate
        self._memory_limit = memory_limit_bytes
        self._pixels: NDArray[np.uint8] | None = None
        self._broken: dict[int, BrokenImage] = {}
        self._warned = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def broken(self) -> list[BrokenImage]:
        """The unreadable images found so far, by number."""
        with self._lock:
            return [self._broken[position] for position in sorted(self._broken)]

    @property
    def cached(self) -> bool:
        """Whether all pixels are in memory."""
        return self._pixels is not None

    @property
    def needed_bytes(self) -> int:
        """What all pixels of this loader take, in bytes."""
        return len(self) * math.prod(self.spec.shape)

    def prepare(self, description: str = "decoding") -> None:
        """Decode every image once and keep the pixels, where they fit into the memory limit.

        Where they do not fit this says so in one line and checks nothing: broken images then show up in
        :meth:`batches`. A second call does nothing.

        Raises:
            DataError: more images are broken than allowed.
        """
        if self._pixels is not None:
            return
        limit = self._memory_limit if self._memory_limit is not None else available_memory_bytes() // 2
        if self.needed_bytes > limit:
            note(
                f"{len(self):,} images take {_gib(self.needed_bytes)} decoded, beyond the limit of {_gib(limit)}: "
                "decoding on the fly"
            )
            return
        pixels = np.empty((len(self), *self.spec.shape), dtype=np.uint8)

        def decode_chunk(start: int) -> int:
            stop = min(start + _CHUNK, len(self))
            for position in range(start, stop):
                if (image := self._decode(position)) is not None:
                    pixels[position] = image
            return stop - start

        with progress(description, len(self), unit="images") as advance, _Pool(self.workers) as pool:
            for steps in pool.map(decode_chunk, range(0, len(self), _CHUNK)):
                advance(steps)
                self._check_rate()
        self._pixels = pixels
        if broken := self.broken:
            warn(f"{len(broken)} of {len(self):,} images are broken and left out: {_named(broken)}")

    def batches(self, order: Sequence[int] | NDArray[np.integer] | None, batch_size: int) -> Iterator[Batch]:
        """Yield the images in the order asked for.

        Broken images are left out of the batch that they belong to, so a batch may be smaller than asked for; one
        without any image left is passed over.

        Args:
            order: positions in this loader's ``indices``, from 0 to n - 1, possibly with repeats; None is 0 to n - 1.
            batch_size: images a batch; the last one may be smaller.

        Raises:
            InputError: a position or the batch size is out of range.
            DataError: more images are broken than allowed.
        """
        if batch_size < 1:
            raise InputError(f"batch size {batch_size} is not positive: use at least 1")
        positions = np.arange(len(self)) if order is None else np.asarray(order)
        if positions.ndim != 1 or (len(positions) and positions.dtype.kind not in "iu"):
            raise InputError(f"an order of dtype {positions.dtype} and shape {positions.shape} is not integers [n]")
        if len(positions) and (positions.min() < 0 or positions.max() >= len(self)):
            raise InputError(f"an order from {positions.min()} to {positions.max()} leaves the {len(self)} images")
        chunks = [positions[start : start + batch_size] for start in range(0, len(positions), batch_size)]
        return self._cached_batches(chunks) if self._pixels is not None else self._decoded_batches(chunks)

    def _cached_batches(self, chunks: list[NDArray[np.integer]]) -> Iterator[Batch]:
        pixels = self._pixels
        assert pixels is not None
        for chunk in chunks:
            good = np.asarray([position for position in chunk.tolist() if position not in self._broken], dtype=np.int64)
            if len(good):
                yield self._batch(good, pixels[good])

    def _decoded_batches(self, chunks: list[NDArray[np.integer]]) -> Iterator[Batch]:
        """Decode ahead by a fixed number of batches, which bounds the memory, and yield in order."""
        waiting: deque[tuple[list[int], list[Future[NDArray[np.uint8] | None]]]] = deque()
        with _Pool(self.workers) as pool:
            for chunk in [*chunks, *[None] * _PREFETCHED_BATCHES]:
                if chunk is not None:
                    known = chunk.tolist()
                    waiting.append((known, [pool.submit(self._decode, position) for position in known]))
                if waiting and (chunk is None or len(waiting) > _PREFETCHED_BATCHES):
                    asked, futures = waiting.popleft()
                    decoded = [(position, future.result()) for position, future in zip(asked, futures, strict=True)]
                    self._check_rate()
                    self._warn_of_first()
                    good = [(position, image) for position, image in decoded if image is not None]
                    if good:
                        yield self._batch(
                            np.asarray([position for position, _ in good], dtype=np.int64),
                            np.stack([image for _, image in good]),
                        )

    def _batch(self, positions: NDArray[np.int64], pixels: NDArray[np.uint8]) -> Batch:
        indices = self.indices[positions]
        return Batch(pixels, self.dataset.labels[indices], indices)

    def _decode(self, position: int) -> NDArray[np.uint8] | None:
        """Return the pixels at a position, or record it as broken and return None."""
        if position in self._broken:
            return None
        index = int(self.indices[position])
        try:
            return self.dataset.load(index, self.spec)
        except ImageError as error:
            path = self.dataset.describe(index)
            found = BrokenImage(index, path, str(error).removeprefix(f"{path}: "))
        with self._lock:
            self._broken[position] = found
        return None

    def _warn_of_first(self) -> None:
        """Say once that images are left out on the fly; the rest is in :attr:`broken`."""
        if not self._warned and (broken := self.broken):
            self._warned = True
            warn(f"broken images are left out, the first is {_named(broken[:1])}")

    def _check_rate(self) -> None:
        broken = self.broken
        if len(broken) > self.max_broken_rate * len(self):
            raise DataError(
                f"{len(broken)} of {len(self):,} images are broken, more than {self.max_broken_rate:.1%}: "
                f"mend or remove them; {_named(broken)}"
            )


def default_workers() -> int:
    """Return the number of processors that this process may use, at most 8."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, 8)


class _Pool(ThreadPoolExecutor):
    """A pool that drops what has not started when its block ends early, so that Ctrl-C and errors do not wait."""

    def __exit__(self, *details: object) -> None:
        self.shutdown(wait=True, cancel_futures=True)


def _named(broken: list[BrokenImage]) -> str:
    text = "; ".join(f"{image.path} ({image.reason})" for image in broken[:_NAMED])
    return text + (f"; and {len(broken) - _NAMED} more" if len(broken) > _NAMED else "")


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"
