"""The start of quantisation-aware training: an FP32 run's network, quantised, with ranges of its training images."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch

from admth_runtime.console import progress
from admth_runtime.errors import CheckpointError
from admth_training.checkpoint import RunConfig, TrainedRun, load_run
from admth_training.config import QatConfig
from admth_training.encode import inference
from admth_training.loader import PixelLoader
from admth_training.network import MultiLengthHashNetwork
from admth_training.qat import equalising, observing, quantize_network
from admth_training.qat.loss import QatLoss

__all__ = ["load_base_run", "observe_ranges", "start_network"]

_OBSERVED_BATCH = 32


def load_base_run(config: QatConfig) -> TrainedRun:
    """Read the FP32 run that a quantised one was made of.

    Raises:
        CheckpointError: it is gone or broken, or holds other weights than those of the start.

    """
    if not Path(config.base_run).is_dir():
        raise CheckpointError(f"the FP32 run {config.base_run} is gone: say where it is with --qat RUN")
    base = load_run(config.base_run)
    if base.checkpoint_sha256 != config.base_sha256:
        raise CheckpointError(
            f"the FP32 run {config.base_run} has other weights ({base.checkpoint_sha256[:12]}) than those that the "
            f"quantised one came from ({config.base_sha256[:12]}): name the right one with --qat RUN"
        )
    return base


def start_network(config: RunConfig, device: torch.device) -> tuple[MultiLengthHashNetwork, QatLoss]:
    """Return the network to train, with ranges still to observe or to load, and its loss.

    Raises:
        CheckpointError: the FP32 run is needed and gone, or another one.

    """
    qat = config.qat
    assert qat is not None
    base = load_base_run(qat)
    network = quantize_network(copy.deepcopy(base.network), qat.target).to(device)
    teacher = base.network.eval().requires_grad_(False).to(device) if qat.distillation_weight else None
    return network, QatLoss(qat, teacher)


def observe_ranges(network: MultiLengthHashNetwork, loader: PixelLoader, config: RunConfig) -> None:
    """Equalise the channels and let every range start from what it is on some of the training images.

    Raises:
        TrainingError: an activation is not finite.
        DataError: too many images are broken.

    """
    assert config.qat is not None
    order = np.random.default_rng(config.fit.seed).permutation(len(loader))[: config.qat.observed_images]
    device = next(network.parameters()).device
    with progress("observing ranges", 2 * len(order), unit="images") as advance:
        for watching in (equalising, observing):
            with watching(network), inference(network):
                for batch in loader.batches(order, _OBSERVED_BATCH):
                    network(torch.from_numpy(batch.pixels).to(device))
                    advance(len(batch))
