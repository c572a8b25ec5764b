"""Equalised channels: another network that computes the same, with more of its integers in use."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from admth_calibration.equalising import Equalisation, equalise, tensors_to_equalise
from admth_calibration.graph import Graph
from admth_calibration.observing import channel_extremes

HARD = Equalisation(1.0, 1.0, 0.5)


@pytest.fixture(scope="module")
def equalised(case):
    found = case("lite")
    names = tensors_to_equalise(found.graph, HARD)
    largest = channel_extremes(found.graph.model, names, np.split(found.pixels, 3))
    return names, largest, equalise(found.graph, largest, HARD)


def test_the_function_is_the_same_within_the_range_that_was_seen(case, equalised, run_model):
    found, (_, _, model) = case("lite"), equalised
    onnx.checker.check_model(model, full_check=True)
    before, after = (run_model(one, found.graph.logits, found.pixels) for one in (found.graph.model, model))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-4 * np.abs(a).max())
    changed = [
        a.name
        for a, b in zip(found.graph.model.graph.initializer, model.graph.initializer, strict=True)
        if a.raw_data != b.raw_data
    ]
    assert len(changed) > 60
    assert changed.count("trunk.blocks.1.expand.conv.weight") == 1
    assert model.graph.node == found.graph.model.graph.node


def test_channels_become_alike(case, equalised):
    names, before, model = equalised
    after = channel_extremes(model, names, np.split(case("lite").pixels, 3))
    spread = {
        when: np.mean([np.median(extremes[name]) / extremes[name].max() for name in names])
        for when, extremes in (("before", before), ("after", after))
    }
    assert spread["after"] > 1.4 * spread["before"]
    for name in names:
        if case("lite").graph.producers[name].op_type == "Clip":
            assert after[name].max() <= 6  # what ReLU6 cuts off would be lost


def test_a_residual_stream_shares_its_factors(case, equalised, run_model):
    """Tensors that a sum joins are scaled alike, or the sum would be another."""
    found, (_, _, model) = case("lite"), equalised
    node = next(node for node in found.graph.nodes if node.op_type == "Add" and node.input[1] in found.graph.producers)
    types = dict.fromkeys((*node.input, *node.output), int(onnx.TensorProto.FLOAT))
    before, after = (run_model(one, list(types), found.pixels[:4], **types) for one in (found.graph.model, model))
    factors = [
        np.abs(b).max(axis=(0, 2, 3)) / np.abs(a).max(axis=(0, 2, 3)) for a, b in zip(before, after, strict=True)
    ]
    np.testing.assert_allclose(factors[0], factors[2], rtol=1e-3)
    np.testing.assert_allclose(factors[1], factors[2], rtol=1e-3)
    assert factors[2].max() > 1.2
    assert factors[2].min() >= 0.999  # no channel shrinks: the largest one keeps its range


def test_nothing_to_do(case):
    nothing = Equalisation(0.0, 0.0, 0.0)
    assert tensors_to_equalise(case("lite").graph, nothing) == []
    assert tensors_to_equalise(case("cnnf").graph, Equalisation()) == []  # it has neither kind of tensor
    same = equalise(case("lite").graph, {}, nothing)
    assert same.SerializeToString(deterministic=True) == case("lite").graph.model.SerializeToString(deterministic=True)
    assert Graph(same).layers().keys() == case("lite").graph.layers().keys()
