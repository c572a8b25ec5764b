"""The frozen listing: every image of a corpus in one Parquet file, a row group a shard."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from admth_runtime.corpus.parquet_images import open_parquet
from admth_runtime.corpus.sources import LIST_SUFFIXES, Listed, Source, list_source, single_line
from admth_runtime.errors import InputError
from admth_runtime.files import atomic_path
from admth_runtime.preprocessing import IMAGE_SUFFIXES

__all__ = ["Listing", "ListingFacts", "write_listing"]

_FIELDS = Listed._fields
_NOTHING_MORE = (None,) * (len(_FIELDS) - 1)


@dataclass(frozen=True)
class ListingFacts:
    """What a listing holds.

    Attributes:
        images: how many images.
        sha256: digest of their names and places, the same on every machine and with every version of Parquet.
    """

    images: int
    sha256: str


def write_listing(
    path: Path,
    sources: Sequence[Source],
    *,
    column: str,
    recursive: bool,
    shard_size: int,
    advance: Callable[[int], None] = lambda images: None,
) -> ListingFacts:
    """List the sources, each image once, and write the listing by rename.

    A shard's rows are in memory at a time, and the names of one folder. Where images may come twice, that is with
    lists, globs and several sources, every name is held once.

    Raises:
        InputError: a source cannot be read, or there is no image in any.
        OutputError: the listing cannot be written.
    """
    images = 0
    digest = hashlib.sha256()
    with atomic_path(path) as temporary, temporary.open("wb") as file, _writer(file) as writer:
        for rows in _chunks(_once(sources, column=column, recursive=recursive), shard_size):
            columns = list(zip(*rows, strict=True))
            digest.update("".join(map(_digested, rows)).encode())
            _write_group(writer, columns)
            images += len(rows)
            advance(len(rows))
        if images == 0:
            raise _nothing_found(sources)
    return ListingFacts(images, digest.hexdigest())


class Listing:
    """A listing on disk, read a shard at a time.

    Raises:
        InputError: it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open_parquet(path)

    def shard(self, number: int) -> list[Listed]:
        """Return the images of a shard, in order.

        Raises:
            InputError: the listing is damaged.
        """
        try:
            table = self._file.read_row_group(number)
            columns = [table.column(name).to_pylist() for name in _FIELDS]
        except Exception as error:  # Arrow's own errors
            raise InputError(
                f"{self._path} is damaged at shard {number}: encode the corpus again with --restart"
            ) from error
        return [Listed(*row) for row in zip(*columns, strict=True)]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _once(sources: Sequence[Source], *, column: str, recursive: bool) -> Iterator[Listed]:
    listed = (each for source in sources for each in list_source(source, column=column, recursive=recursive))
    if len(sources) == 1 and sources[0].kind not in ("list", "glob"):
        yield from listed  # which names nothing twice: millions of names need not be remembered
        return
    seen: set[str] = set()
    for each in listed:
        if each.archive is None:
            if each.uri in seen:
                continue
            seen.add(each.uri)
        yield each


def _chunks(listed: Iterable[Listed], size: int) -> Iterator[list[Listed]]:
    chunk: list[Listed] = []
    for each in listed:
        chunk.append(each)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _digested(row: Listed) -> str:
    # No name holds a NUL, so no two listings are written alike.
    if row[1:] == _NOTHING_MORE:  # an image file, as most are
        return f"{row.uri}\0\0\0\0\0\0"
    # Not the time of change, which a copy does not keep.
    values = (row.archive, row.archive_bytes, row.offset, row.size, row.problem)
    return "".join(f"{'' if value is None else value}\0" for value in (row.uri, *values))


def _writer(file: Any) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetWriter(file, _schema(), compression="zstd", write_page_checksum=True)


def _schema() -> Any:
    import pyarrow as pa

    texts = {"uri", "archive", "problem"}
    return pa.schema([pa.field(name, pa.string() if name in texts else pa.int64(), name != "uri") for name in _FIELDS])


def _write_group(writer: Any, columns: list[tuple[Any, ...]]) -> None:
    import pyarrow as pa

    schema = _schema()
    arrays = [pa.array(column, type=kind.type) for column, kind in zip(columns, schema, strict=True)]
    writer.write_table(pa.table(arrays, schema=schema), row_group_size=len(columns[0]))


def _nothing_found(sources: Sequence[Source]) -> InputError:
    places = ", ".join(single_line(source.path) for source in sources)
    for source in sources:
        if source.kind == "folder":
            for suffix in (".tar", ".parquet", *LIST_SUFFIXES):
                if any(Path(source.path).glob(f"*{suffix}")):
                    return InputError(f"no images in {places}, but {suffix} files: pass  '{source.path}/*{suffix}'")
    return InputError(f"no images in {places}: files ending in {', '.join(sorted(IMAGE_SUFFIXES))} are looked for")
