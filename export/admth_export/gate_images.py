"""The images of the parity gate: real ones, from the run's own query split, and a sample of its database."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from admth_export.options import ImageChoice
from admth_runtime.errors import DataError, InputError
from admth_training.data import ImageDataset, open_dataset
from admth_training.loader import PixelLoader
from admth_training.splits import Splits, choose_splits, read_splits
from admth_training.state import SPLITS_FILE

if TYPE_CHECKING:
    from admth_training.checkpoint import TrainedRun

__all__ = ["GateImages", "ImageFacts", "load_gate_images"]


@dataclass(frozen=True)
class ImageFacts:
    """What a report says of the images.

    Attributes:
        dataset: the data set's short name.
        split: where they are from: ``"query"``.
        images: how many were compared.
        split_size: how many the split holds.
        broken: images of the draw that cannot be read and were left out.
        database_images: how many database images were searched; 0 where the effect on retrieval was left out.
        database_size: how many the database holds.
        seed: of the draws.
    """

    dataset: str
    split: str
    images: int
    split_size: int
    broken: int
    database_images: int
    database_size: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dict(vars(self))


@dataclass(frozen=True, eq=False)
class GateImages:
    """The queries, decoded, and the database sample, not yet.

    Attributes:
        pixels: uint8 ``[n, H, W, 3]``, in random order.
        labels: uint8 ``[n, classes]``, multi-hot.
        indices: int64 ``[n]``, the images' numbers in the data set.
        names: what the data set calls them.
        database: the database sample, or None where the effect on retrieval is left out.
        facts: what a report says of them.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    indices: NDArray[np.int64]
    names: tuple[str, ...]
    database: PixelLoader | None
    facts: ImageFacts


def load_gate_images(run: TrainedRun, choice: ImageChoice) -> GateImages:
    """Draw and decode the queries, with the run's own preprocessing.

    Raises:
        DataError: the data is gone or broken, or no image is readable.
        InputError: ``choice.data`` is no data set's name.
    """
    dataset, splits = _open(run, choice)
    rng = np.random.default_rng(choice.seed)
    # Kept in random order, so that the first images, which batches of 1 and 3 take, are of all classes.
    queries = rng.permutation(splits.query)[: choice.images]
    searched = rng.permutation(splits.database)[: choice.database_images]
    spec = run.config.preprocessing
    loader = PixelLoader(dataset, queries, spec)
    loader.prepare("decoding the gate's images")
    batches = list(loader.batches(None, 256))
    if not batches:
        raise DataError(f"none of the {len(queries):,} images of {dataset.name} is readable: pass other --data")
    indices = np.concatenate([batch.indices for batch in batches])
    facts = ImageFacts(
        dataset=dataset.name,
        split="query",
        images=len(indices),
        split_size=len(splits.query),
        broken=len(loader.broken),
        database_images=len(searched),
        database_size=len(splits.database),
        seed=choice.seed,
    )
    return GateImages(
        pixels=np.concatenate([batch.pixels for batch in batches]),
        labels=np.concatenate([batch.labels for batch in batches]),
        indices=indices,
        names=tuple(dataset.describe(int(index)) for index in indices),
        # Encoded once and in batches, so its pixels are not kept.
        database=PixelLoader(dataset, searched, spec, memory_limit_bytes=0) if len(searched) else None,
        facts=facts,
    )


def _open(run: TrainedRun, choice: ImageChoice) -> tuple[ImageDataset, Splits]:
    """Open the data and find its splits: those that the run kept, where they are of this data."""
    config = run.config.data
    kept = run.folder / SPLITS_FILE
    if choice.data is not None:
        dataset = open_dataset(choice.data, root=choice.root, strip_prefix=choice.strip_prefix)
        if kept.is_file():
            try:
                return dataset, read_splits(kept, dataset)
            except DataError:
                pass  # other data than the run's, which is allowed
        return dataset, choose_splits(dataset, seed=config.seed)
    try:
        dataset = open_dataset(config.spec, root=config.root, strip_prefix=config.strip_prefix)
        if kept.is_file():
            return dataset, read_splits(kept, dataset)
    except (DataError, InputError) as error:
        raise DataError(
            f"the data that {run.folder} was trained on cannot be used ({error}): name it with --data"
        ) from error
    return dataset, choose_splits(dataset, query_size=config.query_size, train_size=config.train_size, seed=config.seed)
