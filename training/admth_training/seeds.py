"""Random choices that depend on the seed, the epoch and the image alone.

Every epoch draws from generators of its own. So the number of workers changes nothing, and a run that is resumed at an
epoch makes the choices that it would have made without the interruption.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["dropout_seed", "epoch_order", "mirrored_images"]

_ORDER, _MIRROR, _DROPOUT = 1, 2, 3


def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Return the order of an epoch, a permutation of 0 to ``count - 1``, int64 ``[count]``."""
    return np.random.default_rng([seed, epoch, _ORDER]).permutation(count).astype(np.int64)


def mirrored_images(seed: int, epoch: int, count: int) -> NDArray[np.bool_]:
    """Return which images of a data set are mirrored in an epoch, each with probability 1/2, bool ``[count]``."""
    return np.random.default_rng([seed, epoch, _MIRROR]).random(count) < 0.5


def dropout_seed(seed: int, epoch: int) -> int:
    """Return the seed of PyTorch's generator for the dropout of an epoch."""
    return int(np.random.default_rng([seed, epoch, _DROPOUT]).integers(2**63 - 1))
