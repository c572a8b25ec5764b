"""Throughput when all images are there at once: MLPerf's offline scenario, stage by stage and end to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Any

from admth_runtime.bench import STAGES, check_least
from admth_runtime.decode_threads import DecodeThreads
from admth_runtime.encoding import encode_files
from admth_runtime.errors import InputError
from admth_runtime.preprocessing import load_image, resize
from admth_runtime.runtime import HashRuntime

__all__ = ["Offline", "measure_offline"]

_DECODED = 16  # pictures that are kept decoded for the resize


@dataclass(frozen=True)
class Offline:
    """Images a second, by stage.

    Attributes:
        samples: images that each stage took.
        batch: images in one inference call.
        rates: decode and preprocess in the runtime's decoding threads, inference on ready pixels, and the whole from
            files to codes with decoding ahead of inference.
    """

    samples: int
    batch: int
    rates: dict[str, float]


def measure_offline(
    runtime: HashRuntime,
    pictures: Sequence[str | Path],
    *,
    samples: int = 1024,
    advance: Callable[[int], None] = lambda images: None,
) -> Offline:
    """Measure how many images a second each stage does alone, and all of them together.

    Args:
        runtime: the model; its ``batch_size`` is the batch.
        pictures: image files, taken in turn.
        samples: images that each stage takes.
        advance: called with a number of images done; they sum up to four times ``samples``.

    Raises:
        InputError: ``samples`` is less than 1, or there are no pictures.
        ImageError: a picture cannot be read.
    """
    check_least(samples=(samples, 1))
    if not pictures:
        raise InputError("no pictures to measure with: pass files or folders, or none to have some generated")
    paths = list(islice(cycle(pictures), samples))
    seconds = [*_decode_and_resize(runtime, paths, advance), _infer(runtime, paths, advance)]
    _ = runtime.model_sha256  # it is kept, and takes time only once
    start = perf_counter()
    encode_files(runtime, [str(path) for path in paths], max_error_rate=0.0, advance=advance)
    seconds.append(perf_counter() - start)
    rates = {stage: samples / spent for stage, spent in zip(STAGES, seconds, strict=True)}
    return Offline(samples, runtime.batch_size, rates)


def _decode_and_resize(
    runtime: HashRuntime, paths: Sequence[str | Path], advance: Callable[[int], None]
) -> tuple[float, float]:
    """Return the seconds that decoding, and resizing, take in threads; results are dropped as they come."""
    spec, batch = runtime.manifest.preprocessing, runtime.batch_size
    load = partial(load_image, background=spec.background)
    threads = DecodeThreads(runtime.decode_threads)

    def timed(work: Callable[[Any], Any], items: Sequence[Any]) -> float:
        start = perf_counter()
        for place in range(0, len(items), batch):
            advance(len(threads.map(work, items[place : place + batch])))
        return perf_counter() - start

    try:
        decoded = threads.map(load, paths[:_DECODED])
        return timed(load, paths), timed(partial(resize, spec=spec), list(islice(cycle(decoded), len(paths))))
    finally:
        threads.close()


def _infer(runtime: HashRuntime, paths: Sequence[str | Path], advance: Callable[[int], None]) -> float:
    """Return the seconds that inference on ready pixels takes."""
    batch = runtime.batch_size
    ready = runtime.preprocess(paths[:batch])
    runtime.encode_pixels(ready)
    start = perf_counter()
    for place in range(0, len(paths), batch):
        part = ready[: len(paths) - place]
        runtime.encode_pixels(part)
        advance(len(part))
    return perf_counter() - start
