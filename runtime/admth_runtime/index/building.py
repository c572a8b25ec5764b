"""Building an index from what ``admth-run encode`` wrote: encoded files and corpora, of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from admth_runtime.codes_file import EncodedImages, read_codes
from admth_runtime.corpus.layout import CORPUS_FILE
from admth_runtime.errors import InputError, OutputError
from admth_runtime.index.hash_index import HashIndex
from admth_runtime.index.sample import Sample
from admth_runtime.index.segment import Uris, build_segment
from admth_runtime.index.state import IndexState, add_segment
from admth_runtime.index.storage import is_index
from admth_runtime.results import HashCodes

__all__ = ["add_sources", "build_index", "index_sources", "read_sources"]

# Rows of a segment: what is sorted at once takes some 100 bytes a row.
_MOST_ROWS = 1 << 24


def read_sources(sources: Sequence[str | Path]) -> Iterator[EncodedImages]:
    """Yield the encoded images of files and corpus folders, part by part, in order.

    Raises:
        InputError: a source is missing, damaged, of another format, or of another model than the first.
    """
    first: EncodedImages | None = None
    for source in map(Path, sources):
        for part in _parts(source):
            first = part if first is None else first
            _check_same(first, part, source)
            yield part


def build_index(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    multi_index: bool = False,
    advance: Callable[[int], None] | None = None,
) -> HashIndex:
    """Build an index from encoded files and corpora, and save it.

    Args:
        sources: files that ``admth-run encode`` wrote, and folders of corpora.
        out: the folder to make.
        multi_index: whether to make the tables for exact search of the longest code without a scan.
        advance: called with the number of images that were read since its last call.

    Returns:
        The index, mapped from ``out``.

    Raises:
        InputError: a source is missing or damaged, two are of different models, or an id comes twice.
        OutputError: ``out`` holds an index or other files already, or cannot be written.
    """
    out = Path(out)
    if is_index(out):
        raise OutputError(f"{out} holds an index already: choose another --out, or use  admth-run index add")
    index = HashIndex._of(index_sources(sources, advance=advance))
    if multi_index:
        index.add_multi_index()
    index.save(out)
    return HashIndex.load(out)


def add_sources(
    index: HashIndex,
    sources: Sequence[str | Path],
    *,
    replace: bool = False,
    renumber: bool = False,
    advance: Callable[[int], None] | None = None,
) -> int:
    """Add encoded files and corpora to an index, all of them or none.

    Args:
        index: the index; it is not saved.
        sources: as for :func:`build_index`, of the index's model.
        replace: whether images that are there under the same ids are replaced.
        renumber: whether the new images get ids after the largest that is there.
        advance: called with the number of images that were read since its last call.

    Returns:
        How many images were added.

    Raises:
        InputError: a source is missing or damaged, of another model or other lengths, or ids are there already.
    """
    made = index_sources(sources, advance=advance)
    index.check_same(made.code_lengths, made.model_sha256)
    index.add_segments([slot.segment for slot in made.slots], made.sample, replacing=replace, renumbering=renumber)
    return made.count


def index_sources(sources: Sequence[str | Path], *, advance: Callable[[int], None] | None = None) -> IndexState:
    """Index encoded files and corpora in memory; see :func:`build_index`."""
    state: IndexState | None = None
    waiting = _Waiting()
    for part in read_sources(sources):
        if state is None:
            state = IndexState(part.code_lengths, part.model_sha256, part.preprocessing_sha256)
        state = replace(
            state,
            model_sha256=state.model_sha256 or part.model_sha256,
            preprocessing_sha256=state.preprocessing_sha256 or part.preprocessing_sha256,
        )
        waiting.take(part)
        if waiting.rows >= _MOST_ROWS:
            state, waiting = waiting.into(state), _Waiting()
        if advance is not None:
            advance(len(part))
    if state is None:
        raise InputError("there is nothing to index: pass a file or a corpus that  admth-run encode  wrote")
    return waiting.into(state)


class _Waiting:
    """Rows that were read and are in no segment yet; of their logits only a sample is kept."""

    def __init__(self) -> None:
        self.rows = 0
        self._ids: list[NDArray[np.int64]] = []
        self._codes: list[HashCodes] = []
        self._uris: list[Uris] = []
        self._sample: Sample | None = None

    def take(self, part: EncodedImages) -> None:
        self._ids.append(part.ids)
        self._codes.append(HashCodes(part.codes))
        self._uris.append(Uris.from_texts(part.uris))
        self._sample = Sample.joined(self._sample, Sample.of(part.codes))
        self.rows += len(part)

    def into(self, state: IndexState) -> IndexState:
        """Return the state with these rows."""
        if self.rows == 0:
            return state
        codes = HashCodes.concatenate(self._codes)
        segment = build_segment(np.concatenate(self._ids), dict(codes), Uris.concatenate(self._uris))
        return add_segment(state, segment, self._sample)


def _parts(source: Path) -> Iterator[EncodedImages]:
    if source.is_dir() and (source / CORPUS_FILE).exists():
        from admth_runtime.corpus import read_corpus

        yield from read_corpus(source).parts()
    else:
        yield read_codes(source)


def _check_same(first: EncodedImages, part: EncodedImages, source: Path) -> None:
    if part.code_lengths != first.code_lengths:
        raise InputError(f"{source} has codes of {list(part.code_lengths)} bits, not {list(first.code_lengths)}")
    known, found = first.model_sha256, part.model_sha256
    if known is not None and found is not None and found != known:
        raise InputError(
            f"{source} is of the model {found[:12]}..., the first of {known[:12]}...: index the codes of one model"
        )
