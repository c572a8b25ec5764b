"""A quantised network: where it rounds, what it computes with, and that it stays a network like any other."""

from __future__ import annotations

import copy
import math
import operator

import numpy as np
import pytest
import torch
from torch import nn

from admth_training.config import FitConfig, NetworkConfig
from admth_training.encode import inference, reference_logits
from admth_training.network import build_network
from admth_training.optim import make_optimizer, set_learning_rate
from admth_training.qat import (
    equalising,
    float_network,
    freeze_quantization,
    observing,
    quantization_tensors,
    quantize_network,
    quantized_layers,
    quantizers,
)
from admth_training.qat.layers import ActivationQuantizer
from admth_training.qat.loss import distillation_loss, margin_loss
from admth_training.qat.names import deployed_layer_names

LITE = {"input_size": 32, "hidden": 16, "code_lengths": (8, 16)}
CNNF = {"backbone": "cnnf", "input_size": 67, "hidden": 16, "code_lengths": (8, 16)}


def pixels(config, count=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, config.size, config.size, 3), dtype=np.uint8)


def lively(config, seed=0):
    """Make a network with fresh weights and the running statistics of a trained one: fresh ones let signals fade."""
    network = build_network(config, seed=seed).eval()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a plain average of what comes by
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        network(torch.from_numpy(pixels(config, 24, seed=5)))
    return network.eval()


def prepared(target, seed=0, **shape):
    network = lively(NetworkConfig(**shape), seed)
    config = network.config
    plain = copy.deepcopy(network)
    quantize_network(network, target)
    with observing(network), inference(network):
        network(torch.from_numpy(pixels(config)))
    return plain, network


def test_every_tensor_between_two_layers_is_uint8_on_the_cpu():
    _, network = prepared("cpu", **LITE)
    modules = dict(network.trunk.named_modules())
    sums = [node for node in network.trunk.graph.nodes if node.target is operator.add]
    assert len(sums) == 9
    for node in sums:
        assert all(isinstance(modules[str(source.target)], ActivationQuantizer) for source in node.args)
    tensors = quantization_tensors(network)
    assert tensors["trunk.stem.conv.input"] == {"scale": 1 / 128, "zero_point": 127}
    assert tensors["trunk.stem.conv.output"] == tensors["trunk.blocks.0.depthwise.conv.input"]
    # A residual sum is the next layer's input, and what is added to it has a scale of its own.
    assert tensors["trunk.blocks.2.project.conv.output"] != tensors["trunk.blocks.3.expand.conv.input"]
    assert tensors["trunk.blocks.1.project.conv.output"] == tensors["trunk.blocks.2.expand.conv.input"]
    assert tensors["first.0.output"] == tensors["rests.0.2.input"] == tensors["rests.1.2.input"]
    layers = {name.rpartition(".")[0] for name in tensors}
    assert layers == set(deployed_layer_names(network).values())
    without = {name for name in layers if f"{name}.output" not in tensors}
    assert without == {"attention.excite", "rests.0.2", "rests.1.2"}
    for name in layers:
        if ".depthwise." in name or ".expand." in name:
            entry = tensors[f"{name}.output"]  # after a ReLU6, which the range replaces
            assert entry["zero_point"] == 0
            assert np.float32(entry["scale"]) * np.float32(255) <= 6


def test_only_inputs_of_layers_are_int8_for_tensorrt():
    _, network = prepared("tensorrt", **LITE)
    tensors = quantization_tensors(network)
    assert set(tensors) == {f"{name}.input" for name in set(deployed_layer_names(network).values())}
    assert all(entry["zero_point"] == 0 and np.frexp(entry["scale"])[0] == 0.5 for entry in tensors.values())
    assert tensors["trunk.stem.conv.input"]["scale"] == 1 / 128


@pytest.mark.parametrize("attention", [True, False])
def test_cnnf_rounds_what_leaves_its_convolutions(attention):
    _, network = prepared("cpu", **CNNF, attention=attention)
    tensors = quantization_tensors(network)
    for name in ("conv1", "conv2", "conv5"):
        assert f"trunk.{name}.output" in tensors
    assert tensors["trunk.conv3.output"] == tensors["trunk.conv4.input"]
    # Pooling and flattening pass integers on; attention computes in float between them.
    assert (tensors["trunk.conv5.output"] == tensors["first.0.input"]) == (not attention)
    assert {"rests.0.2.input", "rests.0.4.input", "rests.1.4.input"} < set(tensors)


@pytest.mark.parametrize("split", ["fc6", "fc7"])
def test_shared_layers_have_their_deployed_names(split):
    _, network = prepared("cpu", **CNNF, split=split)
    tensors = quantization_tensors(network)
    assert "shared.1.input" in tensors
    assert ("shared.3.input" in tensors) == (split == "fc7")
    last = "first" if split == "fc7" else "first.0"
    assert tensors[f"shared.{3 if split == 'fc7' else 1}.output"] == tensors[f"{last}.input"]
    assert f"{last}.output" not in tensors or split == "fc6"


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
@pytest.mark.parametrize("shape", [LITE, CNNF], ids=["lite", "cnnf"])
def test_the_rounded_network_is_near_the_plain_one_and_stays_itself(target, shape):
    plain, network = prepared(target, **shape)
    images = pixels(network.config, seed=1)
    expected, found = reference_logits(plain, images), reference_logits(network, images)
    for length, values in expected.items():
        error = np.abs(found[length] - values).mean() / values.std()
        # Logits that had nothing to do with the plain ones would be 1.1 deviations away.
        assert 1e-4 < error < 0.6
    freeze_quantization(network)
    frozen = reference_logits(network, images)
    freeze_quantization(network)
    again = reference_logits(network, images)
    fresh = quantize_network(build_network(network.config, seed=9), target)
    fresh.load_state_dict(network.state_dict())
    loaded = reference_logits(fresh, images)
    for length in found:
        np.testing.assert_array_equal(found[length], frozen[length])
        np.testing.assert_array_equal(frozen[length], again[length])
        np.testing.assert_array_equal(frozen[length], loaded[length])
    weights = float_network(network)
    assert not quantizers(weights)
    for name, layer in quantized_layers(network).items():
        integers, scales = layer.integer_weight()
        grid = integers * scales.view(-1, *[1] * (integers.ndim - 1))
        assert torch.equal(weights.get_submodule(name).weight, grid)


def test_training_and_evaluation_compute_the_same_for_tensorrt():
    _, network = prepared("tensorrt", **LITE)
    images = pixels(network.config, seed=1)
    expected = reference_logits(network, images)
    network.train()
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    with torch.no_grad():
        for values, length in zip(network(torch.from_numpy(images)), expected, strict=True):
            np.testing.assert_allclose(values.numpy(), expected[length], atol=1e-6)


def test_every_parameter_learns():
    plain, network = prepared("cpu", **LITE)
    images = torch.from_numpy(pixels(network.config))
    network.train()
    with torch.no_grad():
        taught = plain(images)
    (distillation_loss(network(images), taught) + margin_loss(network(images), 1.0)).backward()
    silent = [
        name for name, p in network.named_parameters() if p.grad is None or not bool(torch.isfinite(p.grad).all())
    ]
    assert [name for name in silent if not name.startswith("maps.")] == []
    moved = [name for name, p in network.named_parameters() if p.grad is not None and bool((p.grad != 0).any())]
    assert {"trunk.stem.conv.weight", "trunk.head.conv.output_quantizer.factor", "branches.1.0.bias"} <= set(moved)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_equalised_channels_compute_the_same_with_ranges_that_are_more_alike(target):
    plain = lively(NetworkConfig(**LITE))
    images = pixels(plain.config)
    network = quantize_network(copy.deepcopy(plain), target)
    groups = network.__dict__["_groups"]
    assert sum(group.upper == 6.0 for group in groups) == 16  # before every depthwise convolution
    streams = [group for group in groups if group.upper is None]
    # Every projection writes to one stream, and what reads it is an expansion or the head.
    assert sorted(name for group in streams for name in group.writers) == sorted(
        f"blocks.{index}.project.conv" for index in range(16)
    )
    assert all("expand" in name or name == "head.conv" for group in streams for name in group.readers)

    def spread(net):
        largest = {}
        name = next(group.readers[0] for group in streams if len(group.readers) == 1)
        hook = net.trunk.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs: largest.update(x=inputs[0].abs().amax(dim=(0, 2, 3)))
        )
        with observing(net), inference(net):
            net(torch.from_numpy(images))
        hook.remove()
        return float(largest["x"].max() / largest["x"].median())

    before = spread(copy.deepcopy(network))
    with equalising(network), inference(network):
        network(torch.from_numpy(images))
    expected, found = reference_logits(plain, images), reference_logits(float_network(network), images)
    for length, values in expected.items():
        np.testing.assert_allclose(found[length], values, atol=1e-3 * values.std())
    assert before > 1.1
    assert spread(network) - 1 < 0.5 * (before - 1)


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_steps_bring_the_logits_nearer_to_those_of_the_fp32_network(target):
    plain, network = prepared(target, **LITE)
    images = torch.from_numpy(pixels(network.config))
    with torch.no_grad():
        taught = plain(images)
    config = FitConfig(learning_rate=0.003, weight_decay=0.0)
    optimizer = make_optimizer(network, config, trunk_factor=1.0)
    set_learning_rate(optimizer, config.base_rate)
    for module in network.train().modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    losses = []
    for _ in range(12):
        loss = distillation_loss(network(images), taught)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert np.mean(losses[-3:]) < 0.75 * losses[0]


def test_learning_rates_count_in_steps_of_the_integers():
    _, network = prepared("cpu", **LITE)
    groups = make_optimizer(network, FitConfig(), trunk_factor=0.5).param_groups
    factors = {id(p): group["rate_factor"] for group in groups for p in group["params"]}
    for name, layer in quantized_layers(network).items():
        part = 0.5 if name.startswith("trunk.") else 1.0
        step = float(layer.integer_weight()[1].median())
        assert factors[id(layer.weight)] == pytest.approx(part * step)
    learned = [p for p in network.parameters() if p.requires_grad]
    assert {id(p) for p in learned} == set(factors)


def test_int32_biases_fit_beside_vanishing_weights():
    config = NetworkConfig(**LITE)
    network = build_network(config, seed=0).eval()
    norm = network.trunk.blocks[0].depthwise.norm
    with torch.no_grad():
        norm.weight[3], norm.weight[4] = 1e-12, 0.0  # what folding a dead channel leaves
        norm.bias[3], norm.bias[4], norm.bias[5] = 2.0, -3.0, 0.0
        norm.weight[5] = 0.0
    quantize_network(network, "cpu")
    with observing(network), inference(network):
        network(torch.from_numpy(pixels(config)))
    freeze_quantization(network)
    layer = quantized_layers(network)["trunk.blocks.0.depthwise.conv"]
    integers, scales = layer.integer_weight()
    biases = (layer.bias / (layer.input.scale() * scales)).round().abs()
    assert float(biases.detach().max()) < 2.0**31
    shift = (integers.abs().sum(dim=(1, 2, 3)) * 255 * layer.input.scale() * scales / layer.bias.abs())[3:5]
    assert float(shift.detach().max()) < 1e-3


def test_losses_against_a_plain_loop():
    rng = np.random.default_rng(0)
    own = [torch.tensor(rng.normal(size=(3, n)), dtype=torch.float32) for n in (2, 4)]
    other = [torch.tensor(rng.normal(size=(3, n)), dtype=torch.float32) for n in (2, 4)]
    squares, margins = [], []
    for a, b in zip(own, other, strict=True):
        pairs = list(zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
        tau = 0.2 * sum(abs(y) for _, y in pairs) / len(pairs)
        weights = [math.exp(-abs(y) / tau) + 0.05 for _, y in pairs]
        squares.append(sum(w * (x - y) ** 2 for w, (x, y) in zip(weights, pairs, strict=True)) / sum(weights))
        margins.append(sum(max(0.0, 0.7 - abs(x)) for x, _ in pairs) / len(pairs))
    assert float(distillation_loss(own, other)) == pytest.approx(sum(squares) / 2, rel=1e-5)
    assert float(margin_loss(own, 0.7)) == pytest.approx(sum(margins) / 2, rel=1e-5)
