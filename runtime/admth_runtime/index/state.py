"""What an index is at one moment: segments, deleted rows, tuning. Changing one makes another; readers keep theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import InputError
from admth_runtime.index.multi_index import PieceTables, build_piece_tables
from admth_runtime.index.sample import Sample
from admth_runtime.index.segment import Segment, Uris, build_segment
from admth_runtime.index.selection import IdFilter, Selection, everything, select
from admth_runtime.index.tuning import Tuning
from admth_runtime.packing import UInt8Array

__all__ = ["IndexState", "Slot", "add_segment", "compacted", "delete_ids", "with_tables"]

Ids = NDArray[np.int64]

# Segments beyond this many are joined: each costs a search its own overhead.
_MOST_SEGMENTS = 8
# Small segments are joined among themselves while a larger one is at least so many times their sum.
_LARGE = 4
# With more than this share of its rows deleted a segment is made anew.
_MOST_DELETED = 0.25


@dataclass(frozen=True, eq=False)
class Slot:
    """A segment with what belongs to it.

    Attributes:
        segment: the codes.
        deleted: which rows are deleted, bool ``[n]``, or None.
        tables: tables for multi-index hashing by code length.
        files: names in the index's folder of those parts that are saved: ``segment``, ``deleted``, ``tables-64``.
    """

    segment: Segment
    deleted: NDArray[np.bool_] | None = None
    tables: Mapping[int, PieceTables] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def selection(self) -> Selection:
        """The rows that are not deleted."""
        return everything(self.segment) if self.deleted is None else select(self.segment, self.deleted, IdFilter())

    @cached_property
    def live(self) -> int:
        """How many rows are not deleted."""
        return len(self.segment) - (0 if self.deleted is None else int(self.deleted.sum()))

    def select(self, chosen: IdFilter) -> Selection:
        """Return the rows that are not deleted and pass a filter."""
        return self.selection if chosen.empty else select(self.segment, self.deleted, chosen)

    def find(self, ids: Ids) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """Return place among the sorted ids and row of each id, and which of the ids are here and not deleted."""
        places, here = self.segment.places(ids)
        rows = np.zeros(len(ids), dtype=np.int64)
        rows[here] = self.segment.rows_by_id[places[here]]
        if self.deleted is not None:
            here = here & ~self.deleted[rows] if len(self.deleted) else here
        return places, rows, here


@dataclass(frozen=True, eq=False)
class IndexState:
    """An index at one moment.

    Attributes:
        code_lengths: increasing.
        model_sha256: of the model that made the codes, or None.
        preprocessing_sha256: of its preprocessing, or None.
        slots: the segments; an id is live in one of them at most.
        sample: rows whose logits were given, to tune with.
        tunings: how far to probe, by :func:`tuning_name`, as far as it was learnt.
        tuned_for: the number of rows when it was.
        folder: where the saved parts are, or None.
        generation: how often the folder's index was saved when this was read from it.
    """

    code_lengths: tuple[int, ...]
    model_sha256: str | None = None
    preprocessing_sha256: str | None = None
    slots: tuple[Slot, ...] = ()
    sample: Sample | None = None
    tunings: Mapping[str, Tuning] = field(default_factory=dict)
    tuned_for: int = 0
    folder: Path | None = None
    generation: int = 0

    @cached_property
    def count(self) -> int:
        """The number of images."""
        return sum(slot.live for slot in self.slots)

    @cached_property
    def ids(self) -> Ids:
        """Every id, ascending. Made when it is asked for."""
        parts = []
        for slot in self.slots:
            ids = slot.segment.all_ids()
            parts.append(ids if slot.deleted is None else ids[~slot.deleted[slot.segment.rows_by_id]])
            slot.segment.release()
        found = parts[0] if len(parts) == 1 else np.sort(np.concatenate([np.empty(0, dtype=np.int64), *parts]))
        found.flags.writeable = False
        return found

    def facts(self) -> dict[str, Any]:
        """Return what the index is, as JSON values."""
        return {
            "images": self.count,
            "code_lengths": list(self.code_lengths),
            "model_sha256": self.model_sha256,
            "preprocessing_sha256": self.preprocessing_sha256,
            "distinct_codes": sum(slot.segment.groups for slot in self.slots),
            "segments": len(self.slots),
            "deleted": sum(len(slot.segment) - slot.live for slot in self.slots),
            "multi_index": sorted({length for slot in self.slots for length in slot.tables}),
            "sampled_logits": 0 if self.sample is None else len(self.sample.keys),
        }

    def with_tuning(self, name: str, tuning: Tuning) -> IndexState:
        """Return the state with one more thing learnt."""
        return replace(self, tunings={**self.tunings, name: tuning}, tuned_for=max(self.tuned_for, self.count))

    def present(self, ids: Ids) -> NDArray[np.bool_]:
        """Tell which ids are in the index."""
        found = np.zeros(len(ids), dtype=np.bool_)
        for slot in self.slots:
            found |= slot.find(ids)[2]
            slot.segment.release()
        return found

    def located(self, ids: Ids) -> Iterator[tuple[Slot, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """Yield each segment that holds some of the ids: which of them, their places and their rows.

        Raises:
            InputError: an id is not in the index.
        """
        missing = np.ones(len(ids), dtype=np.bool_)
        for slot in self.slots:
            places, rows, here = slot.find(ids)
            missing &= ~here
            which = np.flatnonzero(here)
            if len(which):
                yield slot, which, places[which], rows[which]
        if missing.any():
            raise InputError(f"the ids {ids[missing][:5].tolist()} are not in this index")

    def uris(self, ids: Ids) -> list[str]:
        """Return the uri of each id.

        Raises:
            InputError: an id is not in the index.
        """
        found = [""] * len(ids)
        for slot, which, places, _ in self.located(ids):
            for number, uri in zip(which.tolist(), slot.segment.uris.texts(places), strict=True):
                found[number] = uri
            slot.segment.release()
        return found

    def codes(self, ids: Ids) -> dict[int, UInt8Array]:
        """Return the codes of each id, uint8 ``[m, L / 8]`` by length.

        Raises:
            InputError: an id is not in the index.
        """
        found = {length: np.empty((len(ids), length // 8), dtype=np.uint8) for length in self.code_lengths}
        for slot, which, _, rows in self.located(ids):
            groups = slot.segment.groups_of(rows)
            for length, table in found.items():
                table[which] = slot.segment.codes(length, groups)
            slot.segment.release()
        return found


def add_segment(state: IndexState, segment: Segment, sample: Sample | None, *, replacing: bool = False) -> IndexState:
    """Return the state with more rows.

    Args:
        state: the state.
        segment: the rows.
        sample: some of them whose logits are known.
        replacing: whether rows that are there under the same ids are deleted.

    Raises:
        InputError: ids are there already, and ``replacing`` is false.
    """
    ids = segment.all_ids()
    there = ids[state.present(ids)]
    if len(there):
        if not replacing:
            raise InputError(
                f"{len(there):,} ids are in the index already, {int(there[0])} first: "
                "replace them, give the new images other ids, or delete the old ones"
            )
        state = delete_ids(state, there)
    tuned = state.count + len(segment) <= 2 * state.tuned_for
    return _joined_where_many(
        replace(
            state,
            slots=(*state.slots, Slot(segment)),
            sample=Sample.joined(state.sample, sample),
            tunings=state.tunings if tuned else {},
            tuned_for=state.tuned_for if tuned else 0,
        )
    )


def delete_ids(state: IndexState, ids: Ids) -> IndexState:
    """Return the state without some rows.

    Raises:
        InputError: an id is not in the index.
    """
    doomed = {id(slot): rows for slot, _, _, rows in state.located(ids)}
    slots = []
    for slot in state.slots:
        rows = doomed.get(id(slot))
        if rows is None:
            slots.append(slot)
            continue
        deleted = np.zeros(len(slot.segment), dtype=np.bool_) if slot.deleted is None else slot.deleted.copy()
        deleted[rows] = True
        share = float(deleted.mean())
        if share < 1:
            files = {name: file for name, file in slot.files.items() if name != "deleted"}
            kept = Slot(slot.segment, deleted, slot.tables, files)
            slots.append(_joined([kept]) if share > _MOST_DELETED else kept)
    return replace(state, slots=tuple(slots))


def compacted(state: IndexState) -> IndexState:
    """Return the state as one segment without deleted rows."""
    if len(state.slots) <= 1 and all(slot.deleted is None for slot in state.slots):
        return state
    return replace(state, slots=(_joined(state.slots),) if state.count else ())


def with_tables(state: IndexState, length: int) -> IndexState:
    """Return the state with tables for multi-index hashing at a length."""
    slots = [
        slot
        if length in slot.tables
        else replace(slot, tables={**slot.tables, length: build_piece_tables(slot.segment, length)})
        for slot in state.slots
    ]
    return replace(state, slots=tuple(slots))


def _joined_where_many(state: IndexState) -> IndexState:
    if len(state.slots) <= _MOST_SEGMENTS:
        return state
    large = max(state.slots, key=lambda slot: slot.live)
    small = [slot for slot in state.slots if slot is not large]
    if large.live >= _LARGE * sum(slot.live for slot in small):
        return replace(state, slots=(large, _joined(small)))
    return compacted(state)


def _joined(slots: Sequence[Slot]) -> Slot:
    """Make one segment of the live rows of several."""
    ids, uris = [], []
    codes: dict[int, list[UInt8Array]] = {length: [] for length in slots[0].segment.code_lengths}
    for slot in slots:
        segment = slot.segment
        places = np.arange(len(segment), dtype=np.int64)
        if slot.deleted is not None:
            places = places[~slot.deleted[segment.rows_by_id]]
        groups = segment.groups_of(segment.rows_by_id[places].astype(np.int64))
        ids.append(segment.all_ids()[places])
        uris.append(segment.uris if slot.deleted is None else segment.uris.in_order(places))
        for length, tables in codes.items():
            tables.append(segment.codes(length, groups))
    made = build_segment(
        np.concatenate(ids),
        {length: np.concatenate(tables) for length, tables in codes.items()},
        Uris.concatenate(uris),
    )
    lengths = {length for slot in slots for length in slot.tables}
    return Slot(made, tables={length: build_piece_tables(made, length) for length in lengths})
