"""An index in a folder: files that never change, and ``index.json`` that says which of them make the index.

Saving writes what is new under new names and then replaces ``index.json`` by a rename. A crash before that leaves the
old index, and files that the next save removes; a reader that has the old files mapped keeps them.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from admth_runtime._version import __version__
from admth_runtime.codes_file import BIT_ORDER
from admth_runtime.corpus.layout import sync_folder
from admth_runtime.corpus.lock import locked
from admth_runtime.errors import InputError, OutputError
from admth_runtime.files import make_folder, sha256_of_file, write_json
from admth_runtime.index.arrays_file import read_arrays, write_arrays
from admth_runtime.index.multi_index import PieceTables
from admth_runtime.index.row_starts import FewRepeated, ManyRepeated, RowStarts
from admth_runtime.index.sample import Sample
from admth_runtime.index.segment import MOST_KEY_BITS, Segment, Uris
from admth_runtime.index.state import IndexState, Slot
from admth_runtime.index.tuning import Tuning
from admth_runtime.index.words import word_shape
from admth_runtime.packing import check_code_lengths

__all__ = [
    "INDEX_FILE",
    "INDEX_FORMAT_VERSION",
    "describe_index",
    "is_index",
    "load_state",
    "save_state",
    "verify_files",
]

INDEX_FORMAT_VERSION = 1
"""Raised when an older reader would read an index wrongly."""

INDEX_FILE = "index.json"
_OURS = re.compile(r"(segment|names|deleted|tables|tuning)-[0-9a-f]{12}\.admth")
_LEFTOVER = re.compile(r"\.((segment|names|deleted|tables|tuning)-[0-9a-f]{12}|index)\.\w+\.tmp\.(admth|json)")
_SEGMENT_ARRAYS = {"bucket_keys": "<u2", "bucket_starts": "<u4", "row_ids": "<u4 <i8"}
_MEND = "build the index again"
_NAMES_ARRAYS = {"sorted_ids": "<u4 <i8", "rows_by_id": "<u4", "uri_offsets": "<u8", "uris": "|u1"}


def is_index(path: str | Path) -> bool:
    """Tell whether a folder holds a saved index."""
    return (Path(path) / INDEX_FILE).is_file()


def save_state(state: IndexState, folder: Path) -> IndexState:
    """Write what is new of a state, then make it the folder's index.

    Returns:
        The state, which now knows its files.

    Raises:
        OutputError: the folder holds something else, another index, or one that was changed since it was read; or it
            cannot be written. The index that was there stays.
    """
    own = state.folder == folder.resolve()
    make_folder(folder)
    with locked(folder):
        _check_folder(folder, state.generation if own else 0)
        if not own:
            state = replace(state, slots=tuple(replace(slot, files={}) for slot in state.slots))
        slots = tuple(_save_slot(slot, folder) for slot in state.slots)
        tuning = _save_tuning(state, folder)
        generation = state.generation + 1 if own else 1
        facts: dict[str, Any] = {
            "format": "admth-index",
            "format_version": INDEX_FORMAT_VERSION,
            "generation": generation,
            "bit_order": BIT_ORDER,
            "code_lengths": list(state.code_lengths),
            "model_sha256": state.model_sha256,
            "preprocessing_sha256": state.preprocessing_sha256,
            "created_by": f"admth {__version__}",
            "images": state.count,
            "segments": [{"files": dict(slot.files), "rows": len(slot.segment), "live": slot.live} for slot in slots],
            "tuning": tuning,
            "sha256": _digests(folder, {file for slot in slots for file in slot.files.values()} | {tuning}),
        }
        sync_folder(folder)
        write_json(folder / INDEX_FILE, facts)
        sync_folder(folder)
        _remove_unused(folder, set(facts["sha256"]))
    return replace(state, slots=slots, folder=folder.resolve(), generation=generation)


def load_state(folder: Path, *, memory_map: bool = True) -> IndexState:
    """Read a folder's index: mapped, or with its codes read into memory.

    Raises:
        InputError: there is none, a file of it is missing, truncated or malformed, or its bit order or version is not
            ours.
    """
    facts = _read_facts(folder)
    try:
        lengths = check_code_lengths(facts["code_lengths"])
        slots = [_load_slot(folder, entry["files"], lengths, memory_map=memory_map) for entry in facts["segments"]]
        sample, tunings, tuned_for = _load_tuning(folder / facts["tuning"], lengths)
        state = IndexState(
            code_lengths=lengths,
            model_sha256=facts["model_sha256"],
            preprocessing_sha256=facts["preprocessing_sha256"],
            slots=tuple(slots),
            sample=sample,
            tunings=tunings,
            tuned_for=tuned_for,
            folder=folder.resolve(),
            generation=int(facts["generation"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / INDEX_FILE} is malformed ({error!r}): build the index again") from error
    if state.count != facts.get("images"):
        raise InputError(
            f"{folder} holds {state.count:,} images, not the {facts.get('images')!r} that {INDEX_FILE} says: "
            "build the index again"
        )
    return state


def describe_index(folder: str | Path) -> dict[str, Any]:
    """Describe a saved index, as JSON values.

    Raises:
        InputError: there is none, or a file of it is missing, truncated or malformed.
    """
    folder = Path(folder)
    facts, state = _read_facts(folder), load_state(folder)
    return {
        "index": str(folder),
        "bytes": sum((folder / name).stat().st_size for name in facts["sha256"]),
        "format_version": facts["format_version"],
        "bit_order": facts["bit_order"],
        "created_by": facts["created_by"],
        **state.facts(),
    }


def verify_files(folder: str | Path) -> int:
    """Compare every file of an index with its SHA-256, and return how many there are.

    Raises:
        InputError: one differs or is missing.
    """
    folder = Path(folder)
    digests = _read_facts(folder)["sha256"]
    for name, digest in digests.items():
        if not (folder / name).is_file() or sha256_of_file(folder / name) != digest:
            raise InputError(f"the index file {folder / name} is damaged: build the index again")
    return len(digests)


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / INDEX_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{folder} holds no index ({error.strerror or error}): make one with  admth-run index build"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): build the index again") from error
    if not isinstance(facts, dict) or facts.get("format") != "admth-index":
        raise InputError(f"{path} is not of an admth index: pass a folder that  admth-run index build  wrote")
    version = facts.get("format_version")
    if not isinstance(version, int) or version > INDEX_FORMAT_VERSION:
        raise InputError(
            f"{path}: its format version {version!r} is not {INDEX_FORMAT_VERSION}, which this admth reads: "
            "run  pip install -U admth"
        )
    if facts.get("bit_order") != BIT_ORDER:
        raise InputError(f"{path}: its bit order {facts.get('bit_order')!r} is not {BIT_ORDER!r}: build it again")
    return facts


def _check_folder(folder: Path, generation: int) -> None:
    """Check that saving here replaces the index that was read from here, or nothing."""
    if is_index(folder):
        there = _read_facts(folder).get("generation")
        if there != generation:
            mend = "load it again, then change it" if generation else "remove it first, or choose another place"
            raise OutputError(f"{folder} holds an index that was saved since or by others: {mend}")
        return
    foreign = [name for name in os.listdir(folder) if name != ".lock" and not _ours(name)]  # noqa: PTH208
    if foreign:
        raise OutputError(f"{folder} is not empty, it holds {sorted(foreign)[0]}: choose a new folder for the index")


def _save_slot(slot: Slot, folder: Path) -> Slot:
    files = dict(slot.files)
    segment, starts = slot.segment, slot.segment.row_starts

    def save(
        kind: str, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any], *, name: str | None = None
    ) -> None:
        if (name or kind) not in files:
            files[name or kind] = _new_name(kind)
            write_arrays(folder / files[name or kind], arrays, facts)

    save(
        "segment",
        {
            "bucket_keys": segment.bucket_keys,
            "bucket_starts": segment.bucket_starts,
            **{f"words_{length}": words for length, words in segment.words.items()},
            **(
                {"row_starts": starts.starts}
                if isinstance(starts, ManyRepeated)
                else {"repeated": starts.repeated, "repeated_before": starts.before}
            ),
            "row_ids": segment.row_ids,
        },
        {"code_lengths": list(segment.code_lengths), "id_base": segment.id_base, "groups": segment.groups},
    )
    uris = segment.uris
    save(
        "names",
        {
            "sorted_ids": segment.sorted_ids,
            "rows_by_id": segment.rows_by_id,
            "uri_offsets": uris.offsets,
            "uris": uris.content,
        },
        {},
    )
    if slot.deleted is not None:
        save("deleted", {"deleted": slot.deleted}, {})
    for length, tables in slot.tables.items():
        arrays = {"starts": tables.starts, "groups": tables.groups}
        save("tables", arrays, {"length": length}, name=f"tables-{length}")
    segment.release()
    return replace(slot, files=files)


def _load_slot(folder: Path, files: Mapping[str, str], lengths: tuple[int, ...], *, memory_map: bool) -> Slot:
    segment = _load_segment(folder / files["segment"], folder / files["names"], lengths, memory_map=memory_map)
    deleted = None
    if "deleted" in files:
        deleted = read_arrays(folder / files["deleted"], {"deleted": "|b1"}).arrays["deleted"]
        if deleted.shape != (len(segment),):
            raise InputError(f"{folder / files['deleted']} has {len(deleted):,} rows, not {len(segment):,}: {_MEND}")
    tables = {}
    for name, file in files.items():
        if name.startswith("tables-"):
            found = read_arrays(folder / file, {"starts": "<u4", "groups": "<u4"})
            length = int(found.facts["length"])
            tables[length] = PieceTables(length, found.arrays["starts"], found.arrays["groups"])
            if length not in segment.words or found.arrays["groups"].shape[1:] != (segment.groups,):
                raise InputError(f"{folder / file} does not belong to {files['segment']}: {_MEND}")
    return Slot(segment, deleted, tables, dict(files))


def _load_segment(path: Path, names_path: Path, lengths: tuple[int, ...], *, memory_map: bool) -> Segment:
    codes, names = read_arrays(path, _SEGMENT_ARRAYS), read_arrays(names_path, _NAMES_ARRAYS)
    if tuple(codes.facts["code_lengths"]) != lengths:
        raise InputError(f"{path} has code lengths {codes.facts['code_lengths']}, not {list(lengths)}: {_MEND}")
    arrays = dict(codes.arrays) if memory_map else {name: table.copy() for name, table in codes.arrays.items()}
    if not memory_map:
        codes.release()
    words = {length: arrays[f"words_{length}"] for length in lengths if f"words_{length}" in arrays}
    groups = int(codes.facts["groups"])
    for length in lengths:
        dtype, columns = word_shape(length)
        here = words.get(length)
        if here is None and length == lengths[0] and length <= MOST_KEY_BITS:
            continue
        if here is None or here.dtype != dtype or here.shape != (groups, columns):
            raise InputError(f"{path} lacks the codes of {length} bits: {_MEND}")
    starts: RowStarts
    if "row_starts" in arrays:
        starts = ManyRepeated(arrays["row_starts"])
    else:
        starts = FewRepeated(groups, arrays["repeated"], arrays["repeated_before"])
    segment = Segment(
        code_lengths=lengths,
        bucket_keys=arrays["bucket_keys"],
        bucket_starts=arrays["bucket_starts"],
        words=words,
        row_starts=starts,
        id_base=int(codes.facts["id_base"]),
        row_ids=arrays["row_ids"],
        sorted_ids=names.arrays["sorted_ids"],
        rows_by_id=names.arrays["rows_by_id"],
        uris=Uris(names.arrays["uri_offsets"], names.arrays["uris"]),
        release=names.release,
    )
    _check_sizes(path, segment)
    return segment


def _check_sizes(path: Path, segment: Segment) -> None:
    rows = len(segment)
    sizes = (len(segment.sorted_ids), len(segment.rows_by_id), len(segment.uris), segment.row_starts.rows)
    ends = (int(segment.bucket_starts[-1]), len(segment.bucket_starts) - 1)
    if sizes != (rows,) * 4 or ends != (segment.groups, len(segment.bucket_keys)):
        raise InputError(f"the index file {path} is unusable, its arrays disagree: {_MEND}")


def _save_tuning(state: IndexState, folder: Path) -> str:
    name = _new_name("tuning")
    arrays: dict[str, NDArray[Any]] = {}
    for kind, tuning in state.tunings.items():
        arrays |= {
            f"{kind}_distances": tuning.distances,
            f"{kind}_costs": tuning.costs,
            f"{kind}_near_distances": tuning.near_distances,
            f"{kind}_near_costs": tuning.near_costs,
        }
    facts: dict[str, Any] = {
        "lengths": {kind: tuning.length for kind, tuning in state.tunings.items()},
        "tuned_for": state.tuned_for,
    }
    if state.sample is not None:
        sample = state.sample
        arrays |= {f"sample_codes_{length}": codes for length, codes in sample.codes.items()}
        arrays |= {"sample_keys": sample.keys, "sample_weights": sample.weights}
        facts["sampled_from"] = sample.stands_for
    write_arrays(folder / name, arrays, facts)
    return name


def _load_tuning(path: Path, lengths: tuple[int, ...]) -> tuple[Sample | None, dict[str, Tuning], int]:
    file = read_arrays(path)
    arrays, facts = file.arrays, file.facts
    tunings = {
        kind: Tuning(
            length,
            arrays[f"{kind}_distances"].copy(),
            arrays[f"{kind}_costs"].copy(),
            arrays[f"{kind}_near_distances"].copy(),
            arrays[f"{kind}_near_costs"].copy(),
        )
        for kind, length in facts["lengths"].items()
    }
    sample = None
    if "sampled_from" in facts:
        codes = {length: arrays[f"sample_codes_{length}"].copy() for length in lengths}
        sample = Sample(codes, arrays["sample_keys"].copy(), arrays["sample_weights"].copy(), facts["sampled_from"])
    return sample, tunings, int(facts["tuned_for"])


def _digests(folder: Path, names: set[str]) -> dict[str, str]:
    """Return the SHA-256 of each file; of those that were there before, the one that is known."""
    known = _read_facts(folder).get("sha256", {}) if is_index(folder) else {}
    return {name: known.get(name) or sha256_of_file(folder / name) for name in sorted(names)}


def _remove_unused(folder: Path, used: set[str]) -> None:
    for name in os.listdir(folder):  # noqa: PTH208
        if _ours(name) and name not in used and name != INDEX_FILE:
            with suppress(OSError):  # Windows keeps a file that is mapped; a later save removes it
                (folder / name).unlink()


def _ours(name: str) -> bool:
    return bool(_OURS.fullmatch(name) or _LEFTOVER.fullmatch(name))


def _new_name(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(6)}.admth"
