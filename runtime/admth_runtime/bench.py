"""Latency of decoding, preprocessing, inference and the whole, as an edge device would see it: MLPerf's single stream.

One query follows the other, each an image from file to codes, and what counts is the 90th percentile over at least
1,024 of them (MLPerf Inference's rules for SingleStream). :mod:`admth_runtime.bench_offline` measures the other case.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from admth_runtime.errors import InputError
from admth_runtime.preprocessing import load_image, resize
from admth_runtime.runtime import HashRuntime

__all__ = [
    "GENERATED_SIZE",
    "LEAST_QUERIES",
    "STAGES",
    "SingleStream",
    "StageTimes",
    "check_least",
    "generated_pictures",
    "measure_latency",
    "measure_single_stream",
]

STAGES = ("decode", "preprocess", "inference", "end to end")
GENERATED_SIZE = (640, 480)
LEAST_QUERIES = 1024
"""Queries that MLPerf asks of a single stream."""

_GENERATED = 16


@dataclass(frozen=True)
class StageTimes:
    """Times of one stage over all measured batches, in milliseconds a batch."""

    p50: float
    p90: float
    p99: float
    mean: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float] | NDArray[np.float64]) -> StageTimes:
        """Summarise times in seconds; percentiles are interpolated linearly between neighbours."""
        times = np.asarray(seconds) * 1e3
        p50, p90, p99 = np.percentile(times, (50, 90, 99))
        return cls(float(p50), float(p90), float(p99), float(times.mean()), float(times.max()))


@dataclass(frozen=True, eq=False)
class SingleStream:
    """What a single stream of queries took.

    Attributes:
        seconds: float64 ``[queries]`` by stage, in the order of the queries.
    """

    seconds: Mapping[str, NDArray[np.float64]]

    @property
    def queries(self) -> int:
        """How many queries were measured."""
        return len(self.seconds[STAGES[-1]])

    @property
    def conforms(self) -> bool:
        """Whether they are as many as MLPerf asks for."""
        return self.queries >= LEAST_QUERIES

    @property
    def times(self) -> dict[str, StageTimes]:
        """Percentiles by stage, in milliseconds."""
        return {stage: StageTimes.of(times) for stage, times in self.seconds.items()}


def measure_latency(
    runtime: HashRuntime,
    pictures: Sequence[str | Path],
    *,
    batch: int = 1,
    queries: int = LEAST_QUERIES,
    warmup: int = 16,
    advance: Callable[[int], None] = lambda batches: None,
) -> dict[str, StageTimes]:
    """Time batches from file to codes; see :func:`measure_single_stream`."""
    stream = measure_single_stream(runtime, pictures, batch=batch, queries=queries, warmup=warmup, advance=advance)
    return stream.times


def measure_single_stream(
    runtime: HashRuntime,
    pictures: Sequence[str | Path],
    *,
    batch: int = 1,
    queries: int = LEAST_QUERIES,
    warmup: int = 16,
    advance: Callable[[int], None] = lambda batches: None,
) -> SingleStream:
    """Time queries from file to codes, one after the other in this thread, each stage on its own.

    Args:
        runtime: the model.
        pictures: image files, taken in turn.
        batch: images in a query; MLPerf's single stream has one.
        queries: queries that are measured.
        warmup: queries before them that are not.
        advance: called with 1 after each query.

    Raises:
        InputError: a number is out of range, or there are no pictures.
        ImageError: a picture cannot be read.
    """
    check_least(batch=(batch, 1), queries=(queries, 1), warmup=(warmup, 0))
    if batch > runtime.batch_size:
        raise InputError(f"--batch {batch} is more than {runtime.batch_size}, the batch size of the runtime")
    if not pictures:
        raise InputError("no pictures to measure with: pass files or folders, or none to have some generated")
    spec = runtime.manifest.preprocessing
    turn = cycle(pictures)
    seconds = {stage: np.empty(queries) for stage in STAGES}
    for query in range(-warmup, queries):
        paths = list(islice(turn, batch))
        start = perf_counter()
        decoded = [load_image(path, spec.background) for path in paths]
        after_decode = perf_counter()
        pixels = np.stack([resize(picture, spec) for picture in decoded])
        after_preprocess = perf_counter()
        runtime.encode_pixels(pixels)
        end = perf_counter()
        if query >= 0:
            spans = (after_decode - start, after_preprocess - after_decode, end - after_preprocess, end - start)
            for stage, span in zip(STAGES, spans, strict=True):
                seconds[stage][query] = span
        advance(1)
    return SingleStream(seconds)


def check_least(**numbers: tuple[int, int]) -> None:
    """Check options against the least that each may be.

    Raises:
        InputError: one is less; it is named as the command's option.
    """
    for name, (value, least) in numbers.items():
        if value < least:
            raise InputError(f"--{name} {value} is less than {least}")


@contextmanager
def generated_pictures() -> Iterator[list[Path]]:
    """Give JPEG files of 640x480 pixels in a temporary folder: smooth colours, edges and a little noise, fixed seed."""
    generator = np.random.default_rng(0)
    width, height = GENERATED_SIZE
    with tempfile.TemporaryDirectory(prefix="admth-bench-") as folder:
        paths = []
        for number in range(_GENERATED):
            coarse = generator.integers(0, 256, (9, 12, 3), dtype=np.uint8)
            smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            pixels = np.asarray(smooth).astype(np.int16) + generator.integers(-8, 9, (height, width, 1))
            path = Path(folder) / f"{number:02}.jpg"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
            paths.append(path)
        yield paths
