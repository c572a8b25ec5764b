"""Evaluation of a finished run: encode its queries and its database, and measure every code length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from admth_runtime.console import note
from admth_training.checkpoint import TrainedRun
from admth_training.data import ImageDataset, open_dataset
from admth_training.encode import EncodedSplit, encode_split
from admth_training.evaluation import Evaluation, evaluate_lengths
from admth_training.leakage import check_leakage
from admth_training.loader import PixelLoader
from admth_training.splits import Splits, choose_splits, read_splits
from admth_training.state import SPLITS_FILE

__all__ = ["evaluate_run", "open_run_data"]


def open_run_data(
    run: TrainedRun, *, spec: str | None = None, root: str | Path | None = None, strip_prefix: str | None = None
) -> tuple[ImageDataset, Splits]:
    """Open the images of a run and their splits, or other images with splits of their own.

    Args:
        run: the run; where its images are, and how they were split, is in its folder.
        spec: other images, such as ``"folder:pictures"``; None is the run's.
        root: for other ``list:`` images, the folder that their relative paths start from.
        strip_prefix: for these, a text to cut from the start of each path.

    Raises:
        DataError: the data is missing, broken, or no longer the listing that the run was split from.

    """
    data = run.config.data
    if spec is not None and spec != data.spec:
        dataset = open_dataset(spec, root=root, strip_prefix=strip_prefix)
        return dataset, choose_splits(dataset, seed=data.seed)
    dataset = open_dataset(data.spec, root=data.root, strip_prefix=data.strip_prefix)
    path = run.folder / SPLITS_FILE
    if path.exists():
        return dataset, read_splits(path, dataset)
    return dataset, choose_splits(dataset, query_size=data.query_size, train_size=data.train_size, seed=data.seed)


def evaluate_run(
    run: TrainedRun,
    dataset: ImageDataset,
    splits: Splits,
    *,
    map_cutoffs: Sequence[int | None] = (None,),
    ap_definition: str = "found",
    batch_size: int = 32,
    workers: int | None = None,
) -> Evaluation:
    """Measure the codes of a run, with the FP32 PyTorch network, on whatever device the network is.

    Args:
        run: the run.
        dataset: the images.
        splits: which are queries and which are searched.
        map_cutoffs: the K of each mAP@K; None is all.
        ap_definition: see :func:`admth_training.metrics.evaluate_codes`.
        batch_size: images a pass.
        workers: threads that decode images; None is one a processor.

    Raises:
        DataError: a query is in the database too, or too many images are broken.
        InputError: an argument is out of range.

    """
    leakage = check_leakage(dataset, splits)

    def encode(indices_of: str) -> EncodedSplit:
        indices = getattr(splits, indices_of)
        # Every image is read once, so nothing is kept in memory.
        loader = PixelLoader(dataset, indices, run.config.preprocessing, memory_limit_bytes=0, workers=workers)
        encoded = encode_split(run.network, loader, batch_size=batch_size, description=f"encoding {indices_of}")
        if loader.broken:
            note(f"{len(loader.broken):,} of {len(loader):,} {indices_of} images are broken and left out")
        return encoded

    query, database = encode("query"), encode("database")
    return evaluate_lengths(
        {length: (query.codes[length], database.codes[length]) for length in run.config.network.code_lengths},
        query.labels,
        database.labels,
        map_cutoffs=map_cutoffs,
        ap_definition=ap_definition,
        dataset=dataset.name,
        splits=splits.describe(),
        leakage=leakage,
    )
