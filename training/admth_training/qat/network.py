"""A trained network made ready for INT8: folded, its layers quantised, every rounding where the target has it.

The result is still the network: it encodes, is evaluated and is trained as before, with other weights' names. Which
tensors are rounded is the same rule that writes Q/DQ nodes into an ONNX model (``admth_calibration``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from admth_training.folding import fold_batch_norm
from admth_training.network import MultiLengthHashNetwork, build_network
from admth_training.qat.equalisation import ChannelGroup, equalise, find_groups
from admth_training.qat.layers import ActivationQuantizer, QuantizedLayer, quantized_layer
from admth_training.qat.names import deployed_layer_names
from admth_training.qat.places import place_quantizers
from admth_training.qat.ranges import ChannelObserver, Observer, QuantizedRange
from admth_training.qat.tracing import TracedTrunk

__all__ = [
    "equalising",
    "float_network",
    "freeze_quantization",
    "observing",
    "quantization_tensors",
    "quantize_network",
    "quantized_layers",
    "quantizers",
]


def quantize_network(network: MultiLengthHashNetwork, target: str) -> MultiLengthHashNetwork:
    """Prepare a network for quantisation-aware training, in place, and return it.

    Its activation ranges still have to be observed, or loaded.

    Args:
        network: a trained FP32 network, or one of this shape whose weights are loaded next.
        target: ``"cpu"`` or ``"tensorrt"``.

    """
    signed = target == "tensorrt"
    fold_batch_norm(network.trunk.eval())
    names = deployed_layer_names(network)
    pixels = _pixel_range(network, signed=signed)
    for index, name in enumerate(names):
        layer = network.get_submodule(name)
        assert isinstance(layer, (nn.Conv2d, nn.Linear))
        quantizer = ActivationQuantizer(signed=signed, exact=pixels if index == 0 else None)
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, quantized_layer(layer, quantizer))
    traced = TracedTrunk(network.trunk)
    groups = find_groups(traced)
    places = place_quantizers(traced, signed=signed)
    network.trunk = places.trunk
    outputs = {f"trunk.{name}": quantizer for name, quantizer in places.outputs.items()}
    pooled = places.last if isinstance(network.attention, nn.Identity) else None
    _share_inputs(network, pooled, signed=signed)
    if not signed:
        outputs |= dict(_hidden_outputs(network))
        for name, quantizer in outputs.items():
            quantized_layers(network)[name].round_output_for(quantizer)
    # Kept beside the modules: these are second names of quantisers that are registered elsewhere.
    network.__dict__["_outputs"] = outputs
    network.__dict__["_groups"] = groups
    return network


def quantized_layers(network: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantised layers by name, in order; none where the network is not a quantised one."""
    return {name: module for name, module in network.named_modules() if isinstance(module, QuantizedLayer)}


def quantizers(network: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return the activations' quantisers by name, each once."""
    return {name: module for name, module in network.named_modules() if isinstance(module, ActivationQuantizer)}


def equalising(network: MultiLengthHashNetwork) -> AbstractContextManager[None]:
    """Run a block in which the network computes in float and its channels are watched; then equalise them.

    What the network computes stays the same, so the block comes before that of :func:`observing`.

    Raises:
        TrainingError: a tensor was not finite, or no image came by.

    """
    return _watching(network, _equalise)


def observing(network: MultiLengthHashNetwork) -> AbstractContextManager[None]:
    """Run a block in which the network computes in float and is watched; then set ranges and correct biases.

    Raises:
        TrainingError: a tensor was not finite, or no image came by.

    """
    return _watching(network, _set_ranges)


@contextmanager
def _watching(
    network: MultiLengthHashNetwork,
    use: Callable[[MultiLengthHashNetwork, dict[str, Observer], dict[str, ChannelObserver]], None],
) -> Iterator[None]:
    found, layers = quantizers(network), quantized_layers(network)
    tensors = {name: Observer() for name in found}
    channels = {name: ChannelObserver() for name in layers}
    try:
        for name, quantizer in found.items():
            quantizer.observer = tensors[name]
        for name, layer in layers.items():
            layer.observed = channels[name]
        yield
    finally:
        for quantizer in found.values():
            quantizer.observer = None
        for layer in layers.values():
            layer.observed = None
    for name, observer in tensors.items():
        observer.check(name)
    with torch.no_grad():
        use(network, tensors, channels)


def _equalise(
    network: MultiLengthHashNetwork, tensors: dict[str, Observer], channels: dict[str, ChannelObserver]
) -> None:
    groups: list[ChannelGroup] = network.__dict__["_groups"]
    prefix = "trunk."
    layers = {name.removeprefix(prefix): layer for name, layer in quantized_layers(network).items()}
    equalise(layers, groups, {name.removeprefix(prefix): seen.largest() for name, seen in channels.items()})


def _set_ranges(
    network: MultiLengthHashNetwork, tensors: dict[str, Observer], channels: dict[str, ChannelObserver]
) -> None:
    for name, quantizer in quantizers(network).items():
        quantizer.set_range(tensors[name].range(signed=quantizer.signed))
    for name, layer in quantized_layers(network).items():
        layer.correct_bias(channels[name].mean())


def freeze_quantization(network: MultiLengthHashNetwork) -> None:
    """Put weights on their grids and make the learned scales plain numbers: what is saved is what is computed."""
    with torch.no_grad():
        for quantizer in quantizers(network).values():
            quantizer.freeze()
        for layer in quantized_layers(network).values():
            layer.snap()


def quantization_tensors(network: MultiLengthHashNetwork) -> dict[str, dict[str, float | int]]:
    """Return scale and zero point of every quantised tensor, by its name in the deployed graph.

    A tensor that is one layer's output and the next one's input is there under both names.
    """
    names = deployed_layer_names(network)
    tensors = {}
    for name, layer in quantized_layers(network).items():
        tensors[f"{names[name]}.input"] = _numbers(layer.input)
    for name, quantizer in _outputs(network).items():
        tensors[f"{names[name]}.output"] = _numbers(quantizer)
    return tensors


def float_network(network: MultiLengthHashNetwork) -> MultiLengthHashNetwork:
    """Return the plain FP32 network with a quantised network's weights: no activation is rounded in it.

    Batch normalisation stays folded. The weights are copied, and in the network's state: on their grids after
    :func:`freeze_quantization`.
    """
    plain = build_network(network.config)
    fold_batch_norm(plain.trunk.eval())
    state = network.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain.to(next(network.parameters()).device).train(network.training)


def _outputs(network: MultiLengthHashNetwork) -> dict[str, ActivationQuantizer]:
    outputs: dict[str, ActivationQuantizer] = network.__dict__["_outputs"]
    return outputs


def _numbers(quantizer: ActivationQuantizer) -> dict[str, float | int]:
    return {"scale": float(quantizer.scale().detach()), "zero_point": int(quantizer.zero_point)}


def _pixel_range(network: MultiLengthHashNetwork, *, signed: bool) -> QuantizedRange | None:
    """Return the grid that holds every normalised pixel exactly, where mean and deviation are such numbers."""
    means, deviations = set(network.trunk.mean), set(network.trunk.std)
    if len(means) != 1 or len(deviations) != 1:
        return None
    mean, deviation = means.pop(), deviations.pop()
    power = 2.0 ** round(torch.tensor(deviation).log2().item())
    if mean != round(mean) or deviation != power or not (127 <= mean <= 128 or (not signed and 0 <= mean <= 255)):
        return None
    return QuantizedRange(1 / deviation, 0 if signed else int(mean))


def _share_inputs(network: MultiLengthHashNetwork, pooled: ActivationQuantizer | None, *, signed: bool) -> None:
    """Let layers that take one tensor round it alike.

    All branches start from the same features. For the CPU, the hidden values of all branches are one tensor, the
    output of their merged first layers, which is rounded before it is split.
    """
    groups = [_branch_layers(network, 0)]
    if not signed:
        groups.append(_branch_layers(network, 1))
    for group in groups:
        for layer in group[1:]:
            layer.quantize_input_with(group[0].input, owner=False)
    if pooled is not None:
        shared = [layer for layer in network.shared.children() if isinstance(layer, QuantizedLayer)]
        for layer in shared[:1] or groups[0]:
            layer.quantize_input_with(pooled, owner=False)


def _branch_layers(network: MultiLengthHashNetwork, place: int) -> list[QuantizedLayer]:
    found = []
    for branch in network.branches:
        layers = [layer for layer in branch.children() if isinstance(layer, QuantizedLayer)]
        found += layers[place : place + 1]
    return found


def _hidden_outputs(network: MultiLengthHashNetwork) -> Iterator[tuple[str, ActivationQuantizer]]:
    """Yield the layers outside the trunk whose output, after its ReLU, is the next layer's input."""
    layers = quantized_layers(network)
    prefixes = [("attention.",), *(("shared.", f"branches.{index}.") for index in range(len(network.branches)))]
    for prefix in prefixes:
        chain = [name for name in layers if name.startswith(prefix)]
        for place, name in enumerate(chain[:-1]):
            yield name, layers[chain[place + 1]].input
