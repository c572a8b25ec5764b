"""What quantisation-aware training minimises: the run's own objective, distance from the FP32 network, and margins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from admth_training.config import QatConfig
from admth_training.network import MultiLengthHashNetwork

__all__ = ["QatLoss", "QatTerms", "distillation_loss", "margin_loss"]

_NEAR_ZERO = 0.2
_ELSEWHERE = 0.05


@dataclass(frozen=True)
class QatTerms:
    """The loss and the terms that quantisation-aware training adds, each a scalar float32 tensor, unweighted.

    Attributes:
        total: the weighted sum, to call ``backward`` on.
        distillation: see :func:`distillation_loss`.
        margin: see :func:`margin_loss`.

    """

    total: Tensor
    distillation: Tensor
    margin: Tensor


class QatLoss:
    """Adds to the run's own objective what keeps the signs.

    Args:
        config: the weights.
        teacher: the FP32 network, on the device of the training, or None where nothing is learned from it.

    """

    def __init__(self, config: QatConfig, teacher: MultiLengthHashNetwork | None) -> None:
        self._config = config
        self._teacher = teacher

    def __call__(self, objective: Tensor, pixels: Tensor, logits: Sequence[Tensor]) -> QatTerms:
        """Return the loss of a batch.

        Args:
            objective: the run's own, a scalar.
            pixels: uint8 ``[b, H, W, 3]``, the network's input.
            logits: ``[b, L]`` for every length, the network's output.

        """
        config = self._config
        distillation = objective.new_zeros(())
        if self._teacher is not None:
            with torch.no_grad():
                taught = self._teacher(pixels)
            distillation = distillation_loss(logits, taught)
        margin = margin_loss(logits, config.margin)
        total = config.distillation_weight * distillation + config.margin_weight * margin
        if config.objective_weight:
            total = total + config.objective_weight * objective
        return QatTerms(total, distillation, margin)


def distillation_loss(logits: Sequence[Tensor], taught: Sequence[Tensor]) -> Tensor:
    """Mean over lengths of the weighted mean square difference from the FP32 network's logits.

    Bits flip where the FP32 logit is near zero, so a logit t weighs ``exp(-|t| / tau) + 0.05``, with tau a fifth of
    the mean |t| of its length.

    Args:
        logits: ``[b, L]`` for every length.
        taught: the FP32 network's, of the same images.

    """
    terms = []
    for own, other in zip(logits, taught, strict=True):
        size = other.abs()
        tau = _NEAR_ZERO * size.mean() + torch.finfo(size.dtype).tiny
        weight = torch.exp(-size / tau) + _ELSEWHERE
        terms.append((weight * (own - other).square()).sum() / weight.sum())
    return torch.stack(terms).mean()


def margin_loss(logits: Sequence[Tensor], margin: float) -> Tensor:
    """Mean over lengths, images and bits of ``max(0, margin - |z|)``: what lies near zero flips first.

    Args:
        logits: ``[b, L]`` for every length.
        margin: |z| from which the term is zero.

    """
    return torch.stack([(margin - z.abs()).clamp_min(0.0).mean() for z in logits]).mean()
