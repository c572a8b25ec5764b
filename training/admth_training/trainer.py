"""The training loop: epochs of steps over a batch source, the resumable state, and what stops it.

A frozen trunk runs in evaluation mode, always. A trunk that is trained from ImageNet weights keeps their running
batch statistics, since small batches of few kinds of pictures would spoil them, and trains everything else. A fresh
trunk uses the statistics of its batches and keeps running averages of them for evaluation. A quantised network has no
batch normalisation left, and is trained without dropout: what it learns is to be the FP32 network.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from admth_runtime.console import note, progress
from admth_runtime.errors import TrainingError
from admth_training.checkpoint import RunConfig, save_run_config
from admth_training.features import BatchSource, TrainingBatch
from admth_training.loader import PixelLoader
from admth_training.network import MultiLengthHashNetwork
from admth_training.objective import admth_loss
from admth_training.optim import learning_rate, make_optimizer, set_learning_rate
from admth_training.qat.loss import QatLoss
from admth_training.seeds import dropout_seed, epoch_order, mirrored_images
from admth_training.splits import Splits, write_splits
from admth_training.state import (
    SPLITS_FILE,
    append_metrics,
    clear_run,
    cut_metrics,
    load_state,
    save_state,
    saved_epoch,
)

__all__ = ["Trainer"]

# Running averages of a fresh trunk: ImageNet's 0.01 would need hundreds of steps to forget the initial values.
_FRESH_NORM_MOMENTUM = 0.1
_SECONDS_BETWEEN_LINES = 10.0
_TERMS = ("loss", "likelihood", "consistency")
_QAT_TERMS = (*_TERMS, "distillation", "margin")


class Trainer:
    """Trains a network in a run's folder, which the caller has locked.

    Args:
        config: what to train and how.
        folder: the run's folder.
        network: on its device; its trunk is frozen here where the configuration asks for it.
        device: where the network is.
        save_interval: least seconds between two writings of the state; the last epoch is always written.
        qat_loss: what a quantised network is trained with; None for an FP32 one.

    """

    def __init__(
        self,
        config: RunConfig,
        folder: Path,
        network: MultiLengthHashNetwork,
        device: torch.device,
        *,
        save_interval: float,
        qat_loss: QatLoss | None = None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.network = network
        self.device = device
        self.last_record: dict[str, Any] = {}
        self._save_interval = save_interval
        self._qat_loss = qat_loss
        self._terms = _TERMS if qat_loss is None else _QAT_TERMS
        self._saved_at = time.monotonic()
        self._told_at = time.monotonic()
        network.trunk.requires_grad_(not config.fit.freeze_trunk)
        factor = config.fit.trunk_learning_rate_factor
        if factor is None:
            factor = 0.1 if config.pretrained and config.qat is None else 1.0
        self.optimizer = make_optimizer(network, config.fit, trunk_factor=factor)
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        automatic = config.fit.precision == "auto" and device.type == "cuda" and config.qat is None
        self._autocast = config.fit.precision == "bf16" or automatic

    def start(self, splits: Splits, loader: PixelLoader, *, resumed: bool) -> int:
        """Bring the folder and the network to where training goes on.

        Returns:
            How many epochs are done.

        Raises:
            CheckpointError: the saved state is broken.
            OutputError: the folder cannot be written.

        """
        done = 0
        if resumed:
            done = load_state(self.folder, self.network, self.optimizer)
            records = cut_metrics(self.folder, done)
            if records:
                self.last_record = records[-1]
                note(f"resuming after epoch {done} of {self.config.fit.epochs}")
        else:
            clear_run(self.folder)
        save_run_config(self.folder, self.config)
        write_splits(self.folder / SPLITS_FILE, splits, loader.dataset)
        return done

    def train(self, source: BatchSource, loader: PixelLoader, first: int) -> None:
        """Train from epoch ``first``, counted from 1, to the last.

        Raises:
            TrainingError: the loss or the gradient is no longer finite, or memory runs out.
            OutputError: the metrics or the state cannot be written.

        """
        epochs = self.config.fit.epochs
        cuda = [torch.cuda.current_device()] if self.device.type == "cuda" else []
        total = (epochs - first + 1) * len(loader)
        with torch.random.fork_rng(devices=cuda), progress("training", total, unit="images") as advance:
            for epoch in range(first, epochs + 1):
                self._train_epoch(source, loader, epoch, advance)
                if epoch == epochs or time.monotonic() - self._saved_at >= self._save_interval:
                    save_state(self.folder, self.network, self.optimizer, epoch=epoch)
                    self._saved_at = time.monotonic()

    @contextmanager
    def resumable(self) -> Iterator[None]:
        """When the block is interrupted, say how to go on."""
        try:
            yield
        except KeyboardInterrupt:
            done = saved_epoch(self.folder)
            state = f"epoch {done} of {self.config.fit.epochs} is saved" if done else "no epoch is saved yet"
            note(f"{state}: continue with  admth-train fit --out {self.folder} --resume")
            raise

    def _train_epoch(
        self, source: BatchSource, loader: PixelLoader, epoch: int, advance: Callable[[int], None]
    ) -> None:
        fit = self.config.fit
        started = time.monotonic()
        rate = learning_rate(fit, epoch)
        set_learning_rate(self.optimizer, rate)
        torch.manual_seed(dropout_seed(fit.seed, epoch))
        self._set_mode()
        order = epoch_order(fit.seed, epoch, len(loader))
        mirrored = mirrored_images(fit.seed, epoch, len(loader.dataset)) if fit.flip else None
        sums, images = [0.0] * len(self._terms), 0
        for step, batch in enumerate(source.batches(order, mirrored, fit.batch_size), start=1):
            advance(len(batch))
            if len(batch) < 2:
                continue  # One image makes no pair.
            values = self._step(source, batch, epoch, step)
            sums = [total + value * len(batch) for total, value in zip(sums, values, strict=True)]
            images += len(batch)
        if images == 0:
            raise TrainingError(f"epoch {epoch} had no batch of two readable images: mend the data set")
        seconds = time.monotonic() - started
        self.last_record = {
            "epoch": epoch,
            **{name: total / images for name, total in zip(self._terms, sums, strict=True)},
            "learning_rate": rate,
            "images_per_second": round(images / seconds, 1),
            "seconds": round(seconds, 3),
        }
        append_metrics(self.folder, self.last_record)
        self._tell()

    def _set_mode(self) -> None:
        self.network.train()
        trunk = self.network.trunk
        if self.config.fit.freeze_trunk:
            trunk.eval()
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = _FRESH_NORM_MOMENTUM
                if self.config.pretrained:
                    module.eval()
            elif isinstance(module, nn.Dropout) and self._qat_loss is not None:
                module.eval()

    def _step(self, source: BatchSource, batch: TrainingBatch, epoch: int, step: int) -> list[float]:
        """Take one step and return the loss and its terms."""
        network = self.network
        try:
            with torch.autocast(device_type=self.device.type, dtype=torch.bfloat16, enabled=self._autocast):
                logits = network(batch.inputs) if source.from_pixels else network.heads(batch.inputs)
            terms = admth_loss(
                logits,
                batch.labels,
                list(network.maps),
                self.config.objective,
                short_to_long=self.config.network.map_direction == "short-to-long",
            )
            total, added = terms.total, list[Tensor]()
            if self._qat_loss is not None:
                qat = self._qat_loss(terms.total, batch.inputs, logits)
                total, added = qat.total, [qat.distillation, qat.margin]
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            limit = self.config.fit.clip_norm or float("inf")
            norm = nn.utils.clip_grad_norm_(self._parameters, limit)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
                raise
            raise TrainingError(
                f"out of memory at step {step} of epoch {epoch}: use a smaller --batch-size, --input-size or --hidden"
            ) from error
        # One transfer for all, since each waits for the device.
        numbers = torch.stack([total, terms.likelihood, terms.consistency, *added, norm.float()]).detach()
        if not bool(torch.isfinite(numbers).all()):
            raise self._not_finite(numbers, logits, batch, epoch, step)
        self.optimizer.step()
        return [float(number) for number in numbers.tolist()[:-1]]

    def _not_finite(
        self, numbers: Tensor, logits: tuple[Tensor, ...], batch: TrainingBatch, epoch: int, step: int
    ) -> TrainingError:
        """Say which number went wrong first along the way from the input to the gradient, and why that is likely."""
        rate = learning_rate(self.config.fit, epoch)
        finite = [bool(ok) for ok in torch.isfinite(numbers).tolist()]
        lengths = self.config.network.code_lengths
        wrong = [n for n, z in zip(lengths, logits, strict=True) if not bool(torch.isfinite(z).all())]
        cause, mend = f"the learning rate of {rate:g} is too high", "use a lower --lr"
        if batch.inputs.is_floating_point() and not bool(torch.isfinite(batch.inputs).all()):
            what = "the features of the frozen trunk are"
            cause, mend = "its weights are broken", "start from other weights"
        elif wrong:
            what = f"the logits of length {', '.join(map(str, wrong))} are"
        elif not finite[1]:
            what = "the likelihood is"
        elif not finite[2]:
            what = "the consistency is"
            cause = f"the maps between the lengths diverge: a learning rate of {rate:g} is too high"
            mend = "use a lower --lr or --beta"
        elif len(finite) > len(_TERMS) + 1 and not finite[3]:
            what = "the difference from the FP32 network is"
        elif not finite[0]:
            what = "the loss is"
            cause, mend = "alpha and beta are too large", "use a lower --alpha or --beta"
        else:
            what = "the gradient is"
        if self._autocast:
            mend += ", or --precision fp32"
        return TrainingError(
            f"{what} no longer finite at step {step} of epoch {epoch}: most likely {cause}; {mend} "
            "and start again with --overwrite"
        )

    def _tell(self) -> None:
        """Where no bar is drawn, say now and then how training goes."""
        record, epochs = self.last_record, self.config.fit.epochs
        if sys.stderr.isatty() or (
            time.monotonic() - self._told_at < _SECONDS_BETWEEN_LINES and record["epoch"] not in (1, epochs)
        ):
            return
        self._told_at = time.monotonic()
        note(
            f"epoch {record['epoch']}/{epochs}  loss {record['loss']:.4f}  {record['images_per_second']:,.0f} images/s"
        )
