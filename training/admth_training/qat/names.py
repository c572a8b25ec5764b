"""What the deployed graph calls the layers of a network: their weights' names there, without ``.weight``.

The deployed form has no dropout, and one first layer in place of those of the branches, so numbers shift.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from admth_training.network import MultiLengthHashNetwork

__all__ = ["deployed_layer_names"]


def deployed_layer_names(network: MultiLengthHashNetwork) -> dict[str, str]:
    """Return the deployed name of every layer with weights, by its name in the network.

    The first layers of the branches all have one name, that of the layer they become.
    """
    names: dict[str, str] = {}
    for part in ("trunk", "attention"):
        modules = getattr(network, part).named_modules(prefix=part)
        names |= {name: name for name, module in modules if isinstance(module, (nn.Conv2d, nn.Linear))}
    names |= {f"shared.{old}": f"shared.{new}" for old, new in _renumbered(network.shared)}
    for index, branch in enumerate(network.branches):
        layers = list(_renumbered(branch))
        first = "first.0" if len(layers) > 1 else "first"
        for place, (old, new) in enumerate(layers):
            names[f"branches.{index}.{old}"] = first if place == 0 else f"rests.{index}.{new}"
    return names


def _renumbered(layers: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield the place of every layer with weights among all layers, and among those that are not dropout."""
    kept = 0
    for place, layer in enumerate(layers.children()):
        if isinstance(layer, nn.Linear):
            yield place, kept
        kept += not isinstance(layer, nn.Dropout)
