"""Optimizers, their parameter groups and the step decay of the learning rate."""

from __future__ import annotations

import torch
from torch import nn

from admth_training.config import FitConfig
from admth_training.network import MultiLengthHashNetwork

__all__ = ["learning_rate", "make_optimizer", "set_learning_rate"]

_MOMENTUM = 0.9


def make_optimizer(network: MultiLengthHashNetwork, config: FitConfig, *, trunk_factor: float) -> torch.optim.Optimizer:
    """Make SGD with momentum 0.9, or AdamW, over everything that is trained.

    Weights of layers decay; biases, normalisation and the maps Q_k do not. The maps start from an identity, and decay
    would pull them to zero, where the consistency is met by codes that are zero.

    Args:
        network: the trunk is left out where its parameters ask for no gradient.
        config: the optimizer's kind and settings.
        trunk_factor: the trunk's learning rate is this times the others'.

    """
    maps = {id(parameter) for parameter in network.maps.parameters()}
    heads = nn.ModuleList(network.trainable_parts())
    groups = []
    for module, factor in ((network.trunk, trunk_factor), (heads, 1.0)):
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        decayed = [p for p in trained if p.ndim > 1 and id(p) not in maps]
        kept = [p for p in trained if p.ndim <= 1 or id(p) in maps]
        for parameters, decay in ((decayed, config.weight_decay), (kept, 0.0)):
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "rate_factor": factor})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.base_rate, momentum=_MOMENTUM)
    return torch.optim.AdamW(groups, lr=config.base_rate)


def learning_rate(config: FitConfig, epoch: int) -> float:
    """Return the learning rate of an epoch, counted from 1: multiplied by ``decay_factor`` every ``decay_every``."""
    return float(config.base_rate * config.decay_factor ** ((epoch - 1) // config.decay_every))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
