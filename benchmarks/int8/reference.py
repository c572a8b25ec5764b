"""The pixels that everyone calibrates on and is judged on, and what the FP32 PyTorch network says of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.console import track
from admth_runtime.files import write_bytes, write_text
from admth_runtime.packing import pack_logits
from admth_training.checkpoint import load_run
from admth_training.data import ImageDataset
from admth_training.data.fashion_mnist import IMAGES_FILE, read_part
from admth_training.data.idx import write_idx
from admth_training.encode import encode_split, reference_logits
from admth_training.evaluate import open_run_data
from admth_training.loader import PixelLoader
from admth_training.splits import Splits
from int8.networks import Network
from int8.settings import Settings

__all__ = ["CodedDatabase", "Logits", "Reference", "code", "database_pixels", "prepare_reference", "run_logits"]

_LEAST_UNSEEN = 128
_MOST_UNSEEN = 2000

Logits = dict[int, NDArray[np.float32]]


@dataclass(frozen=True)
class CodedDatabase:
    """Codes to search in, and the labels that say what is relevant.

    Attributes:
        codes: packed uint8 ``[d, L / 8]`` by code length.
        labels: multi-hot uint8 ``[d, classes]``.
    """

    codes: dict[int, NDArray[np.uint8]]
    labels: NDArray[np.uint8]


@dataclass(frozen=True)
class Reference:
    """What INT8 models of one network are made from and held to.

    Attributes:
        pixels: file with the arrays ``calibration`` and ``test``, uint8 ``[n, H, W, 3]``.
        calibration_spec: data for ``admth-calibrate`` whose draw with seed 0 gives the same calibration images.
        unseen_spec: data for the gate of ``admth-calibrate``, neither trained on nor tested on, or None.
        calibration_sha256: of the calibration pixels, to be compared with the manifest of a calibrated model.
        test: pixels of the queries, uint8 ``[q, H, W, 3]``.
        test_labels: multi-hot uint8 ``[q, classes]``.
        logits: of the FP32 PyTorch network, float32 ``[q, L]`` by code length.
        database: coded by the FP32 PyTorch network.
    """

    pixels: Path
    calibration_spec: str
    unseen_spec: str | None
    calibration_sha256: str
    test: NDArray[np.uint8]
    test_labels: NDArray[np.uint8]
    logits: Logits
    database: CodedDatabase


def prepare_reference(network: Network, settings: Settings) -> Reference:
    """Decode the images and run the PyTorch network; the calibration images are training images, never queries."""
    run = load_run(network.folder)
    dataset, splits = open_run_data(run)
    spec = run.config.preprocessing
    train = np.sort(splits.train)
    # The draw of admth-calibrate: a permutation of all images that it is given.
    drawn = train[np.random.default_rng(0).permutation(len(train))[: settings.calibration_images]]
    calibration = np.stack([dataset.load(int(index), spec) for index in drawn])
    queries = splits.query[: settings.test_images]
    test = np.stack([dataset.load(int(index), spec) for index in queries])
    pixels = network.models / "pixels.npz"
    with pixels.open("wb") as file:
        np.savez(file, calibration=calibration, test=test)
    loader = PixelLoader(dataset, splits.database, spec, memory_limit_bytes=0)
    database = _database(network, loader, run)
    return Reference(
        pixels=pixels,
        calibration_spec=_calibration_spec(network, dataset, train, run.config.data.spec),
        unseen_spec=_unseen_spec(network, dataset, splits, settings),
        calibration_sha256=hashlib.sha256(calibration.tobytes()).hexdigest(),
        test=test,
        test_labels=dataset.labels[queries],
        logits=reference_logits(run.network, test),
        database=database,
    )


def run_logits(folder: Path, pixels: NDArray[np.uint8]) -> Logits:
    """Return the logits of the PyTorch network of any run, such as one trained with fake quantisation."""
    return reference_logits(load_run(folder).network, pixels)


def database_pixels(network: Network) -> NDArray[np.uint8]:
    """Return the pixels of the database, uint8 ``[d, H, W, 3]``, in the order of its labels."""
    run = load_run(network.folder)
    dataset, splits = open_run_data(run)
    spec = run.config.preprocessing
    return np.stack([dataset.load(int(index), spec) for index in track(splits.database.tolist(), "database")])


def _database(network: Network, loader: PixelLoader, run: Any) -> CodedDatabase:
    """Code the database once a checkpoint, since CNN-F takes minutes for it."""
    file = network.folder / f"database-{run.checkpoint_sha256[:12]}.npz"
    if not file.is_file():
        encoded = encode_split(run.network, loader, description="coding the database")
        arrays: dict[str, Any] = {f"code_{length}": codes for length, codes in encoded.codes.items()}
        _save(file, labels=encoded.labels, **arrays)
    stored = np.load(file)
    codes = {int(name.removeprefix("code_")): stored[name] for name in stored.files if name != "labels"}
    return CodedDatabase(codes, stored["labels"])


def _save(file: Path, **arrays: NDArray[np.generic]) -> None:
    import io

    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(file, buffer.getvalue())


def _calibration_spec(network: Network, dataset: ImageDataset, train: NDArray[np.int64], spec: str) -> str:
    """Return a specification of the training images alone, in order: a data set in one file has them apart already."""
    return spec if dataset.sources.path(int(train[0])) is None else _listing(network, dataset, train, "train")


def _unseen_spec(network: Network, dataset: ImageDataset, splits: Splits, settings: Settings) -> str | None:
    """Return images that are neither trained nor tested on: of the database, or of the full Fashion-MNIST.

    A network's margins on the images that it was trained on are wider, so few bits flip there, and a gate that is
    measured on them promises too much.
    """
    held_out = np.setdiff1d(splits.database, splits.train)
    if len(held_out) >= _LEAST_UNSEEN and dataset.sources.path(int(held_out[0])) is not None:
        return _listing(network, dataset, held_out, "unseen")
    if network.case.data == "fashion" and settings.full_fashion.is_dir():
        return _other_fashion(dataset, settings)
    return None


def _other_fashion(dataset: ImageDataset, settings: Settings) -> str | None:
    """Write images of the full data set that the sample does not have, as a data set of the same form."""
    images, _ = read_part(settings.full_fashion, "train")
    known = {dataset.sources.content(index) for index in range(len(dataset))}
    order = np.random.default_rng(0).permutation(len(images))
    # A gray image's bytes; three equal channels are made of them later.
    others = [int(index) for index in order if images[index].tobytes() not in known][:_MOST_UNSEEN]
    if len(others) < _LEAST_UNSEEN:
        return None
    folder = settings.cache / "unseen-fashion"
    folder.mkdir(parents=True, exist_ok=True)
    write_idx(folder / IMAGES_FILE.format(part="train"), images[others])
    return f"fashion-mnist:{folder}"


def _listing(network: Network, dataset: ImageDataset, indices: NDArray[np.int64], name: str) -> str:
    listing = network.models / f"{name}.txt"
    write_text(listing, "".join(f"{dataset.sources.path(int(index))}\t1\n" for index in indices))
    return f"list:{listing}"


def code(logits: Logits) -> dict[int, NDArray[np.uint8]]:
    """Pack the signs of logits."""
    return {length: pack_logits(values) for length, values in logits.items()}
