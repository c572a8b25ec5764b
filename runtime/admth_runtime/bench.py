"""Latency of decoding, preprocessing, inference and the whole, as an edge device would see it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image

from admth_runtime.errors import InputError
from admth_runtime.preprocessing import load_image, resize
from admth_runtime.runtime import HashRuntime

__all__ = ["GENERATED_SIZE", "STAGES", "StageTimes", "generated_pictures", "measure_latency"]

STAGES = ("decode", "preprocess", "inference", "end to end")
GENERATED_SIZE = (640, 480)

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
    def of(cls, seconds: Sequence[float]) -> StageTimes:
        """Summarise times in seconds; percentiles are interpolated linearly between neighbours."""
        times = np.asarray(seconds) * 1e3
        p50, p90, p99 = np.percentile(times, (50, 90, 99))
        return cls(float(p50), float(p90), float(p99), float(times.mean()), float(times.max()))


def measure_latency(
    runtime: HashRuntime,
    pictures: Sequence[str | Path],
    *,
    batch: int = 1,
    queries: int = 256,
    warmup: int = 16,
    advance: Callable[[int], None] = lambda batches: None,
) -> dict[str, StageTimes]:
    """Time batches from file to codes, one after the other, each stage on its own.

    Args:
        runtime: the model.
        pictures: image files, taken in turn.
        batch: images in a batch.
        queries: batches that are measured.
        warmup: batches before them that are not.
        advance: called with the number of batches done since the last call.

    Returns:
        The times of each of ``STAGES``.

    Raises:
        InputError: a number is out of range, or there is no picture.
        ImageError: a picture cannot be read.
    """
    for name, value, least in (("batch", batch, 1), ("queries", queries, 1), ("warmup", warmup, 0)):
        if value < least:
            raise InputError(f"--{name} {value} is less than {least}")
    if batch > runtime.batch_size:
        raise InputError(f"--batch {batch} is more than {runtime.batch_size}, the batch size of the runtime")
    if not pictures:
        raise InputError("no pictures to measure with: pass files or folders, or none to have some generated")
    spec = runtime.manifest.preprocessing
    turn = cycle(pictures)
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
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
                seconds[stage].append(span)
        advance(1)
    return {stage: StageTimes.of(times) for stage, times in seconds.items()}


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
