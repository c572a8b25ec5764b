"""Training: from a run's configuration to ``model.safetensors``, ``config.json`` and ``metrics.jsonl``.

A frozen trunk runs in evaluation mode, always. A trunk that is trained from ImageNet weights keeps their running
batch statistics, since small batches of few kinds of pictures would spoil them, and trains everything else. A fresh
trunk uses the statistics of its batches and keeps running averages of them for evaluation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from admth_runtime.console import note, progress
from admth_runtime.errors import DataError, DeviceError, TrainingError
from admth_runtime.files import make_folder
from torch import nn

from admth_training.checkpoint import CONFIG_FILE, METRICS_FILE, WEIGHTS_FILE, RunConfig, save_network, save_run_config
from admth_training.config import FitConfig
from admth_training.data import open_dataset
from admth_training.features import BatchSource, TrainingBatch, make_source
from admth_training.loader import PixelLoader
from admth_training.network import MultiLengthHashNetwork, build_network
from admth_training.objective import LossTerms, admth_loss
from admth_training.optim import learning_rate, make_optimizer, set_learning_rate
from admth_training.seeds import dropout_seed, epoch_order, mirrored_images
from admth_training.splits import Splits, choose_splits, write_splits
from admth_training.state import (
    STATE_FILE,
    append_metrics,
    check_claim,
    clear_run,
    cut_metrics,
    load_state,
    run_lock,
    save_state,
    saved_epoch,
)

__all__ = ["SPLITS_FILE", "FitResult", "fit", "select_device"]

SPLITS_FILE = "splits.json"

# Batch statistics of a fresh trunk: ImageNet's 0.01 would need a thousand steps to forget the initial values.
_FRESH_NORM_MOMENTUM = 0.1


@dataclass(frozen=True)
class FitResult:
    """What a training run made.

    Attributes:
        folder: where it lies.
        files: the names of its files.
        epochs: how many epochs the weights have seen, and of which
        trained_epochs: this many in this call; fewer after a resume.
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
    check_claim(folder, config, resume=resume, overwrite=overwrite)
    data = config.data
    dataset = open_dataset(data.spec, root=data.root, strip_prefix=data.strip_prefix)
    splits = choose_splits(dataset, query_size=data.query_size, train_size=data.train_size, seed=data.seed)
    loader = PixelLoader(
        dataset, splits.train, config.preprocessing, memory_limit_bytes=memory_limit_bytes, workers=workers
    )
    _check_batch_size(config.fit.batch_size, len(loader))
    network = build_network(config.network, pretrained=config.pretrained, seed=config.fit.seed).to(target)
    make_folder(folder)
    with run_lock(folder):
        # Again, since another run may have come first.
        resumed = check_claim(folder, config, resume=resume, overwrite=overwrite)
        trainer = _Trainer(config, folder, network, target, save_interval)
        first = trainer.start(resumed, splits, loader)
        if first <= config.fit.epochs:
            source = make_source(
                network,
                loader,
                target,
                frozen=config.fit.freeze_trunk,
                mirror=config.fit.flip,
                memory_limit_bytes=memory_limit_bytes,
            )
            with trainer.resumable():
                trainer.train(source, loader, first)
        save_network(folder / WEIGHTS_FILE, network)
    return FitResult(
        folder=folder,
        files=(WEIGHTS_FILE, CONFIG_FILE, METRICS_FILE, SPLITS_FILE, STATE_FILE),
        epochs=config.fit.epochs,
        trained_epochs=max(config.fit.epochs - first + 1, 0),
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


class _Trainer:
    """The state of one call of :func:`fit`."""

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        network: MultiLengthHashNetwork,
        device: torch.device,
        save_interval: float,
    ) -> None:
        self.config = config
        self.folder = folder
        self.network = network
        self.device = device
        self.save_interval = save_interval
        self.last_record: dict[str, Any] = {}
        network.trunk.requires_grad_(not config.fit.freeze_trunk)
        factor = config.fit.trunk_learning_rate_factor
        if factor is None:
            factor = 0.1 if config.pretrained else 1.0
        self.optimizer = make_optimizer(network, config.fit, trunk_factor=factor)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._autocast = config.fit.precision == "bf16" or (config.fit.precision == "auto" and device.type == "cuda")
        self._saved_at = time.monotonic()

    def start(self, resumed: bool, splits: Splits, loader: PixelLoader) -> int:
        """Bring the folder and the network to where training goes on; return the first epoch to train."""
        done = 0
        if resumed:
            done = load_state(self.folder, self.network, self.optimizer)
            cut_metrics(self.folder, done)
            if done:
                self.last_record = read_last(self.folder)
                note(f"resuming after epoch {done} of {self.config.fit.epochs}")
        else:
            clear_run(self.folder)
        save_run_config(self.folder, self.config)
        write_splits(self.folder / SPLITS_FILE, splits, loader.dataset)
        return done + 1
