"""The index: codes of every length that are added, deleted, saved and searched."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.codes_file import CODES_SUFFIXES, EncodedImages, write_codes
from admth_runtime.errors import CodeLengthError, InputError
from admth_runtime.index.hits import SearchHits
from admth_runtime.index.learning import tune
from admth_runtime.index.query import Query, make_query
from admth_runtime.index.sample import Sample
from admth_runtime.index.searching import check_k, search
from admth_runtime.index.segment import Segment, Uris, build_segment
from admth_runtime.index.selection import IdFilter
from admth_runtime.index.state import IndexState, Slot, add_segment, compacted, delete_ids, with_tables
from admth_runtime.index.storage import is_index, load_state, save_state
from admth_runtime.index.tuning import Tuning
from admth_runtime.packing import UInt8Array
from admth_runtime.results import HashCodes

__all__ = ["HashIndex"]


class HashIndex:
    """Codes of every length, found by Hamming distance; equal distances are ordered by ascending id.

    Build one from :class:`~admth_runtime.EncodedImages`, with :meth:`from_codes` or :meth:`load`, or straight to disk
    with :func:`~admth_runtime.index.build_index`.

    Reads may come from many threads, also while another thread changes the index: each sees the state before the
    change or after it, whole. Changes wait for each other.
    """

    def __init__(self, encoded: EncodedImages) -> None:
        segment = build_segment(encoded.ids, dict(encoded.codes), Uris.from_texts(encoded.uris))
        self._begin(
            IndexState(
                encoded.code_lengths,
                encoded.model_sha256,
                encoded.preprocessing_sha256,
                slots=(Slot(segment),) if len(segment) else (),
                sample=Sample.of(encoded.codes),
            )
        )

    def _begin(self, state: IndexState) -> None:
        self._state = state
        self._changing = threading.RLock()

    @classmethod
    def _of(cls, state: IndexState) -> HashIndex:
        index = cls.__new__(cls)
        index._begin(state)
        return index

    @classmethod
    def from_codes(
        cls,
        codes: Mapping[int, UInt8Array],
        *,
        ids: NDArray[np.int64] | None = None,
        uris: Sequence[str] | None = None,
        model_sha256: str | None = None,
    ) -> HashIndex:
        """Index codes that are in memory.

        Args:
            codes: uint8 ``[n, L / 8]`` by code length; a :class:`~admth_runtime.HashCodes` will do.
            ids: int64 ``[n]``, unique; by default 0 to n - 1.
            uris: a text for each image; by default its id.
            model_sha256: the model that made the codes; queries of another are then refused.

        Raises:
            InputError: arrays of a wrong dtype or shape, or ids that repeat.
        """
        if not codes:
            raise InputError("no codes were given: pass uint8 [n, L / 8] by code length")
        count = len(next(iter(codes.values())))
        ids = np.arange(count, dtype=np.int64) if ids is None else np.asarray(ids)
        uris = [str(i) for i in ids] if uris is None else uris
        logits = codes.logits if isinstance(codes, HashCodes) else None
        return cls(EncodedImages(ids, tuple(uris), HashCodes(dict(sorted(codes.items())), logits), model_sha256))

    @classmethod
    def load(cls, path: str | Path, *, memory_map: bool = True) -> HashIndex:
        """Open a saved index, or index encoded images in memory.

        Args:
            path: a folder written by :meth:`save` or ``admth-run index build``; or a file or a corpus folder written by
                :func:`~admth_runtime.write_codes` or ``admth-run encode``.
            memory_map: leave a saved index's codes on disk, where the system reads what a search touches and keeps it
                while memory is free; else read them now. Ids and uris, which only hits touch, stay on disk.

        Raises:
            InputError: the file is missing, damaged or of another format.
        """
        source = Path(path)
        if is_index(source):
            return cls._of(load_state(source, memory_map=memory_map))
        from admth_runtime.index.building import index_sources

        return cls._of(index_sources([source]))

    def save(self, path: str | Path) -> None:
        """Write the index: as a folder, or with the ending ``.parquet`` or ``.npz`` as a file of encoded images.

        A folder is what :meth:`load` maps. Saving again into the folder that an index was loaded from writes only what
        changed. An interrupted save leaves the old index.

        Raises:
            OutputError: it cannot be written, or the folder holds something else, or an index that was changed since
                this one was loaded.
        """
        target = Path(path)
        if target.suffix.lower() in CODES_SUFFIXES:
            write_codes(target, self._encoded(self._state, self._state.ids))
            return
        with self._changing:
            state = self._state
            self._state = save_state(self._tuned(state) if state.count else state, target)

    def __len__(self) -> int:
        return self._state.count

    def __repr__(self) -> str:
        return f"HashIndex(count={len(self)}, code_lengths={self.code_lengths})"

    @property
    def code_lengths(self) -> tuple[int, ...]:
        """The code lengths in bits that can be searched, increasing."""
        return self._state.code_lengths

    @property
    def model_sha256(self) -> str | None:
        """SHA-256 of the model that made the codes, or None when it is not known."""
        return self._state.model_sha256

    @property
    def preprocessing_sha256(self) -> str | None:
        """Digest of the model's preprocessing, or None when it is not known."""
        return self._state.preprocessing_sha256

    @property
    def ids(self) -> NDArray[np.int64]:
        """Every id, int64 ``[n]``, ascending, read-only; made when it is first asked for."""
        return self._state.ids

    @property
    def uris(self) -> tuple[str, ...]:
        """One text for each of ``ids``, made each time; for many images use :meth:`uris_of` or :meth:`batches`."""
        state = self._state
        return tuple(state.uris(state.ids))

    def search(
        self,
        query_codes: UInt8Array | Mapping[int, UInt8Array],
        k: int,
        length: int | None = None,
        *,
        model_sha256: str | None = None,
        mode: str = "exact",
        rerank: str | None = None,
        rerank_depth: int | None = None,
        recall: float = 0.99,
        allow: Sequence[int] | NDArray[np.int64] | None = None,
        deny: Sequence[int] | NDArray[np.int64] | None = None,
    ) -> SearchHits:
        """Find the k nearest codes of each query; equal distances are ordered by ascending id.

        Args:
            query_codes: what :meth:`HashRuntime.encode <admth_runtime.HashRuntime.encode>` returns, or packed
                uint8 ``[q, L / 8]`` of one length.
            k: neighbours a query, at most the number of indexed codes.
            length: the code length to compare; by default the array's own, or the longest there is.
            model_sha256: the model that made the queries, when it is known.
            mode: ``"exact"`` uses multi-index hashing where the index has its tables and it is faster, else a scan;
                ``"flat"`` scans; ``"multi-index"`` insists on the tables; ``"coarse"`` compares only the codes in those
                buckets of the shortest code that are likely, best first by the query's logits. The first three find
                the same.
            rerank: order the nearest anew by the query's logits of every length, ``"weighted"`` or ``"asymmetric"``.
            rerank_depth: how many of the nearest are ordered anew, ties included; by default 100 or 10 k.
            recall: the share of the nearest that ``"coarse"`` aims at, from experience with rows of the index; 1 is
                exact.
            allow: ids that may be found, or None for all.
            deny: ids that may not.

        Raises:
            CodeLengthError: the index or the query has no such length.
            InputError: ``k`` is out of range, the query is malformed, lacks the logits that are needed, or comes from
                another model.
        """
        state = self._state
        _check_model(state, model_sha256)
        check_k(k, state.count)
        query = make_query(
            query_codes,
            k,
            length,
            state.code_lengths,
            mode=mode,
            rerank=rerank,
            rerank_depth=rerank_depth,
            recall=recall,
            use_logits=state.sample is not None,
        )
        tuning = self._tuning(state, query) if mode == "coarse" else None
        chosen = IdFilter(_ids(allow, "allow"), _ids(deny, "deny"))
        return search(state, query, chosen, tuning)

    def uris_of(self, ids: NDArray[np.int64] | Sequence[int]) -> list[str]:
        """Return the uris of ids that :meth:`search` found.

        Raises:
            InputError: an id is not in the index.
        """
        return self._state.uris(np.asarray(ids, dtype=np.int64).reshape(-1))

    def codes_of(self, ids: NDArray[np.int64] | Sequence[int]) -> HashCodes:
        """Return the codes of ids, in their order.

        Raises:
            InputError: an id is not in the index.
        """
        return HashCodes(self._state.codes(np.asarray(ids, dtype=np.int64).reshape(-1)))

    def batches(self, size: int = 10_000) -> Iterator[EncodedImages]:
        """Yield every image by ascending id, at most ``size`` at a time, as they were when the first was asked for."""
        if size < 1:
            raise InputError(f"size {size} is less than 1: ask for batches of one image or more")
        state = self._state
        ids = state.ids
        for first in range(0, len(ids), size):
            yield self._encoded(state, ids[first : first + size])

    def add(self, encoded: EncodedImages, *, replace: bool = False) -> None:
        """Add images. Searches that run go on without them; later ones see all of them.

        Args:
            encoded: codes of the same lengths from the same model.
            replace: whether images that are there under the same ids are replaced.

        Raises:
            InputError: the codes are of another model or other lengths, or ids are there already.
        """
        self.check_same(encoded.code_lengths, encoded.model_sha256)
        if len(encoded):
            segment = build_segment(encoded.ids, dict(encoded.codes), Uris.from_texts(encoded.uris))
            self.add_segments([segment], Sample.of(encoded.codes), replacing=replace)

    def add_segments(
        self, segments: Sequence[Segment], sample: Sample | None, *, replacing: bool = False, renumbering: bool = False
    ) -> None:
        """Add segments, all of them or none; :meth:`add` and :func:`~admth_runtime.index.add_sources` make them.

        Raises:
            InputError: ids are there already.
        """
        with self._changing:
            state = self._state
            lengths = {length for slot in state.slots for length in slot.tables}
            for number, segment in enumerate(segments):
                first = int(state.ids[-1]) + 1 if state.count else 0
                new = segment.renumbered(first) if renumbering else segment
                state = add_segment(state, new, sample if number == 0 else None, replacing=replacing)
            for length in lengths:
                state = with_tables(state, length)
            self._state = state

    def delete(self, ids: NDArray[np.int64] | Sequence[int]) -> None:
        """Delete images by id.

        Raises:
            InputError: an id is not in the index; nothing is deleted then.
        """
        doomed = np.unique(np.asarray(ids, dtype=np.int64))
        with self._changing:
            self._state = delete_ids(self._state, doomed)

    def compact(self) -> None:
        """Join what was added and drop what was deleted, which happens by itself when there is much of it."""
        with self._changing:
            self._state = compacted(self._state)

    def add_multi_index(self, length: int | None = None) -> None:
        """Make the tables for exact search without a scan; 4 bytes for each distinct code and 16 bits of it.

        Args:
            length: the code length; by default the longest.

        Raises:
            CodeLengthError: it is not in the index, or so short that a scan is always faster.
        """
        length = self.code_lengths[-1] if length is None else length
        self.check_length(length)
        if length == self.code_lengths[0] and length <= 16:
            raise CodeLengthError(f"{length} bits are found fastest without tables: choose a longer code length")
        with self._changing:
            self._state = with_tables(self._state, length)

    def check_length(self, length: int) -> None:
        """Check that a code length can be searched.

        Raises:
            CodeLengthError: it is not in the index; the message lists those that are.
        """
        if length not in self.code_lengths:
            there = ", ".join(map(str, self.code_lengths))
            raise CodeLengthError(f"code length {length!r} is not there: this model or file has {there}")

    def check_model(self, model_sha256: str | None) -> None:
        """Check that queries come from the model that made the index; no check when either is unknown.

        Raises:
            InputError: they do not.
        """
        _check_model(self._state, model_sha256)

    def check_same(self, code_lengths: Sequence[int], model_sha256: str | None) -> None:
        """Check that codes can be added.

        Raises:
            InputError: they have other lengths, or are of another model.
        """
        if tuple(code_lengths) != self.code_lengths:
            raise InputError(
                f"codes of {list(code_lengths)} bits cannot join an index of {list(self.code_lengths)}: "
                "encode the images with the index's model"
            )
        _check_model(self._state, model_sha256, what="new codes'")

    def facts(self) -> dict[str, Any]:
        """Return what the index is, as JSON values: counts, lengths, model, segments, and what is tuned."""
        return self._state.facts()

    def _tuning(self, state: IndexState, query: Query) -> Tuning | None:
        """Return how far to probe, learnt when it is first needed."""
        kind = "logits" if query.confident else "distance"
        name = f"{kind}-{query.length}"
        if name in state.tunings or state.count == 0:
            return state.tunings.get(name)
        with self._changing:
            # It may have been learnt while this thread waited; of a state that is newer it serves as well.
            if name not in self._state.tunings:
                self._state = self._state.with_tuning(name, tune(state, kind, query.length))
            return self._state.tunings[name]

    @staticmethod
    def _tuned(state: IndexState) -> IndexState:
        """Learn what searches of the longest code will need, so that the first of a loaded index need not wait."""
        length = state.code_lengths[-1]
        for kind in ("logits", "distance"):
            name = f"{kind}-{length}"
            if name not in state.tunings and (kind == "distance" or state.sample is not None):
                state = state.with_tuning(name, tune(state, kind, length))
        return state

    @staticmethod
    def _encoded(state: IndexState, ids: NDArray[np.int64]) -> EncodedImages:
        return EncodedImages(
            ids, tuple(state.uris(ids)), HashCodes(state.codes(ids)), state.model_sha256, state.preprocessing_sha256
        )


def _check_model(state: IndexState, model_sha256: str | None, *, what: str = "query's") -> None:
    known = state.model_sha256
    if model_sha256 is not None and known is not None and model_sha256 != known:
        raise InputError(
            f"the {what} model {model_sha256[:12]}... is not the index's {known[:12]}...: "
            "encode the images again with this model, or query with the model that encoded them"
        )


def _ids(ids: Sequence[int] | NDArray[np.int64] | None, name: str) -> NDArray[np.int64] | None:
    if ids is None:
        return None
    array = np.asarray(ids).reshape(-1)
    if array.size and array.dtype.kind not in "iu":
        raise InputError(f"{name} holds {array.dtype}, not ids: pass whole numbers")
    return array.astype(np.int64)
