"""How a corpus is to be encoded."""

from __future__ import annotations

from dataclasses import dataclass

from admth_runtime.errors import InputError

__all__ = ["DEFAULT_COLUMN", "DEFAULT_SHARD_SIZE", "LARGEST_BATCH", "CorpusOptions", "default_batch"]

DEFAULT_SHARD_SIZE = 10_000
"""Images in a shard: what is lost, at most, by each worker that is killed."""

LARGEST_BATCH = 32
_PIXELS_IN_CACHE = 4 * 224 * 224
DEFAULT_COLUMN = "image"


@dataclass(frozen=True)
class CorpusOptions:
    """How a corpus is to be encoded.

    Attributes:
        shard_size: images in a shard, so rows in a part; None takes that of the corpus that is gone on with, or 10,000.
        batch: images in one inference call; None likewise, or what :func:`default_batch` says.
        logits: keep the logits of every length beside the codes.
        column: the column of Parquet sources that holds the bytes of images.
        recursive: search folders within folders.
        workers: worker processes, or actors on Ray; None takes one a usable core, one a GPU, or as many as Ray has
            room for.
        threads: CPU threads of one inference call in a worker; None shares the cores among the workers.
        ray: None for processes on this machine; else the address of a Ray cluster, ``"auto"`` for the one that Ray
            finds or starts, ``"local"`` for one of its own on this machine.
        device: see :class:`~admth_runtime.HashRuntime`.
        provider: likewise.
        self_test: have every worker encode the model's golden pictures first.
        max_error_rate: the share of unreadable images, 0 to 1, above which the run fails; whole parts stay.
        restart: forget what is in the folder and begin anew, instead of going on with it.
        retry_errors: encode parts that hold unreadable images again.

    Raises:
        InputError: a value is out of range.
    """

    shard_size: int | None = None
    batch: int | None = None
    logits: bool = False
    column: str = DEFAULT_COLUMN
    recursive: bool = True
    workers: int | None = None
    threads: int | None = None
    ray: str | None = None
    device: str = "auto"
    provider: str | None = None
    self_test: bool = False
    max_error_rate: float = 0.01
    restart: bool = False
    retry_errors: bool = False

    def __post_init__(self) -> None:
        for name in ("shard_size", "batch", "workers", "threads"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"{name} {value!r} is not a positive integer: pass 1 or more")
        if not 0.0 <= self.max_error_rate <= 1.0:
            raise InputError(f"max_error_rate {self.max_error_rate!r} is not between 0 and 1")
        if self.restart and self.retry_errors:
            raise InputError("restart encodes everything again, retry_errors only a part: pass one of them")


def default_batch(height: int, width: int, *, gpu: bool) -> int:
    """Return the images of one inference call when nobody says: 32 on a GPU, on a CPU what its caches hold.

    On one CPU thread EfficientNet-Lite0 takes a fifth less time an image with four images of 224x224 in a call than
    with 32, whose activations go through memory; with smaller images the best number grows as their area shrinks.

    Args:
        height: rows of the network's input.
        width: columns of it.
        gpu: whether the model runs on a GPU.
    """
    if gpu:
        return LARGEST_BATCH
    fitting = max(1, min(LARGEST_BATCH, _PIXELS_IN_CACHE // (height * width)))
    return 1 << (fitting.bit_length() - 1)
