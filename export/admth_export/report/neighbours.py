"""The report's proof for the eye: queries with their nearest images, at the shortest and at the longest code."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from admth_runtime.codes_file import EncodedImages, read_codes
from admth_runtime.console import note, track
from admth_runtime.errors import ImageError, InputError
from admth_runtime.index import HashIndex
from admth_runtime.preprocessing import load_image, to_rgb
from admth_runtime.runtime import HashRuntime
from admth_training.checkpoint import RunConfig
from admth_training.data import ImageDataset, open_dataset
from admth_training.splits import choose_splits, read_splits
from admth_training.state import SPLITS_FILE

__all__ = ["Neighbour", "Neighbours", "Picture", "QueryRow", "neighbours_of_files", "neighbours_of_run"]

NEAREST = 10
_THUMBNAIL = 96
_DATABASE_LIMIT = 20_000
_SEED = 0


@dataclass(frozen=True)
class Picture:
    """An image of the report.

    Attributes:
        name: its path, or its name inside its data set.
        label: its class or classes, or None where they are not known.
        data_uri: the thumbnail as a ``data:`` address, or None where the image cannot be read.
    """

    name: str
    label: str | None
    data_uri: str | None


@dataclass(frozen=True)
class Neighbour:
    """One found image.

    Attributes:
        picture: the image.
        distance: Hamming distance to the query, in bits.
        right: whether it shares a class with the query, or None where a class is not known.
    """

    picture: Picture
    distance: int
    right: bool | None


@dataclass(frozen=True)
class QueryRow:
    """One query and what was found, by code length."""

    query: Picture
    found: dict[int, list[Neighbour]]


@dataclass(frozen=True)
class Neighbours:
    """Queries and their neighbours, and where they come from.

    Attributes:
        rows: the queries.
        lengths: the code lengths that are shown, increasing.
        source: one sentence: which images were searched, and how labels are known.
    """

    rows: list[QueryRow]
    lengths: tuple[int, ...]
    source: str

    def right_share(self, length: int) -> tuple[int, int]:
        """Count the right neighbours, and all whose class is known, at one code length."""
        marks = [hit.right for row in self.rows for hit in row.found[length] if hit.right is not None]
        return sum(marks), len(marks)


@dataclass(frozen=True)
class _Side:
    """Encoded images with what the report shows of each: classes as a set, or None, and the picture itself."""

    encoded: EncodedImages
    classes: Callable[[int], frozenset[str] | None]
    thumbnail: Callable[[int], Image.Image | None]


def neighbours_of_files(query_file: Path, database_file: Path, count: int, *, model_sha256: str | None) -> Neighbours:
    """Search encoded files, as ``admth-run encode`` writes them; classes are the names of the images' folders.

    Args:
        query_file: the encoded queries.
        database_file: the encoded images to search.
        count: queries to show.
        model_sha256: the model of the report; files of another one are refused.

    Raises:
        InputError: a file is unusable, or the two, or the model, do not belong together.
    """
    sides = []
    for path in (query_file, database_file):
        encoded = read_codes(path)
        if len(encoded) == 0:
            raise InputError(f"{path} holds no images: encode some first")
        if model_sha256 is not None and encoded.model_sha256 not in (None, model_sha256):
            raise InputError(
                f"{path} was encoded by another model ({str(encoded.model_sha256)[:12]}...): encode the images again"
            )
        sides.append(_side_of_file(path, encoded))
    queries, database = sides
    source = (
        f"{len(database.encoded):,} images of {database_file.name} were searched with queries of {query_file.name}. "
        "An image's class is the name of the folder that it lies in."
    )
    return _search(queries, database, count, source)


def neighbours_of_run(run: Path, config: RunConfig, model: Path, count: int) -> Neighbours:
    """Encode images of the run's own splits and search them; at most 20,000 of the database, drawn by seed 0.

    Args:
        run: the run's folder, which holds its splits.
        config: the run's configuration, which names its data.
        model: the ONNX model.
        count: queries to show.

    Raises:
        DataError: the data is gone or broken.
        ModelError: the model is unusable.
    """
    data = config.data
    dataset = open_dataset(data.spec, root=data.root, strip_prefix=data.strip_prefix)
    if (run / SPLITS_FILE).is_file():
        splits = read_splits(run / SPLITS_FILE, dataset)
    else:
        splits = choose_splits(dataset, query_size=data.query_size, train_size=data.train_size, seed=data.seed)
    generator = np.random.default_rng(_SEED)
    searched = splits.database
    if len(searched) > _DATABASE_LIMIT:
        searched = np.sort(generator.permutation(searched)[:_DATABASE_LIMIT])
    with HashRuntime(model) as runtime:
        database = _side_of_dataset(runtime, dataset, searched, "encoding the database")
        queries = _side_of_dataset(runtime, dataset, _spread(dataset, splits.query, count), "encoding the queries")
    whole = len(database.encoded) == len(splits.database)
    share = f"All {len(database.encoded):,}" if whole else f"{len(database.encoded):,} of {len(splits.database):,}"
    source = f"{share} database images of {dataset.name} were searched."
    return _search(queries, database, count, source)


def _search(queries: _Side, database: _Side, count: int, source: str) -> Neighbours:
    lengths = queries.encoded.code_lengths
    if lengths != database.encoded.code_lengths:
        raise InputError(
            f"queries have codes of {list(lengths)} bits and the database of {list(database.encoded.code_lengths)}: "
            "encode both with one model"
        )
    index = HashIndex(database.encoded)
    index.check_model(queries.encoded.model_sha256)
    row_of = {int(image): row for row, image in enumerate(database.encoded.ids)}
    chosen = _chosen(queries, count)
    shown = tuple(dict.fromkeys((lengths[0], lengths[-1])))
    hits = {
        length: index.search(np.ascontiguousarray(queries.encoded.codes[length][chosen]), min(NEAREST, len(index)))
        for length in shown
    }
    rows = []
    for place, query in enumerate(track(chosen, "collecting pictures")):
        found = {
            length: [
                _neighbour(queries, query, database, row_of[int(image)], int(distance))
                for image, distance in zip(hits[length].ids[place], hits[length].distances[place], strict=True)
            ]
            for length in shown
        }
        rows.append(QueryRow(_picture(queries, query), found))
    return Neighbours(rows, shown, source)


def _neighbour(queries: _Side, query: int, database: _Side, row: int, distance: int) -> Neighbour:
    wanted, found = queries.classes(query), database.classes(row)
    right = None if wanted is None or found is None else bool(wanted & found)
    return Neighbour(_picture(database, row), distance, right)


def _picture(side: _Side, row: int) -> Picture:
    classes, image = side.classes(row), side.thumbnail(row)
    return Picture(
        name=side.encoded.uris[row],
        label=None if classes is None else ", ".join(sorted(classes)),
        data_uri=None if image is None else _data_uri(image),
    )


def _chosen(side: _Side, count: int) -> list[int]:
    """Take queries from every class in turn, by order and never by result, so that the picture flatters nobody."""
    groups: dict[frozenset[str] | None, list[int]] = {}
    for row in range(len(side.encoded)):
        groups.setdefault(side.classes(row), []).append(row)
    turns = [rows[turn] for turn in range(count) for rows in groups.values() if turn < len(rows)]
    return turns[:count]


def _spread(dataset: ImageDataset, indices: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the few queries that :func:`_chosen` may take, so that not all need encoding."""
    kept: list[int] = []
    seen: dict[bytes, int] = {}
    for index in indices.tolist():
        key = dataset.labels[index].tobytes()
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= count and len(kept) < count * len(dataset.class_names):
            kept.append(index)
    return np.asarray(kept, dtype=np.int64)


def _side_of_dataset(
    runtime: HashRuntime, dataset: ImageDataset, indices: NDArray[np.int64], description: str
) -> _Side:
    spec = runtime.manifest.preprocessing
    readable: list[int] = []

    def pixels() -> Iterator[NDArray[np.uint8]]:
        for index in track(indices.tolist(), description, unit="images"):
            try:
                image = dataset.load(index, spec)
            except ImageError as error:
                note(f"left out: {error}")
                continue
            readable.append(index)
            yield image

    codes = runtime.encode(pixels())
    encoded = EncodedImages(
        ids=np.arange(len(readable), dtype=np.int64),
        uris=tuple(dataset.describe(index) for index in readable),
        codes=codes,
        model_sha256=runtime.model_sha256,
    )

    def classes(row: int) -> frozenset[str]:
        names = np.flatnonzero(dataset.labels[readable[row]])
        return frozenset(dataset.class_names[name] for name in names)

    def thumbnail(row: int) -> Image.Image | None:
        stored = dataset.sources.get(readable[row])
        return load_image(stored) if isinstance(stored, Path) else to_rgb(Image.fromarray(stored))

    return _Side(encoded, classes, thumbnail)


def _side_of_file(path: Path, encoded: EncodedImages) -> _Side:
    folders = [PurePath(uri).parent.name for uri in encoded.uris]

    def classes(row: int) -> frozenset[str] | None:
        return frozenset((folders[row],)) if folders[row] else None

    def thumbnail(row: int) -> Image.Image | None:
        # Addresses stay as they were typed, so they start from where the images were encoded, or are absolute.
        for place in (Path(), path.parent):
            if (place / encoded.uris[row]).is_file():
                try:
                    return load_image(place / encoded.uris[row])
                except ImageError as error:
                    note(f"no picture: {error}")
        return None

    return _Side(encoded, classes, thumbnail)


def _data_uri(image: Image.Image) -> str:
    """Return a thumbnail: PNG where the image is small already, else JPEG, which is smaller."""
    small = max(image.size) <= _THUMBNAIL // 2
    if not small:
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    if small:
        gray = image.convert("L")
        plain = gray if gray.convert("RGB").tobytes() == image.tobytes() else image
        plain.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=85, optimize=True)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
