"""Writing a hand-over: a folder with rows in bulk, schema, queries and instructions, made whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from admth_runtime._version import __version__
from admth_runtime.errors import InputError, OutputError
from admth_runtime.files import write_json
from admth_runtime.handover.elasticsearch import Elasticsearch
from admth_runtime.handover.milvus import Milvus
from admth_runtime.handover.pgvector import PgVector
from admth_runtime.handover.rows import Handover, Rows, Target, part_name
from admth_runtime.handover.vespa import Vespa
from admth_runtime.index import HashIndex

__all__ = ["FORMAT_VERSION", "TARGETS", "HandoverSummary", "export_index"]

FORMAT_VERSION = 1
"""Of ``handover.json``; raised when an older reader would read it wrongly."""

TARGETS: Mapping[str, Callable[[], Target]] = {
    "milvus": Milvus,
    "pgvector": PgVector,
    "vespa": Vespa,
    "elasticsearch": Elasticsearch,
}
"""The writers, by the name that ``--to`` takes."""

_BLOCK = 1 << 14  # images in memory at once: some megabytes with their uris
_SUMMARY = "handover.json"


@dataclass(frozen=True)
class HandoverSummary:
    """What was written.

    Attributes:
        folder: where.
        target: for whom.
        images: how many rows.
        files: names below the folder and their bytes.
    """

    folder: Path
    target: str
    images: int
    files: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


def export_index(
    index: HashIndex,
    target: str,
    out: str | Path,
    *,
    name: str = "images",
    lengths: Sequence[int] | None = None,
    rows_per_file: int | None = None,
    advance: Callable[[int], None] = lambda images: None,
) -> HandoverSummary:
    """Write what a search server takes in bulk, with its schema and the queries that use it.

    The images are passed through a block at a time, so memory stays bounded. The folder gets its name when it is
    complete: an interrupted export leaves nothing.

    Args:
        index: the codes.
        target: ``"milvus"``, ``"pgvector"``, ``"vespa"`` or ``"elasticsearch"``.
        out: the folder to make; it may exist if it is empty.
        name: what the table, collection or index is to be called.
        lengths: the code lengths to hand over; all by default.
        rows_per_file: rows in one file; by default what suits the server.
        advance: called with the number of images done since the last call.

    Raises:
        InputError: an unknown target, an empty index, a name or a row that the server would refuse.
        CodeLengthError: the index has no such length.
        MissingExtraError: the target needs a package that is not installed.
        OutputError: the folder holds something, or cannot be written.
    """
    if target not in TARGETS:
        raise InputError(f"--to {target} is unknown: use one of {', '.join(TARGETS)}")
    if not re.fullmatch("[a-z][a-z0-9_]{0,47}", name):
        raise InputError(f"--name {name!r} is not lower-case letters, digits and _ after a letter: use one like images")
    if rows_per_file is not None and rows_per_file < 1:
        raise InputError(f"--rows-per-file {rows_per_file} is less than 1")
    if len(index) == 0:
        raise InputError("the index holds no images: there is nothing to hand over")
    chosen = tuple(sorted(set(lengths))) if lengths else index.code_lengths
    for length in chosen:
        index.check_length(length)
    writer = TARGETS[target]()
    writer.check(name, chosen)
    folder = Path(out)
    _check_folder(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as temporary:
            made = Path(temporary) / folder.name
            made.mkdir()
            files = _write(index, writer, made, target, name, chosen, rows_per_file or writer.rows_per_file, advance)
            if folder.is_dir():
                folder.rmdir()
            made.rename(folder)
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"cannot write {folder}: {reason}; choose another place with --out") from error
    return HandoverSummary(folder, target, len(index), files)


def _write(
    index: HashIndex,
    writer: Target,
    folder: Path,
    target: str,
    name: str,
    lengths: tuple[int, ...],
    rows_per_file: int,
    advance: Callable[[int], None],
) -> dict[str, int]:
    size = min(_BLOCK, rows_per_file)
    blocks = _Counted(_blocks(index, lengths, size), advance)
    blocks_per_file = rows_per_file // size
    parts: list[str] = []
    while (first := next(blocks, None)) is not None:
        parts.append(part_name(len(parts), writer.suffix))
        writer.write_rows(folder / parts[-1], chain([first], islice(blocks, blocks_per_file - 1)))
    assert blocks.example is not None
    model = f"model {index.model_sha256}" if index.model_sha256 else "an unnamed model"
    handover = Handover(
        name=name,
        images=blocks.images,
        code_lengths=lengths,
        example=blocks.example,
        longest_uri=blocks.longest_uri,
        parts=tuple(parts),
        origin=f"Codes of {', '.join(map(str, lengths))} bits, made by {model}, written by admth {__version__}.",
    )
    for text_name, text in writer.texts(handover).items():
        path = folder / text_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }
    facts = {
        "format_version": FORMAT_VERSION,
        "target": target,
        "name": name,
        "images": blocks.images,
        "code_lengths": list(lengths),
        "bit_order": "msb",
        "model_sha256": index.model_sha256,
        "files": files,
        "created_by": f"admth {__version__}",
    }
    write_json(folder / _SUMMARY, facts)
    for path in [folder / file for file in files]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return {**files, _SUMMARY: (folder / _SUMMARY).stat().st_size}


class _Counted:
    """Blocks on their way, counted and measured, so that schemas can be written after the rows."""

    def __init__(self, blocks: Iterator[Rows], advance: Callable[[int], None]) -> None:
        self._blocks = blocks
        self._advance = advance
        self.images = 0
        self.longest_uri = 0
        self.example: Rows | None = None

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> Rows:
        rows = next(self._blocks)
        if self.example is None:
            codes = {length: table[:1].copy() for length, table in rows.codes.items()}
            self.example = Rows(rows.ids[:1].copy(), rows.uris[:1], codes)
        self.images += len(rows)
        self.longest_uri = max(self.longest_uri, *(len(uri.encode()) for uri in rows.uris))
        self._advance(len(rows))
        return rows


def _blocks(index: HashIndex, lengths: tuple[int, ...], size: int) -> Iterator[Rows]:
    for batch in index.batches(size):
        yield Rows(batch.ids, batch.uris, {length: batch.codes[length] for length in lengths})


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        if any(folder.iterdir()):
            raise OutputError(f"cannot write {folder}: it holds files; empty it, or choose another with --out")
    elif folder.exists():
        raise OutputError(f"cannot write {folder}: a file has that name; choose another with --out")
    elif not folder.absolute().parent.is_dir():
        raise OutputError(f"cannot write {folder}: the folder {folder.parent} does not exist; create it first")
