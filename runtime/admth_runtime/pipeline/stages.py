"""The work of each stage on one frame or one batch; :mod:`admth_runtime.pipeline.pipeline` runs them in threads."""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import AdmthError, DeviceError, ImageError
from admth_runtime.pipeline.frames import Entry, FrameResult
from admth_runtime.pipeline.stats import StageClock
from admth_runtime.preprocessing import PreprocessingSpec, load_image, preprocess, resize
from admth_runtime.results import HashCodes
from admth_runtime.runtime import HashRuntime

__all__ = ["Assembler", "Decoder", "Inference", "one_line", "results_of"]

UInt8Array = NDArray[np.uint8]

# One batch is inferred, one is ready and one is assembled. A batch is assembled only once the one before it has been
# queued, and that queue holds one, so the batch three before has left the engine and its array is free.
_BUFFERS = 3


class Decoder:
    """Turns a frame into the network's pixels, or into its error.

    Args:
        spec: the model's preprocessing.
        decode: clock of decoding: reading a file, or calling the frame's function.
        preprocessing: clock of cropping and resizing.
    """

    def __init__(self, spec: PreprocessingSpec, decode: StageClock, preprocessing: StageClock) -> None:
        self._spec, self._decode, self._preprocess = spec, decode, preprocessing

    def __call__(self, entry: Entry) -> None:
        """Fill in the entry's ``pixels`` or ``error``, and let its frame go."""
        frame, entry.frame = entry.frame, None
        if frame is None or frame.error is not None:
            entry.error = frame.error if frame else "the frame is gone"
            return
        image = frame.image
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == self._spec.shape:
            entry.pixels = image  # copied into the batch, so any strides will do
            return
        try:
            entry.pixels = self._pixels(image)
        except Exception as error:  # a function of the user's may raise anything, and so may a damaged picture
            entry.error = one_line(error).removeprefix(f"{Path(entry.uri)}: ")

    def _pixels(self, image: Any) -> UInt8Array:
        start, loaded = perf_counter(), False
        try:
            if callable(image):
                image = image()
            if isinstance(image, (str, os.PathLike)):
                path = os.fspath(image)
                _check_name(path)
                image, loaded = load_image(path, self._spec.background), True
        except BaseException:
            self._decode.add(perf_counter() - start, errors=1)
            raise
        middle = perf_counter()
        self._decode.add(middle - start)
        try:
            pixels = resize(image, self._spec) if loaded else preprocess(image, self._spec)
        except BaseException:
            self._preprocess.add(perf_counter() - middle, errors=1)
            raise
        self._preprocess.add(perf_counter() - middle)
        return pixels


class Assembler:
    """Copies the pixels of a batch into one array.

    Args:
        size: the most images in a batch.
        shape: the network's input for one image.
        clock: the stage's clock.
    """

    def __init__(self, size: int, shape: tuple[int, int, int], clock: StageClock) -> None:
        self._buffers = [np.empty((size, *shape), np.uint8) for _ in range(_BUFFERS)]
        self._turn, self._clock = 0, clock

    def __call__(self, entries: list[Entry]) -> UInt8Array:
        """Return uint8 ``[n, H, W, 3]``: the entries that have pixels, in order; valid until two more calls."""
        start = perf_counter()
        self._turn = (self._turn + 1) % _BUFFERS
        buffer, count = self._buffers[self._turn], 0
        for entry in entries:
            if entry.pixels is not None:
                buffer[count] = entry.pixels
                entry.pixels = None
                count += 1
        self._clock.add(perf_counter() - start, frames=len(entries))
        return buffer[:count]


class Inference:
    """Runs the model on batches, and puts up with a few failures of the engine.

    Args:
        runtime: the model.
        most_failures: so many failing calls in a row are too many.
        clock: the stage's clock.
    """

    def __init__(self, runtime: HashRuntime, most_failures: int, clock: StageClock) -> None:
        self._runtime, self._most, self._clock = runtime, most_failures, clock
        self._failures = 0

    def __call__(self, entries: list[Entry], pixels: UInt8Array) -> HashCodes | None:
        """Return the codes of the pixels, or None when the engine failed, which is then the entries' error.

        Raises:
            DeviceError: it has failed too often in a row.
            InputError: the runtime was closed.
        """
        if not len(pixels):
            return None
        start = perf_counter()
        try:
            codes = self._runtime.encode_pixels(pixels)
        except DeviceError as error:
            self._clock.add(perf_counter() - start, frames=len(pixels), errors=len(pixels))
            self._failures += 1
            if self._failures >= self._most:
                raise
            for entry in entries:
                entry.error = entry.error or str(error)
            return None
        self._failures = 0
        self._clock.add(perf_counter() - start, frames=len(pixels))
        return codes


def results_of(entries: list[Entry], codes: HashCodes | None) -> list[FrameResult]:
    """Pair the entries of a batch, in order, with the rows of its codes."""
    results, row = [], 0
    for entry in entries:
        if entry.error is None:
            results.append(FrameResult(entry.id, entry.uri, entry.timestamp, None, codes, row))
            row += 1
        else:
            results.append(FrameResult(entry.id, entry.uri, entry.timestamp, entry.error, None, -1))
    return results


def one_line(error: BaseException) -> str:
    """Say on one line what an exception is; ours speak for themselves."""
    text = " ".join(str(error).split())
    if isinstance(error, AdmthError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _check_name(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ImageError("its name is not UTF-8: rename the file") from error
