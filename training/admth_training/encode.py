"""Logits and packed codes of many images, from the FP32 network in inference mode: the reference of every engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from admth_runtime.console import progress
from admth_runtime.errors import DataError, InputError, TrainingError
from admth_runtime.packing import pack_logits
from admth_training.loader import PixelLoader
from admth_training.network import MultiLengthHashNetwork

__all__ = ["EncodedSplit", "encode_split", "inference", "reference_logits"]


@dataclass(frozen=True)
class EncodedSplit:
    """The codes of some images.

    Attributes:
        codes: packed uint8 ``[n, L / 8]`` for every code length L.
        logits: float32 ``[n, L]`` for every code length L, before tanh.
        labels: uint8 ``[n, classes]``, multi-hot.
        indices: int64 ``[n]``, the images' numbers in the data set; broken images are left out.

    """

    codes: dict[int, NDArray[np.uint8]]
    logits: dict[int, NDArray[np.float32]]
    labels: NDArray[np.uint8]
    indices: NDArray[np.int64]


def reference_logits(
    network: MultiLengthHashNetwork,
    pixels: NDArray[np.uint8],
    batch_size: int = 32,
    *,
    description: str = "PyTorch reference",
) -> dict[int, NDArray[np.float32]]:
    """Return the logits that every exported model is held to.

    The network is run in evaluation mode, in inference mode, and in FP32 whatever autocast is in force. On the CPU
    the result is the same in every call with the same batch size and number of threads.

    Args:
        network: the network; its training flag and weights are left as they were.
        pixels: uint8 ``[n, H, W, 3]``, RGB, of the network's input size.
        batch_size: images a pass.
        description: name of the progress bar.

    Returns:
        float32 ``[n, L]`` for every code length L, before tanh; a bit is 1 where its logit is > 0.

    Raises:
        InputError: the pixels are of another dtype, rank or size, or there are none.
        TrainingError: a logit is not finite.

    """
    _check_pixels(network, pixels)
    _check_batch_size(batch_size)
    device = next(network.parameters()).device
    parts: list[tuple[NDArray[np.float32], ...]] = []
    with inference(network), progress(description, len(pixels), unit="images") as advance:
        for start in range(0, len(pixels), batch_size):
            # A copy, since PyTorch warns of arrays that cannot be written, such as those of Pillow images.
            batch = torch.tensor(pixels[start : start + batch_size])
            parts.append(_to_numpy(network(batch.to(device))))
            advance(len(batch))
    return _collect(network, parts)


def encode_split(
    network: MultiLengthHashNetwork, loader: PixelLoader, *, batch_size: int = 32, description: str = "encoding"
) -> EncodedSplit:
    """Encode every readable image of a loader, in the loader's order.

    Args:
        network: the network; see :func:`reference_logits` for how it is run.
        loader: the images; call its ``prepare`` first where they should be decoded once.
        batch_size: images a pass.
        description: name of the progress bar.

    Raises:
        DataError: no image is readable, or more are broken than the loader allows.
        TrainingError: a logit is not finite.

    """
    _check_batch_size(batch_size)
    device = next(network.parameters()).device
    parts: list[tuple[NDArray[np.float32], ...]] = []
    labels, indices = [], []
    with inference(network), progress(description, len(loader), unit="images") as advance:
        for batch in loader.batches(None, batch_size):
            parts.append(_to_numpy(network(torch.from_numpy(batch.pixels).to(device))))
            labels.append(batch.labels)
            indices.append(batch.indices)
            advance(len(batch))
    if not parts:
        raise DataError(f"none of the {len(loader):,} images of {loader.dataset.name} is readable: mend the data set")
    logits = _collect(network, parts)
    codes = {length: pack_logits(values) for length, values in logits.items()}
    return EncodedSplit(codes, logits, np.concatenate(labels), np.concatenate(indices))


@contextmanager
def inference(network: MultiLengthHashNetwork) -> Iterator[None]:
    """Run a block in evaluation mode, without gradients and in FP32; the training flags come back afterwards."""
    flags = [(module, module.training) for module in network.modules()]
    network.eval()
    kind = next(network.parameters()).device.type
    try:
        with torch.inference_mode(), torch.autocast(device_type=kind, enabled=False):
            yield
    finally:
        for module, training in flags:
            module.training = training


def _check_pixels(network: MultiLengthHashNetwork, pixels: NDArray[np.uint8]) -> None:
    size = network.config.size
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (size, size, 3):
        found = f"{pixels.dtype} {list(pixels.shape)}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise InputError(
            f"pixels of {found} are not uint8 [n, {size}, {size}, 3]: make them with admth_runtime.preprocessing"
        )
    if len(pixels) == 0:
        raise InputError("there are no images to encode: pass at least one")


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch size {batch_size} is not positive: use at least 1")


def _to_numpy(logits: tuple[torch.Tensor, ...]) -> tuple[NDArray[np.float32], ...]:
    return tuple(values.float().cpu().numpy() for values in logits)


def _collect(
    network: MultiLengthHashNetwork, parts: list[tuple[NDArray[np.float32], ...]]
) -> dict[int, NDArray[np.float32]]:
    logits = {}
    for length, columns in zip(network.config.code_lengths, zip(*parts, strict=True), strict=True):
        values = np.concatenate(columns)
        if not bool(np.isfinite(values).all()):
            row = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise TrainingError(f"the {length}-bit logits of image {row} are not finite: train again with a lower --lr")
        logits[length] = values
    return logits
