r"""The paper's objective, eq. 9: pairwise likelihood (eq. 5-7) plus consistency between neighbouring lengths (eq. 8).

Readings of the points that the paper leaves open:

- Eq. 7 is a log-likelihood, to be maximised; its negative, ``softplus(theta) - s * theta``, is minimised. In that
  form nothing overflows, whereas ``log(1 + exp(theta))`` does.
- ``theta = <h_i, h_j> / 2`` as in eq. 6; eq. 7 and 9 omit the half. ``ObjectiveConfig.inner_product_scale`` chooses.
- alpha multiplies the whole likelihood, both of its terms.
- Every printed sum is a mean: the likelihood over the pairs i != j of a batch and over the branches, the consistency
  over neighbours, images and bits. Sums would make the step grow with the batch size, and diverge at the paper's
  learning rate of 0.15 with alpha = 20. As printed the likelihood has n times as many terms as the consistency.
  A consistency summed over the bits, against a mean over the pairs, would outweigh it near zero: with ten classes every
  code then shrinks to zero, where eq. 8 holds and the likelihood has a saddle point.
- Eq. 8: k runs to K - 1, since branch K has no longer neighbour; the norm is the squared Frobenius norm, divided by its
  number of entries; the "1" at the end of eq. 9 is a misprint. Both printed objectives map the shorter code to the
  longer one.
- ``h = tanh(logits)`` stands for the binary code during training: there is no quantisation term.
- Two images are similar when they share at least one label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from admth_training.config import ObjectiveConfig

__all__ = ["LossTerms", "admth_loss", "consistency_loss", "pairwise_likelihood_loss", "similarity"]


@dataclass(frozen=True)
class LossTerms:
    """The loss and its two unweighted terms, each a scalar float32 tensor.

    Attributes:
        total: alpha * likelihood + beta * consistency, to call ``backward`` on.
        likelihood: mean negative log-likelihood over pairs and branches.
        consistency: mean squared difference between mapped neighbours, over their bits.

    """

    total: Tensor
    likelihood: Tensor
    consistency: Tensor


def similarity(labels: Tensor, other: Tensor | None = None) -> Tensor:
    """Return s_ij: 1.0 where two images share a label, else 0.0.

    Args:
        labels: multi-hot ``[n, classes]``, of any numeric or boolean type.
        other: multi-hot ``[m, classes]``; None compares ``labels`` with itself.

    Returns:
        float32 ``[n, m]``.

    """
    a = labels.float()
    b = a if other is None else other.float()
    return (a @ b.T > 0).float()


def pairwise_likelihood_loss(codes: Tensor, similar: Tensor, *, scale: float = 0.5) -> Tensor:
    """Mean over the pairs i != j of ``softplus(theta_ij) - s_ij * theta_ij`` (eq. 5-7), theta = scale * <h_i, h_j>.

    Args:
        codes: relaxed codes h in [-1, 1], ``[n, L]`` with n >= 2; lower precisions are computed in FP32.
        similar: s, float32 ``[n, n]``.
        scale: the factor of eq. 6.

    Returns:
        Scalar float32.

    """
    h = codes.float()
    theta = scale * (h @ h.T)
    losses = F.softplus(theta) - similar * theta
    n = len(h)
    # A pair of an image with itself is similar whatever the network says, and would only dilute the mean.
    return (losses.sum() - losses.diagonal().sum()) / (n * (n - 1))


def consistency_loss(codes: Sequence[Tensor], maps: Sequence[Tensor], *, short_to_long: bool = True) -> Tensor:
    """Mean over neighbours k, images and bits of the squares in ``H_{k+1} - Q_k^T H_k`` (eq. 8), or of its reverse.

    Args:
        codes: relaxed codes ``[n, L_k]`` for every length, shortest first.
        maps: Q_k, ``[L_k, L_{k+1}]`` when short to long, else ``[L_{k+1}, L_k]``.
        short_to_long: whether the shorter code is mapped to the longer one.

    Returns:
        Scalar float32; zero for a single code length, which has no neighbour.

    """
    if len(codes) == 1:
        return codes[0].new_zeros((), dtype=torch.float32)
    terms = []
    for shorter, longer, matrix in zip(codes[:-1], codes[1:], maps, strict=True):
        source, target = (shorter, longer) if short_to_long else (longer, shorter)
        difference = target.float() - source.float() @ matrix.float()
        terms.append(difference.square().mean())
    return torch.stack(terms).mean()


def admth_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    maps: Sequence[Tensor],
    config: ObjectiveConfig,
    *,
    short_to_long: bool = True,
) -> LossTerms:
    """Eq. 9 over every code length, in FP32 whatever the precision of the logits.

    Args:
        logits: ``[n, L]`` for every length, shortest first, before tanh.
        labels: multi-hot ``[n, classes]``.
        maps: Q_k between neighbours.
        config: alpha, beta and the factor of eq. 6.
        short_to_long: the direction of the maps.

    """
    with torch.autocast(device_type=logits[0].device.type, enabled=False):
        similar = similarity(labels)
        codes = [torch.tanh(z.float()) for z in logits]
        scale = config.inner_product_scale
        likelihood = torch.stack([pairwise_likelihood_loss(h, similar, scale=scale) for h in codes]).mean()
        consistency = consistency_loss(codes, maps, short_to_long=short_to_long)
        total = config.alpha * likelihood + config.beta * consistency
    return LossTerms(total, likelihood, consistency)
