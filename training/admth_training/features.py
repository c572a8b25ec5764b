"""Where training gets its batches from: pixels for a trained trunk, features for a frozen one.

A frozen trunk gives the same features in every epoch, so they are computed once, for every image and its mirror, and
kept in memory. Where they do not fit, the trunk runs again in every epoch, which gives the same numbers to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from admth_runtime.console import note, progress
from admth_training.data.memory import available_memory_bytes
from admth_training.encode import inference
from admth_training.loader import Batch, PixelLoader
from admth_training.network import MultiLengthHashNetwork

__all__ = ["BatchSource", "CachedFeatures", "FeatureStream", "PixelStream", "TrainingBatch", "make_source"]

_TRUNK_BATCH = 32


@dataclass(frozen=True)
class TrainingBatch:
    """What one step trains on.

    Attributes:
        inputs: on the network's device; uint8 pixels ``[b, H, W, 3]``, or float32 features ``[b, c, grid, grid]``.
        labels: multi-hot uint8 ``[b, classes]``, there too.
        indices: int64 ``[b]``, the images' numbers in the data set.

    """

    inputs: Tensor
    labels: Tensor
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)


class BatchSource(Protocol):
    """Gives an epoch's batches.

    Attributes:
        from_pixels: whether the inputs are pixels, for the whole network, or features, for its heads.

    """

    from_pixels: bool

    def batches(
        self, order: NDArray[np.int64], mirrored: NDArray[np.bool_] | None, batch_size: int
    ) -> Iterator[TrainingBatch]:
        """Yield the images in an order.

        Args:
            order: positions in the loader's images.
            mirrored: bool over the whole data set, which images to mirror; None for none.
            batch_size: images a batch; broken ones are left out of theirs.

        """
        ...


class PixelStream:
    """Pixels, mirrored image by image."""

    from_pixels = True

    def __init__(self, loader: PixelLoader, device: torch.device) -> None:
        self._loader = loader
        self._device = device

    def batches(
        self, order: NDArray[np.int64], mirrored: NDArray[np.bool_] | None, batch_size: int
    ) -> Iterator[TrainingBatch]:
        """See :meth:`BatchSource.batches`."""
        for batch in self._loader.batches(order, batch_size):
            yield _training_batch(_mirror(batch, mirrored), batch, self._device)


class FeatureStream:
    """Features of a frozen trunk, computed anew in every epoch."""

    from_pixels = False

    def __init__(self, network: MultiLengthHashNetwork, loader: PixelLoader, device: torch.device) -> None:
        self._network = network
        self._pixels = PixelStream(loader, device)

    def batches(
        self, order: NDArray[np.int64], mirrored: NDArray[np.bool_] | None, batch_size: int
    ) -> Iterator[TrainingBatch]:
        """See :meth:`BatchSource.batches`."""
        for batch in self._pixels.batches(order, mirrored, batch_size):
            with inference(self._network):
                features = self._network.features(batch.inputs)
            # A tensor from inference mode cannot take part in a backward pass; its copy can.
            yield TrainingBatch(features.clone(), batch.labels, batch.indices)


class CachedFeatures:
    """Features of a frozen trunk in memory, of every readable image and, where asked for, of its mirror.

    Args:
        network: gives the features.
        loader: gives the pixels, read once.
        device: where a batch is put; the cache itself is in main memory.
        mirror: keep the mirrors' features too.

    Raises:
        DataError: too many images are broken.

    """

    from_pixels = False

    def __init__(
        self, network: MultiLengthHashNetwork, loader: PixelLoader, device: torch.device, *, mirror: bool
    ) -> None:
        self._device = device
        self._labels = torch.from_numpy(loader.dataset.labels[loader.indices])
        self._indices = loader.indices
        trunk = network.trunk
        self._features = torch.zeros(2 if mirror else 1, len(loader), trunk.channels, trunk.grid, trunk.grid)
        position_of = {int(index): position for position, index in enumerate(loader.indices)}
        self._readable = np.zeros(len(loader), dtype=np.bool_)
        with inference(network), progress("trunk features", len(loader), unit="images") as advance:
            for batch in loader.batches(None, _TRUNK_BATCH):
                positions = [position_of[int(index)] for index in batch.indices]
                pixels = torch.from_numpy(batch.pixels).to(device)
                self._features[0, positions] = network.features(pixels).cpu()
                if mirror:
                    self._features[1, positions] = network.features(pixels.flip(2)).cpu()
                self._readable[positions] = True
                advance(len(batch))

    def batches(
        self, order: NDArray[np.int64], mirrored: NDArray[np.bool_] | None, batch_size: int
    ) -> Iterator[TrainingBatch]:
        """See :meth:`BatchSource.batches`."""
        for start in range(0, len(order), batch_size):
            positions = order[start : start + batch_size]
            positions = positions[self._readable[positions]]
            if len(positions) == 0:
                continue
            indices = self._indices[positions]
            side = np.zeros(len(positions), dtype=np.int64) if mirrored is None else mirrored[indices].astype(np.int64)
            rows = torch.from_numpy(positions)
            features = self._features[torch.from_numpy(side), rows]
            yield TrainingBatch(features.to(self._device), self._labels[rows].to(self._device), indices)


def make_source(
    network: MultiLengthHashNetwork,
    loader: PixelLoader,
    device: torch.device,
    *,
    frozen: bool,
    mirror: bool,
    memory_limit_bytes: int | None = None,
) -> BatchSource:
    """Choose the source of batches, and compute or decode what fits into memory.

    Args:
        network: on its device.
        loader: the training images.
        device: where batches are put.
        frozen: whether the trunk is frozen.
        mirror: whether mirrored images are needed.
        memory_limit_bytes: features that take no more than this are kept; None is half of what is available.

    Raises:
        DataError: too many images are broken.

    """
    if not frozen:
        loader.prepare()
        return PixelStream(loader, device)
    trunk = network.trunk
    needed = len(loader) * (2 if mirror else 1) * trunk.channels * trunk.grid**2 * 4
    limit = available_memory_bytes() // 2 if memory_limit_bytes is None else memory_limit_bytes
    if needed <= limit:
        # Every pixel is read once, so the decoded images need not stay in memory.
        return CachedFeatures(network, loader, device, mirror=mirror)
    note(
        f"the trunk's features of {len(loader):,} images take {needed / 2**30:.2f} GiB, beyond the limit of "
        f"{limit / 2**30:.2f} GiB: computing them in every epoch (raise --memory-limit-gib, or use --no-flip)"
    )
    loader.prepare()
    return FeatureStream(network, loader, device)


def _mirror(batch: Batch, mirrored: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    if mirrored is None or not bool(mirrored[batch.indices].any()):
        return batch.pixels
    which = mirrored[batch.indices][:, None, None, None]
    return np.where(which, batch.pixels[:, :, ::-1], batch.pixels)


def _training_batch(pixels: NDArray[np.uint8], batch: Batch, device: torch.device) -> TrainingBatch:
    inputs = torch.from_numpy(np.ascontiguousarray(pixels)).to(device)
    return TrainingBatch(inputs, torch.from_numpy(batch.labels).to(device), batch.indices)
