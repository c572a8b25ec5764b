"""Data sets of labelled images: Fashion-MNIST, folders of classes, and lists of paths with labels.

Every image of every kind goes through :func:`admth_runtime.preprocessing.preprocess`, the one implementation that the
deployed network uses.
"""

from __future__ import annotations

from admth_training.data.dataset import ArraySource, ImageDataset, ImageSource, PathSource
from admth_training.data.registry import DATASETS, DatasetKind, SourceOptions, open_dataset

__all__ = [
    "DATASETS",
    "ArraySource",
    "DatasetKind",
    "ImageDataset",
    "ImageSource",
    "PathSource",
    "SourceOptions",
    "open_dataset",
]
