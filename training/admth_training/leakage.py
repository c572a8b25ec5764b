"""Leakage: images that are both query and searched or trained on, which make retrieval figures look better."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from admth_runtime.console import track
from admth_runtime.errors import DataError
from admth_training.data import ImageDataset
from admth_training.splits import Splits

__all__ = ["LeakageReport", "check_leakage"]

_NAMED = 5


@dataclass(frozen=True)
class LeakageReport:
    """What was found in splits without an error.

    Attributes:
        query_size: number of queries.
        train_size: number of training images.
        database_size: number of database images.
        train_in_database: how many training images are in the database; most papers have all of them there.
        content_checked: whether the stored bytes were compared; without it the next two say nothing.
        identical_queries: queries whose stored bytes equal those of a database or training image.
        identical_in_train: how many of these equal a training image.
        examples: some of these, as (query, other image).
        unreadable: files that could not be read for the comparison.
    """

    query_size: int
    train_size: int
    database_size: int
    train_in_database: int
    content_checked: bool
    identical_queries: int
    identical_in_train: int
    examples: tuple[tuple[str, str], ...]
    unreadable: int

    def warnings(self) -> list[str]:
        """Return one line for each thing that a reader of the figures has to know."""
        lines = []
        if self.identical_queries:
            query, other = self.examples[0]
            lines.append(
                f"{self.identical_queries:,} of {self.query_size:,} queries are identical to a database or training "
                f"image ({self.identical_in_train:,} to a training image), such as {query} and {other}"
            )
        if self.unreadable:
            lines.append(f"{self.unreadable:,} files could not be read, so the check for identical images skipped them")
        return lines

    def facts(self) -> list[str]:
        """Return the lines that state what is as intended."""
        return [f"{self.train_in_database:,} of {self.train_size:,} training images are in the database"]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "query_size": self.query_size,
            "train_size": self.train_size,
            "database_size": self.database_size,
            "train_in_database": self.train_in_database,
            "content_checked": self.content_checked,
            "identical_queries": self.identical_queries,
            "identical_in_train": self.identical_in_train,
            "examples": [list(pair) for pair in self.examples],
            "unreadable": self.unreadable,
        }


def check_leakage(dataset: ImageDataset, splits: Splits, *, content: bool = True) -> LeakageReport:
    """Check that no query is searched or trained on.

    One image in two places is an error: it would find itself. Two images with the same stored bytes are counted and
    reported, since real data sets have some and the published splits keep them. The same picture in two encodings
    is not recognised.

    Args:
        dataset: the data set.
        splits: its splits.
        content: compare stored bytes as well; of files only those that are equal in size are read.

    Raises:
        DataError: an image, by number or by file (links followed), is both a query and in the database or training set.
    """
    splits.check(len(dataset))
    others = np.union1d(splits.database, splits.train)
    _check_indices(dataset, splits)
    sizes, unreadable = _check_files(dataset, splits, others)
    pairs: list[tuple[int, int]] = []
    if content:
        pairs, failed = _identical_pairs(dataset, splits.query.tolist(), others.tolist(), sizes)
        unreadable |= failed
    train = set(splits.train.tolist())
    identical = {query for query, _ in pairs}
    return LeakageReport(
        query_size=len(splits.query),
        train_size=len(splits.train),
        database_size=len(splits.database),
        train_in_database=int(np.isin(splits.train, splits.database).sum()),
        content_checked=content,
        identical_queries=len(identical),
        identical_in_train=len({query for query, other in pairs if other in train}),
        examples=tuple((dataset.describe(query), dataset.describe(other)) for query, other in pairs[:_NAMED]),
        unreadable=len(unreadable) if content else 0,
    )


def _check_indices(dataset: ImageDataset, splits: Splits) -> None:
    for name in ("database", "train"):
        shared = np.intersect1d(splits.query, getattr(splits, name))
        if len(shared):
            raise DataError(
                f"{len(shared):,} images are in both query and {name}, such as {dataset.describe(int(shared[0]))}: "
                "leave each image in one of them"
            )


def _check_files(
    dataset: ImageDataset, splits: Splits, others: np.ndarray[Any, np.dtype[np.int64]]
) -> tuple[dict[int, int], set[int]]:
    """Refuse a file that two names lead to; return the size of each file, and which files cannot be seen."""
    sizes: dict[int, int] = {}
    unreadable: set[int] = set()
    queries: dict[tuple[int, int], int] = {}
    query_size = len(splits.query)
    for place, index in enumerate([*splits.query.tolist(), *others.tolist()]):
        path = dataset.sources.path(index)
        if path is None:
            continue
        try:
            status = path.stat()
        except OSError:
            unreadable.add(index)
            continue
        sizes[index] = status.st_size
        # Device and inode name the file itself, whatever links lead to it.
        file = (status.st_dev, status.st_ino)
        if place < query_size:
            queries.setdefault(file, index)
        elif file in queries:
            raise DataError(
                f"query {dataset.describe(queries[file])} and database or training image {path} are the same file: "
                "leave it in one of them"
            )
    return sizes, unreadable


def _identical_pairs(
    dataset: ImageDataset, queries: list[int], others: list[int], sizes: dict[int, int]
) -> tuple[list[tuple[int, int]], set[int]]:
    """Return (query, other image) for equal stored bytes, each query with every equal image, in order."""
    shared_sizes = {sizes.get(index) for index in queries} & {sizes.get(index) for index in others}
    in_files = dataset.sources.path(queries[0]) is not None
    candidates = [i for i in [*queries, *others] if (sizes.get(i) in shared_sizes and i in sizes) or not in_files]
    digests, unreadable = _digests(dataset, candidates)
    places: dict[bytes, list[int]] = {}
    for index in others:
        if index in digests:
            places.setdefault(digests[index], []).append(index)
    pairs = [(query, other) for query in queries if query in digests for other in places.get(digests[query], ())]
    return pairs, unreadable


def _digests(dataset: ImageDataset, indices: list[int]) -> tuple[dict[int, bytes], set[int]]:
    found = {index: _digest(dataset, index) for index in track(indices, "checking for leakage", unit="images")}
    digests = {index: digest for index, digest in found.items() if digest is not None}
    return digests, set(found) - set(digests)


def _digest(dataset: ImageDataset, index: int) -> bytes | None:
    try:
        return hashlib.blake2b(dataset.sources.content(index), digest_size=16).digest()
    except OSError:
        return None
