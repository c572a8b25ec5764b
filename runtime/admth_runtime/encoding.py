"""Encoding many image files: decoding in threads, inference in batches, and a list of what could not be read."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from admth_runtime.codes_file import EncodedImages
from admth_runtime.cpu import usable_cores
from admth_runtime.errors import ImageError, InputError
from admth_runtime.preprocessing import IMAGE_SUFFIXES, PreprocessingSpec, preprocess
from admth_runtime.results import HashCodes
from admth_runtime.runtime import HashRuntime

__all__ = ["TooManyUnreadableError", "UnreadableImage", "encode_files", "list_images"]

UInt8Array = NDArray[np.uint8]

# So many unreadable images are always collected before a run stops: a small folder is then reported whole, and a
# large one that is hopeless stops early.
_LEAST_BEFORE_STOP = 20


@dataclass(frozen=True)
class UnreadableImage:
    """An image that was left out.

    Attributes:
        path: the file, as it was given; bytes that are no UTF-8 are escaped.
        reason: why, in one line.
    """

    path: str
    reason: str


class TooManyUnreadableError(ImageError):
    """More images than allowed could not be read.

    Attributes:
        unreadable: those found before the run stopped.
    """

    def __init__(self, message: str, unreadable: Sequence[UnreadableImage]) -> None:
        super().__init__(message)
        self.unreadable = tuple(unreadable)


def list_images(paths: Sequence[str | Path], *, recursive: bool = True) -> list[str]:
    """List image files, without reading them.

    Args:
        paths: files, taken whatever their ending, and folders, searched for ``IMAGE_SUFFIXES`` in sorted order.
        recursive: search folders within folders too. Links to folders are not followed.

    Returns:
        The paths as they were given, or below a folder as it was given; each once.

    Raises:
        InputError: a path does not exist, or there is no image in any of them.
    """
    found: dict[str, None] = {}
    for path in paths:
        if Path(path).is_dir():
            found.update(dict.fromkeys(_in_folder(Path(path), recursive)))
        elif Path(path).exists():
            found[str(path)] = None
        else:
            raise InputError(f"{_printable(str(path))}: no such file or folder")
    if not found:
        places = ", ".join(_printable(str(path)) for path in paths)
        raise InputError(f"no images in {places}: files ending in {', '.join(sorted(IMAGE_SUFFIXES))} are looked for")
    return list(found)


def encode_files(
    runtime: HashRuntime,
    uris: Sequence[str],
    *,
    keep_logits: bool = False,
    max_error_rate: float = 0.01,
    advance: Callable[[int], None] = lambda images: None,
) -> tuple[EncodedImages, list[UnreadableImage]]:
    """Encode image files in order, decoding ahead of inference in a bounded pool of threads.

    Args:
        runtime: the model; its ``batch_size`` is the batch.
        uris: paths of image files.
        keep_logits: keep the logits of every length beside the codes.
        max_error_rate: the share of unreadable images, 0 to 1, above which nothing is returned.
        advance: called with the number of images done since the last call.

    Returns:
        The codes of the readable images, with ids 0 to n - 1, and the unreadable ones.

    Raises:
        InputError: ``max_error_rate`` is out of range, or there is no image.
        TooManyUnreadableError: too many images, or all of them, are unreadable.
        DeviceError: the engine failed.
    """
    if not 0.0 <= max_error_rate <= 1.0:
        raise InputError(f"max_error_rate {max_error_rate!r} is not between 0 and 1")
    if not uris:
        raise InputError("no images were given: pass at least one")
    allowed = math.floor(max_error_rate * len(uris) + 1e-9)  # 0.29 * 100 is 28.999...
    model_sha256 = runtime.model_sha256  # now, not after hours in which the file may be replaced
    unreadable: list[UnreadableImage] = []
    readable: list[str] = []
    batch: list[UInt8Array] = []
    parts: list[HashCodes] = []

    def flush() -> None:
        if batch:
            codes = runtime.encode_pixels(np.stack(batch))
            parts.append(codes if keep_logits else HashCodes(codes))
            batch.clear()

    with closing(_decoded(uris, runtime.manifest.preprocessing, window=2 * runtime.batch_size)) as decoded:
        for uri, pixels in decoded:
            if isinstance(pixels, UnreadableImage):
                unreadable.append(pixels)
                if len(unreadable) > max(allowed, _LEAST_BEFORE_STOP):
                    raise _too_many(unreadable, len(uris), max_error_rate, done=len(readable) + len(unreadable))
            else:
                readable.append(uri)
                batch.append(pixels)
                if len(batch) == runtime.batch_size:
                    flush()
            advance(1)
    flush()
    if len(unreadable) > allowed or not readable:
        raise _too_many(unreadable, len(uris), max_error_rate, done=len(uris))
    encoded = EncodedImages(
        ids=np.arange(len(readable), dtype=np.int64),
        uris=tuple(readable),
        codes=HashCodes.concatenate(parts),
        model_sha256=model_sha256,
        preprocessing_sha256=runtime.manifest.preprocessing.digest(),
    )
    return encoded, unreadable


def _in_folder(folder: Path, recursive: bool) -> Iterator[str]:
    for place, folders, files in os.walk(folder, onerror=_raise):
        folders.sort()
        if not recursive:
            folders.clear()
        for name in sorted(files):
            if Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield str(Path(place) / name)


def _raise(error: OSError) -> None:
    raise InputError(f"{error.filename}: the folder cannot be listed ({error.strerror})") from error


def _decoded(
    uris: Sequence[str], spec: PreprocessingSpec, window: int
) -> Generator[tuple[str, UInt8Array | UnreadableImage], None, None]:
    """Decode in threads, at most ``window`` images ahead of the consumer, and yield in order."""
    pool = ThreadPoolExecutor(max_workers=usable_cores(), thread_name_prefix="decode")
    waiting: deque[tuple[str, Future[UInt8Array | UnreadableImage]]] = deque()
    try:
        for uri in uris:
            waiting.append((uri, pool.submit(_decode, uri, spec)))
            if len(waiting) >= window:
                ready, future = waiting.popleft()
                yield ready, future.result()
        while waiting:
            ready, future = waiting.popleft()
            yield ready, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decode(uri: str, spec: PreprocessingSpec) -> UInt8Array | UnreadableImage:
    try:
        uri.encode()
    except UnicodeEncodeError:
        return UnreadableImage(_printable(uri), "its name is not UTF-8: rename the file")
    try:
        return preprocess(uri, spec)
    except ImageError as error:
        return UnreadableImage(_printable(uri), str(error).removeprefix(f"{Path(uri)}: "))


def _too_many(unreadable: Sequence[UnreadableImage], total: int, rate: float, *, done: int) -> TooManyUnreadableError:
    state = f"{len(unreadable):,} of {done:,} images cannot be read"
    if done < total:
        state = f"stopped after {done:,} of {total:,} images: {len(unreadable):,} cannot be read"
    if len(unreadable) == total:
        return TooManyUnreadableError(f"{state}: there is nothing to encode", unreadable)
    return TooManyUnreadableError(
        f"{state}, more than --max-error-rate {rate:g} allows: mend or leave out the files listed, or raise the rate",
        unreadable,
    )


def _printable(path: str) -> str:
    """Escape what cannot be printed on one line of UTF-8."""
    text = path.encode(errors="backslashreplace").decode()
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
