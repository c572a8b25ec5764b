"""Optimizers, their parameter groups and the step decay of the learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from admth_training.config import FitConfig
from admth_training.network import MultiLengthHashNetwork
from admth_training.qat import quantized_layers

__all__ = ["learning_rate", "make_optimizer", "set_learning_rate"]

_MOMENTUM = 0.9
# Scales are learned as factors that start from 1.
_SCALE_FACTOR = 0.1


def make_optimizer(network: MultiLengthHashNetwork, config: FitConfig, *, trunk_factor: float) -> torch.optim.Optimizer:
    """Make SGD with momentum 0.9, or AdamW, over everything that is trained.

    Weights of layers decay; biases, normalisation and the maps Q_k do not. The maps start from an identity, and decay
    would pull them to zero, where the consistency is met by codes that are zero.

    The learning rate of a quantised network counts in steps of its integers, layer by layer: folded batch
    normalisation leaves layers whose weights differ in size by factors of a hundred.

    Args:
        network: the trunk is left out where its parameters ask for no gradient.
        config: the optimizer's kind and settings.
        trunk_factor: the trunk's learning rate is this times the others'.

    """
    maps = {id(parameter) for parameter in network.maps.parameters()}
    heads = nn.ModuleList(network.trainable_parts())
    groups = _step_groups(network, config, trunk_factor)
    done = {id(parameter) for group in groups for parameter in group["params"]}
    for module, factor in ((network.trunk, trunk_factor), (heads, 1.0)):
        trained = [p for p in module.parameters() if p.requires_grad and id(p) not in done]
        decayed = [p for p in trained if p.ndim > 1 and id(p) not in maps]
        kept = [p for p in trained if p.ndim <= 1 or id(p) in maps]
        for parameters, decay in ((decayed, config.weight_decay), (kept, 0.0)):
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay, "rate_factor": factor})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.base_rate, momentum=_MOMENTUM)
    return torch.optim.AdamW(groups, lr=config.base_rate)


def _step_groups(network: MultiLengthHashNetwork, config: FitConfig, trunk_factor: float) -> list[dict[str, Any]]:
    """Return a group for every weight, bias and scale of the layers of a quantised network; none for another one."""
    groups: list[dict[str, Any]] = []
    for name, layer in quantized_layers(network).items():
        factor = trunk_factor if name.startswith("trunk.") else 1.0
        parts = [(layer.weight, float(layer.integer_weight()[1].median()), config.weight_decay)]
        if layer.bias is not None:
            parts.append((layer.bias, float(layer.input.scale().detach()), 0.0))
        parts += [(p, _SCALE_FACTOR, 0.0) for p in layer.parameters() if p is not layer.weight and p is not layer.bias]
        for parameter, step, decay in parts:
            if parameter.requires_grad:
                groups.append({"params": [parameter], "weight_decay": decay, "rate_factor": factor * step})
    return groups


def learning_rate(config: FitConfig, epoch: int) -> float:
    """Return the learning rate of an epoch, counted from 1: multiplied by ``decay_factor`` every ``decay_every``."""
    return float(config.base_rate * config.decay_factor ** ((epoch - 1) // config.decay_every))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
