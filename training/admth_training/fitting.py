"""One training run: from its configuration to ``model.safetensors``, ``config.json`` and ``metrics.jsonl``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from admth_runtime.console import note
from admth_runtime.errors import DataError, DeviceError, OutputError
from admth_runtime.files import make_folder
from admth_training.checkpoint import (
    CONFIG_FILE,
    METRICS_FILE,
    WEIGHTS_FILE,
    RunConfig,
    load_run_config,
    save_network,
)
from admth_training.data import ImageDataset, open_dataset
from admth_training.features import make_source
from admth_training.leakage import check_leakage
from admth_training.loader import PixelLoader
from admth_training.network import MultiLengthHashNetwork, build_network
from admth_training.qat import freeze_quantization
from admth_training.qat.loss import QatLoss
from admth_training.qat_start import observe_ranges, start_network
from admth_training.splits import Splits, choose_splits, read_splits
from admth_training.state import SPLITS_FILE, STATE_FILE, check_claim, run_lock, saved_epoch
from admth_training.trainer import Trainer

__all__ = ["FitResult", "fit", "select_device"]


@dataclass(frozen=True)
class FitResult:
    """What a training run made.

    Attributes:
        folder: where it lies.
        files: the names of its files.
        epochs: how many epochs the weights have seen.
        trained_epochs: how many of them in this call, fewer after a resume.
        final: the last line of ``metrics.jsonl``.
        train_images: training images, the broken ones included.
        broken_images: training images that could not be read.
        seconds: wall time of this call.

    """

    folder: Path
    files: tuple[str, ...]
    epochs: int
    trained_epochs: int
    final: dict[str, Any]
    train_images: int
    broken_images: int
    seconds: float


def fit(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    memory_limit_bytes: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    save_interval: float = 10.0,
) -> FitResult:
    """Train a network and leave the run in a folder.

    On the CPU, equal configurations, versions and thread counts give equal weights to the bit, whether or not the run
    was interrupted and resumed.

    Args:
        config: what to train, on what, and how.
        out: the run's folder, made where it does not exist.
        resume: continue the run in the folder; it may have been killed at any moment. Starts one where there is none.
        overwrite: replace the run in the folder.
        memory_limit_bytes: limit for decoded pixels, and for features, kept in memory; None is half of what is free.
        workers: threads that decode images; None is one a processor.
        device: ``"auto"`` (CUDA where there is one), ``"cpu"`` or ``"cuda"``.
        save_interval: least seconds between two writings of the resumable state; 0 writes it every epoch.

    Raises:
        DataError: the data is missing, broken or too small.
        OutputError: the folder is in use, holds another run, or cannot be written.
        CheckpointError: the run to resume is broken or has another configuration.
        TrainingError: the loss or the gradient is no longer finite.
        DeviceError: there is no CUDA device.
        MissingExtraError: a package is not installed.

    """
    started = time.monotonic()
    folder = Path(out)
    target = select_device(device)
    if config.qat is not None and folder.resolve() == Path(config.qat.base_run).resolve():
        raise OutputError(f"{folder} holds the FP32 run that the quantised one starts from: name another --out")
    resumed = check_claim(folder, config, resume=resume, overwrite=overwrite)
    data = config.data
    dataset = open_dataset(data.spec, root=data.root, strip_prefix=data.strip_prefix)
    splits = _splits(folder, dataset, config, resumed=resumed)
    # Only what is an error; the evaluation also compares the contents, and reports.
    check_leakage(dataset, splits, content=False)
    loader = PixelLoader(
        dataset, splits.train, config.preprocessing, memory_limit_bytes=memory_limit_bytes, workers=workers
    )
    _check_batch_size(config.fit.batch_size, len(loader))
    network, qat_loss = _network(config, target)
    make_folder(folder)
    with run_lock(folder):
        # Again, since another run may have come first.
        resumed = check_claim(folder, config, resume=resume, overwrite=overwrite)
        if config.qat is not None and not (resumed and saved_epoch(folder) >= config.fit.epochs):
            # Also where a saved state replaces the ranges: the learning rates follow from those of the start.
            observe_ranges(network, loader, config)
        trainer = Trainer(config, folder, network, target, save_interval=save_interval, qat_loss=qat_loss)
        done = trainer.start(splits, loader, resumed=resumed)
        if done < config.fit.epochs:
            if target.type == "cpu" and not config.fit.freeze_trunk and config.qat is None:
                note("training the trunk on the CPU takes long: --freeze-trunk trains the rest on cached features")
            with trainer.resumable():
                source = make_source(
                    network,
                    loader,
                    target,
                    # The FP32 network that a quantised one learns from has features of its own.
                    frozen=config.fit.freeze_trunk and config.qat is None,
                    mirror=config.fit.flip,
                    memory_limit_bytes=memory_limit_bytes,
                )
                trainer.train(source, loader, done + 1)
        if config.qat is not None:
            freeze_quantization(network)
        save_network(folder / WEIGHTS_FILE, network)
    return FitResult(
        folder=folder,
        files=(WEIGHTS_FILE, CONFIG_FILE, METRICS_FILE, SPLITS_FILE, STATE_FILE),
        epochs=config.fit.epochs,
        trained_epochs=config.fit.epochs - done,
        final=trainer.last_record,
        train_images=len(loader),
        broken_images=len(loader.broken),
        seconds=time.monotonic() - started,
    )


def select_device(name: str) -> torch.device:
    """Return the device of a name; ``"auto"`` is CUDA where there is one.

    Raises:
        DeviceError: the name is unknown, or CUDA was asked for and PyTorch has none.

    """
    if name not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"device {name!r} is unknown: use one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        build = f"this PyTorch {torch.__version__} was built for CUDA {torch.version.cuda or 'not at all'}"
        raise DeviceError(f"device cuda cannot be had, {build}: use --device cpu, or install a driver and a CUDA build")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _network(config: RunConfig, device: torch.device) -> tuple[MultiLengthHashNetwork, QatLoss | None]:
    if config.qat is not None:
        return start_network(config, device)
    network = build_network(config.network, pretrained=config.pretrained, seed=config.fit.seed)
    return network.to(device), None


def _splits(folder: Path, dataset: ImageDataset, config: RunConfig, *, resumed: bool) -> Splits:
    """Choose the splits, or read those that a run began with: of the run to resume, or of the one to quantise."""
    data = config.data
    path = folder / SPLITS_FILE
    if config.qat is not None and not (resumed and path.exists()):
        base = Path(config.qat.base_run)
        if load_run_config(base).data == data and (base / SPLITS_FILE).exists():
            return read_splits(base / SPLITS_FILE, dataset)
    if not resumed or not path.exists():
        return choose_splits(dataset, query_size=data.query_size, train_size=data.train_size, seed=data.seed)
    try:
        return read_splits(path, dataset)
    except DataError as error:
        raise DataError(f"the run cannot go on with other images: {error}, with --overwrite") from error


def _check_batch_size(batch_size: int, images: int) -> None:
    if images < 2:
        raise DataError("one training image makes no pair: give at least 2")
    if batch_size > images:
        raise DataError(
            f"batch size {batch_size} exceeds the {images:,} training images: use --batch-size {images} or less"
        )
