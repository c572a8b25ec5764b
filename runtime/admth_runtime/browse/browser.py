"""What the page of ``admth-run browse`` asks: facts of the index, its images, and searches at every code length."""

from __future__ import annotations

import base64
import math
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from admth_runtime.browse.files import CorpusFiles, open_picture, read_thumbnail, thumbnail
from admth_runtime.cpu import usable_cores
from admth_runtime.errors import ImageError, InputError
from admth_runtime.index import HashIndex, SearchHits
from admth_runtime.packing import hamming_distance
from admth_runtime.preprocessing import resize
from admth_runtime.results import HashCodes
from admth_runtime.runtime import HashRuntime

__all__ = ["MOST_NEIGHBOURS", "Asked", "Browser", "UnknownImageError"]

MOST_NEIGHBOURS = 100
_MOST_LISTED = 200
_THUMBNAIL_SIDE = 160
_PREVIEW_SIDE = 320
_THUMBNAILS_KEPT = 2048
_FILTERS_KEPT = 8
_RERANKS = ("", "weighted", "asymmetric")
# Uris that one request for images looks through for a filter, about a tenth of a second; the next one goes on.
_LOOKED_AT = 300_000
_URIS_AT_ONCE = 1000
_DEEPEST = 4096


@dataclass(frozen=True)
class Asked:
    """What is asked of every code length.

    Attributes:
        k: neighbours, 1 to ``MOST_NEIGHBOURS``.
        filter_text: only images whose uri contains it, in any case; empty for all.
        rerank: empty for the order of Hamming distances, or ``"weighted"`` or ``"asymmetric"``: the nearest are ordered
            anew by the query's logits.
    """

    k: int = 10
    filter_text: str = ""
    rerank: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= MOST_NEIGHBOURS:
            raise InputError(f"the parameter k is {self.k}, not between 1 and {MOST_NEIGHBOURS}")
        if self.rerank not in _RERANKS:
            raise InputError(f"the parameter rerank is {self.rerank[:40]!r}, not empty, weighted or asymmetric")


class UnknownImageError(InputError):
    """An id that the index does not have."""


class Browser:
    """Answers the page; knows nothing of HTTP. Safe to share between threads.

    Args:
        index: the corpus's codes, of at least one image.
        runtime: the model that made them.
        files: opens the corpus's images.
        name: what the page calls the index.

    Raises:
        InputError: the index is empty, of another model, or has a code length that the model has not.
    """

    def __init__(self, index: HashIndex, runtime: HashRuntime, files: CorpusFiles, *, name: str) -> None:
        if len(index) == 0:
            raise InputError(f"{name} holds no images: encode some first")
        index.check_model(runtime.model_sha256)
        if absent := sorted(set(index.code_lengths) - set(runtime.code_lengths)):
            raise InputError(f"{runtime.model_path} makes no codes of {absent} bits, which {name} holds")
        self._index = index
        self._runtime = runtime
        self._files = files
        self._name = name
        self._ids = index.ids
        self._stride = _stride(len(index))
        self._decoding = threading.BoundedSemaphore(usable_cores() + 1)  # a picture may take 256 MiB
        self._lock = threading.Lock()
        self._thumbnails: OrderedDict[int, tuple[bytes, str]] = OrderedDict()
        self._matching: OrderedDict[str, NDArray[np.int64]] = OrderedDict()
        self.version = secrets.token_hex(8)
        """Changes with every start, so that a web browser keeps no thumbnail of another index."""

    def describe(self) -> dict[str, Any]:
        """Return what the page says of index and model."""
        runtime = self._runtime
        return {
            "images": len(self._index),
            "code_lengths": list(self._index.code_lengths),
            "index": self._name,
            "model": runtime.model_path.name,
            "model_sha256": runtime.model_sha256,
            "engine": f"{runtime.engine.name} {runtime.engine.version}",
            "device": runtime.device,
            "threads": runtime.threads,
            "version": self.version,
        }

    def images(self, filter_text: str, *, after: int, limit: int) -> dict[str, Any]:
        """List images whose uri contains a text, in the index's order; without a text, spread over the whole corpus.

        Args:
            filter_text: the text, in any case; empty for all images.
            after: where to go on, the ``next`` of the answer before, or 0.
            limit: the most images.

        Returns:
            ``images`` with id and uri, ``looked_at``, and ``next``, which is None at the end. A request looks at a
            bounded number of uris, so ``images`` may be empty although there are more.
        """
        if not 1 <= limit <= _MOST_LISTED:
            raise InputError(f"the parameter limit is {limit}, not between 1 and {_MOST_LISTED}")
        count = len(self._ids)
        if not 0 <= after <= count:
            raise InputError(f"the parameter after is {after}, not between 0 and {count}")
        wanted = filter_text.casefold()
        found = []
        following = after
        for place, image, uri in self._walk(after, min(after + _LOOKED_AT, count), spread=not wanted):
            following = place + 1
            if wanted in uri.casefold():
                found.append({"id": str(image), "uri": uri})
                if len(found) == limit:
                    break
        return {"images": found, "looked_at": following, "next": following if following < count else None}

    def search_id(self, image: int, asked: Asked) -> dict[str, Any]:
        """Search with an image of the corpus: encoded again, or by its stored codes where its file is gone.

        Raises:
            UnknownImageError: the index has no such id.
        """
        uri = self._uri(image)
        try:
            with self._files.open(uri) as file:
                return self._search_file(file, uri, image, asked)
        except ImageError as error:
            codes = self._index.codes_of(np.array([image]))
            note = f"{error}. Its stored codes are used; how sure each bit is was not stored."
            return self._answer(codes, {}, asked, image=image, name=uri, picture=None, note=note)

    def search_upload(self, file: BinaryIO, name: str, asked: Asked) -> dict[str, Any]:
        """Search with an image that is not in the corpus.

        Raises:
            ImageError: it is no image, truncated or too large.
        """
        return self._search_file(file, name[:200] or "the image", None, asked)

    def thumbnail(self, image: int) -> tuple[bytes, str]:
        """Return a small version of an image of the corpus, and its media type.

        Raises:
            UnknownImageError: the index has no such id.
            ImageError: its file is gone, unreadable, or outside the corpus.
        """
        with self._lock:
            if image in self._thumbnails:
                self._thumbnails.move_to_end(image)
                return self._thumbnails[image]
        uri = self._uri(image)
        with self._decoding, self._files.open(uri) as file:
            made = read_thumbnail(file, uri, _THUMBNAIL_SIDE)
        with self._lock:
            self._thumbnails[image] = made
            if len(self._thumbnails) > _THUMBNAILS_KEPT:
                self._thumbnails.popitem(last=False)
        return made

    def _search_file(self, file: BinaryIO, name: str, image: int | None, asked: Asked) -> dict[str, Any]:
        spec = self._runtime.manifest.preprocessing
        with self._decoding:
            start = time.perf_counter()
            picture = open_picture(file, name, spec.background)
            decoded = time.perf_counter()
            pixels = resize(picture, spec)
            resized = time.perf_counter()
            codes = self._runtime.encode_pixels(pixels[None])
            inferred = time.perf_counter()
        times = {"decode": decoded - start, "resize": resized - decoded, "inference": inferred - resized}
        note = None
        if image is not None and (moved := self._moved_bits(image, codes)):
            note = f"The file's code differs from the stored one in {moved} bits: it was encoded from other pixels."
        return self._answer(codes, times, asked, image=image, name=name, picture=picture, note=note)

    def _answer(
        self,
        codes: HashCodes,
        times: Mapping[str, float],
        asked: Asked,
        *,
        image: int | None,
        name: str,
        picture: Image.Image | None,
        note: str | None,
    ) -> dict[str, Any]:
        allowed = self._ids_matching(asked.filter_text) if asked.filter_text else None
        searched = len(self._index) if allowed is None else len(allowed)
        lengths = self._index.code_lengths
        query = {
            "id": None if image is None else str(image),
            "name": name,
            "width": picture.width if picture else None,
            "height": picture.height if picture else None,
            "preview": _data_url(picture) if picture else None,
            "note": note,
            "codes": [
                {
                    "length": length,
                    "hex": codes.hex(length)[0],
                    "margins": [round(abs(float(z)), 4) for z in codes.logits[length][0]] if codes.logits else None,
                }
                for length in lengths
            ],
        }
        return {
            "query": query,
            "milliseconds": {stage: round(1000 * seconds, 3) for stage, seconds in times.items()},
            "results": [
                self._nearest(codes, min(asked.k, searched), length, allowed, asked.rerank) for length in lengths
            ],
            "filter": asked.filter_text,
            "rerank": asked.rerank if codes.logits else "",
            "searched": searched,
        }

    def _nearest(
        self, codes: HashCodes, k: int, length: int, allowed: NDArray[np.int64] | None, rerank: str
    ) -> dict[str, Any]:
        if k == 0:
            return {"length": length, "milliseconds": 0.0, "neighbours": []}
        start = time.perf_counter()
        hits = self._search(codes, k, length, allowed, rerank if codes.logits and rerank else None)
        seconds = time.perf_counter() - start
        ids = hits.ids[0]
        texts = self._index.codes_of(ids).hex(length)
        neighbours: list[dict[str, Any]] = [
            {"id": str(image), "uri": uri, "distance": int(distance), "hex": text}
            for image, uri, distance, text in zip(ids, self._index.uris_of(ids), hits.distances[0], texts, strict=True)
        ]
        if hits.scores is not None:
            for neighbour, score in zip(neighbours, hits.scores[0], strict=True):
                neighbour["score"] = round(float(score), 3)
        return {"length": length, "milliseconds": round(1000 * seconds, 3), "neighbours": neighbours}

    def _search(
        self, codes: HashCodes, k: int, length: int, allowed: NDArray[np.int64] | None, rerank: str | None
    ) -> SearchHits:
        """Search among the allowed ids: where they are many, among all, deep enough to find k of them."""
        deep = 0 if allowed is None or rerank else 2 * k * len(self._ids) // len(allowed) + k
        while allowed is not None and 0 < deep <= _DEEPEST:
            hits = self._index.search(codes, min(deep, len(self._ids)), length)
            places = np.minimum(np.searchsorted(allowed, hits.ids[0]), len(allowed) - 1)
            kept = np.flatnonzero(allowed[places] == hits.ids[0])[:k]
            if len(kept) == k:
                return SearchHits(hits.ids[:, kept], hits.distances[:, kept])
            deep *= 4
        return self._index.search(codes, k, length, allow=allowed, rerank=rerank)

    def _walk(self, start: int, stop: int, *, spread: bool) -> Iterator[tuple[int, int, str]]:
        """Yield place, id and uri of images by ascending id, or spread over the corpus."""
        for first in range(start, stop, _URIS_AT_ONCE):
            places = np.arange(first, min(first + _URIS_AT_ONCE, stop))
            ids = self._ids[places * self._stride % len(self._ids) if spread else places]
            yield from zip(places.tolist(), ids.tolist(), self._index.uris_of(ids), strict=True)

    def _uri(self, image: int) -> str:
        try:
            return self._index.uris_of(np.array([image], dtype=np.int64))[0]
        except InputError as error:
            raise UnknownImageError(f"the index has no image {image}") from error

    def _moved_bits(self, image: int, codes: HashCodes) -> int:
        stored = self._index.codes_of(np.array([image]))
        return sum(int(hamming_distance(codes[length], stored[length])[0]) for length in stored)

    def _ids_matching(self, filter_text: str) -> NDArray[np.int64]:
        wanted = filter_text.casefold()
        with self._lock:
            if wanted in self._matching:
                self._matching.move_to_end(wanted)
                return self._matching[wanted]
        rows = [
            start + row
            for start in range(0, len(self._ids), _URIS_AT_ONCE)
            for row, uri in enumerate(self._index.uris_of(self._ids[start : start + _URIS_AT_ONCE]))
            if wanted in uri.casefold()
        ]
        ids = self._ids[rows]  # ascending, as self._ids is
        with self._lock:
            self._matching[wanted] = ids
            if len(self._matching) > _FILTERS_KEPT:
                self._matching.popitem(last=False)
        return ids


def _stride(count: int) -> int:
    """Return a step that visits every one of ``count`` rows once, neighbours in turn far apart: the golden ratio's."""
    step = max(1, round(count * 0.618))
    while math.gcd(step, count) > 1:
        step += 1
    return step


def _data_url(picture: Image.Image) -> str:
    content, kind = thumbnail(picture, _PREVIEW_SIDE)
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
