"""Which images are queries, which train the network, and which are searched: drawn, stored and checked for leakage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import DataError, InputError
from admth_runtime.files import write_text

if TYPE_CHECKING:
    from admth_training.data import ImageDataset

__all__ = ["Splits", "choose_splits", "make_splits", "read_splits", "write_splits"]

FORMAT_VERSION = 1
_DEFAULT_QUERY_SHARE = 0.1
_DEFAULT_QUERY_LIMIT = 1000

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Splits:
    """Indices into one data set.

    Attributes:
        query: int64 ``[q]``, the images that are searched for.
        train: int64 ``[t]``, the images that the network learns from.
        database: int64 ``[d]``, the images that are searched; it may hold the training images.
        seed: what the splits were drawn with, or None for the splits that come with the data set.
    """

    query: Indices
    train: Indices
    database: Indices
    seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("query", "train", "database"):
            indices = getattr(self, name)
            if indices.ndim != 1 or indices.dtype != np.int64:
                raise InputError(f"{name} indices of dtype {indices.dtype} and shape {indices.shape} are not int64 [n]")
            if len(indices) == 0:
                raise DataError(f"the {name} split is empty: give each split at least one image")
            if len(np.unique(indices)) != len(indices):
                raise DataError(f"the {name} split names an image twice: list every image once")

    @property
    def origin(self) -> str:
        """``"official"``, or ``"drawn"`` with a seed."""
        return "official" if self.seed is None else "drawn"

    def check(self, size: int) -> None:
        """Hold the indices to a data set of ``size`` images.

        Raises:
            DataError: an index is negative or too large.
        """
        for name in ("query", "train", "database"):
            indices = getattr(self, name)
            if indices.min() < 0 or indices.max() >= size:
                wrong = int(indices.min() if indices.min() < 0 else indices.max())
                raise DataError(f"the {name} split names image {wrong}, but the data set has images 0 to {size - 1}")

    def describe(self) -> str:
        """Return one line: the sizes, and how training images and database overlap."""
        inside = int(np.isin(self.train, self.database).sum())
        share = {0: "outside", len(self.train): "inside"}.get(inside, f"{inside:,} of them inside")
        how = "official" if self.seed is None else f"drawn with seed {self.seed}"
        return (
            f"{len(self.query):,} queries, {len(self.train):,} training images ({share} the database), "
            f"database of {len(self.database):,}, {how}"
        )


def choose_splits(
    dataset: ImageDataset,
    *,
    query_size: int | None = None,
    train_size: int | None = None,
    seed: int = 0,
    train_in_database: bool = True,
) -> Splits:
    """Return the splits that come with a data set, or draw some.

    Sizes that are given, or training images outside the database, ask for drawn splits even where official ones
    exist. A size that is not given is a tenth of the images but at most 1,000 for queries, and for training all that
    is left, or half of it where training images are not searched.

    Raises:
        DataError: the sizes do not fit the data set.
    """
    if dataset.official_splits is not None and query_size is None and train_size is None and train_in_database:
        return dataset.official_splits
    if query_size is None:
        query_size = min(_DEFAULT_QUERY_LIMIT, max(1, int(len(dataset) * _DEFAULT_QUERY_SHARE)))
    if train_size is None:
        rest = len(dataset) - query_size
        # A training set outside the database has to leave a database.
        train_size = max(1, rest if train_in_database else rest // 2)
    return make_splits(
        dataset, query_size=query_size, train_size=train_size, seed=seed, train_in_database=train_in_database
    )


def make_splits(
    dataset: ImageDataset, *, query_size: int, train_size: int, seed: int, train_in_database: bool = True
) -> Splits:
    """Draw splits at random: queries, then training images; the database is everything that is no query.

    Where every image has one class, queries and training images are balanced over the classes: a class gives its
    equal share, or all that it has, and then the others fill up. Every class keeps an image outside the queries,
    unless there are too many queries for that.
    A data set with strata gives each stratum its proportional share of queries and of training images.
    Other multi-label data sets are drawn uniformly, as NUS-WIDE and MS-COCO are in the literature.

    Args:
        dataset: the data set.
        query_size: number of queries.
        train_size: number of training images.
        seed: equal seeds give equal splits.
        train_in_database: whether training images are searched too, as most papers do.

    Raises:
        InputError: the seed is negative.
        DataError: a size is not positive, or together they exceed the data set.
    """
    total = len(dataset)
    if seed < 0:
        raise InputError(f"split seed {seed} is negative: use 0 or more")
    for name, size in (("query", query_size), ("train", train_size)):
        if size < 1:
            raise DataError(f"{name} size {size} is not positive: use at least 1")
    if query_size + train_size > total:
        raise DataError(
            f"{query_size:,} queries and {train_size:,} training images exceed the {total:,} images of {dataset.name}: "
            "ask for fewer"
        )
    if not train_in_database and query_size + train_size == total:
        raise DataError(
            f"{query_size:,} queries and {train_size:,} training images leave no database of the {total:,} images: "
            "ask for fewer, or let training images be searched"
        )
    rng = np.random.default_rng(seed)
    everything = np.arange(total, dtype=np.int64)
    query = _draw(dataset, everything, query_size, rng, keep=1)
    rest = np.setdiff1d(everything, query)
    train = _draw(dataset, rest, train_size, rng, keep=0)
    database = rest if train_in_database else np.setdiff1d(rest, train)
    return Splits(query=query, train=train, database=database, seed=seed)


def write_splits(path: str | Path, splits: Splits, dataset: ImageDataset) -> None:
    """Write ``splits.json``: the indices, and the data set's name and listing digest that they belong to.

    Raises:
        OutputError: it cannot be written.
    """
    fields = {
        "format_version": FORMAT_VERSION,
        "dataset": dataset.name,
        "listing_sha256": dataset.listing_digest(),
        "images": len(dataset),
        "origin": splits.origin,
        "seed": splits.seed,
        **{name: getattr(splits, name).tolist() for name in ("query", "train", "database")},
    }
    # One field a line, since one index a line would make a file of 200,000 lines.
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items())
    write_text(path, f"{{\n{lines}\n}}\n")


def read_splits(path: str | Path, dataset: ImageDataset) -> Splits:
    """Read what :func:`write_splits` wrote, for the same data set.

    Raises:
        DataError: the file is missing, malformed, newer than this version, or belongs to another data set.
    """
    fields = _read_fields(Path(path))
    if fields["dataset"] != dataset.name or fields["listing_sha256"] != dataset.listing_digest():
        raise DataError(
            f"{path} was made for {fields['dataset']} with {fields['images']} images, and {dataset.name} with "
            f"{len(dataset)} images is another listing: draw the splits again"
        )
    try:
        query, train, database = (np.asarray(fields[name], dtype=np.int64) for name in ("query", "train", "database"))
        splits = Splits(query=query, train=train, database=database, seed=fields["seed"])
        splits.check(len(dataset))
    except (DataError, InputError, ValueError, TypeError, OverflowError) as error:
        raise DataError(f"{path} is malformed ({error}): draw the splits again") from error
    return splits


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): draw the splits again") from error
    expected = {"format_version", "dataset", "listing_sha256", "images", "seed", "query", "train", "database"}
    if not isinstance(fields, dict) or not expected <= set(fields):
        raise DataError(f"{path} is no splits file of admth: draw the splits again")
    if fields["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {fields['format_version']}, this version reads {FORMAT_VERSION}: "
            "pip install -U admth"
        )
    return fields


def _draw(dataset: ImageDataset, candidates: Indices, size: int, rng: np.random.Generator, *, keep: int) -> Indices:
    """Draw ``size`` of the candidates, sorted; ``keep`` is how many of each class stay behind where that can be."""
    if dataset.strata is not None:
        return _draw_in_proportion(dataset.strata[candidates], candidates, size, rng)
    if not dataset.single_label:
        return np.sort(rng.permutation(candidates)[:size])
    classes = dataset.labels[candidates].argmax(axis=1)
    counts = np.bincount(classes, minlength=dataset.labels.shape[1])
    available = np.maximum(counts - keep, 0)
    quotas = _quotas(available if available.sum() >= size else counts, size, rng)
    chosen = [rng.permutation(candidates[classes == number])[:quota] for number, quota in enumerate(quotas) if quota]
    return np.sort(np.concatenate(chosen))


def _draw_in_proportion(strata: NDArray[np.int64], candidates: Indices, size: int, rng: np.random.Generator) -> Indices:
    """Draw by systematic sampling: every ``len / size``-th image of a list shuffled inside strata, from a random start.

    A stratum of n images gives n * size / len of them, rounded down or up, which rounding shares out fairly.
    """
    shuffled = rng.permutation(len(candidates))
    ordered = shuffled[np.argsort(strata[shuffled], kind="stable")]
    places = (np.arange(size, dtype=np.int64) * len(candidates) + rng.integers(len(candidates))) // size
    return np.sort(candidates[ordered[places]])


def _quotas(available: NDArray[np.int64], size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Share ``size`` evenly over classes of limited supply; what does not divide goes to classes drawn at random."""
    quotas = np.zeros_like(available)
    left = size
    while left:
        open_classes = np.flatnonzero(quotas < available)
        share = left // len(open_classes)
        if share == 0:
            quotas[rng.permutation(open_classes)[:left]] += 1
            break
        taken = np.minimum(available[open_classes] - quotas[open_classes], share)
        quotas[open_classes] += taken
        left -= int(taken.sum())
    return quotas
