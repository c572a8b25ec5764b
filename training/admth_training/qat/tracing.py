"""A trunk's traced graph, and what a rewrite asks of it: who makes a tensor, and which layers take its values."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from admth_training.backbones import Trunk
from admth_training.qat.layers import QuantizedLayer

__all__ = ["TracedTrunk"]

_SAME_VALUES = (nn.Identity, nn.MaxPool2d, nn.Flatten, nn.Dropout)
_ACTIVATIONS = (nn.ReLU, nn.ReLU6)


class _Tracer(fx.Tracer):
    """Looks into blocks, not into layers and normalisations."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QuantizedLayer) or not any(True for _ in m.children())


class TracedTrunk:
    """The graph of a trunk whose layers are quantised ones.

    Attributes:
        trunk: the trunk.
        graph: its graph; nodes may be added.
        modules: its modules by name, those of added nodes too.

    """

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self.graph = _Tracer().trace(trunk)
        self.modules: dict[str, nn.Module] = dict(trunk.named_modules())

    @property
    def layers(self) -> list[fx.Node]:
        """The nodes of layers, in order."""
        return [node for node in self.graph.nodes if self.is_layer(node)]

    @property
    def sums(self) -> list[fx.Node]:
        """The nodes that add two tensors, in order."""
        functions = (operator.add, torch.add)
        return [
            node
            for node in self.graph.nodes
            if node.op == "call_function" and node.target in functions and len(node.all_input_nodes) == 2
        ]

    def layer(self, node: fx.Node) -> QuantizedLayer:
        """Return the layer of a node."""
        module = self.modules[str(node.target)]
        assert isinstance(module, QuantizedLayer)
        return module

    def is_layer(self, node: fx.Node) -> bool:
        """Whether a node is a layer."""
        return self._is(node, QuantizedLayer)

    def is_relu6(self, node: fx.Node) -> bool:
        """Whether a node is a ReLU6."""
        return self._is(node, nn.ReLU6) or (node.op == "call_function" and node.target is F.relu6)

    def is_activation(self, node: fx.Node) -> bool:
        """Whether a node is a ReLU or a ReLU6."""
        functions = (F.relu, F.relu6, torch.relu)
        return self._is(node, *_ACTIVATIONS) or (node.op == "call_function" and node.target in functions)

    def keeps_values(self, node: fx.Node) -> bool:
        """Whether a node moves or drops values and makes none but zero."""
        return self._is(node, *_SAME_VALUES) or (node.op == "call_function" and node.target is F.pad)

    def activated(self, layer: fx.Node) -> fx.Node:
        """Return a layer's output after its activation, where it has one."""
        node = layer
        while len(node.users) == 1 and not self.is_activation(node):
            user = next(iter(node.users))
            if not (self._is(user, nn.Identity) or self.is_activation(user)):
                break
            node = user
        return node

    def origin(self, node: fx.Node) -> fx.Node:
        """Walk back to where a node's values were made."""
        while self.keeps_values(node):
            node = node.all_input_nodes[0]
        return node

    def layers_after(self, node: fx.Node) -> list[fx.Node]:
        """Return the layers that take a node as input, or that are one and take what it passes on unchanged."""
        if self.is_layer(node):
            return [node]
        if not self.keeps_values(node):
            return []
        return [layer for user in node.users for layer in self.layers_after(user)]

    def output(self) -> fx.Node:
        """Return the node whose value the trunk returns."""
        last: fx.Node = next(node for node in reversed(self.graph.nodes) if node.op == "output")
        return last.all_input_nodes[0]

    def _is(self, node: fx.Node, *kinds: type) -> bool:
        return node.op == "call_module" and isinstance(self.modules.get(str(node.target)), kinds)
