"""Normalised pixels on the integer grid: found where they are, and made where the first convolution allows it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from admth_calibration.graph import Graph, load_graph
from admth_calibration.layers import find_layers
from admth_calibration.pixels import pixel_grid, with_exact_pixels


def first_of(graph):
    return next(iter(find_layers(graph).values()))


def with_constants(path, change):
    """The model with some of its small constants changed."""
    model = load_graph(str(path))
    for tensor in model.graph.initializer:
        values = change(onnx.numpy_helper.to_array(tensor))
        if values is not None:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(values, dtype=np.float32), tensor.name))
    return model


def off_the_grid(values):
    """Turn a mean of 127 into 127.5."""
    return values + 0.5 if values.size and (values == 127).all() else None


def test_every_pixel_is_an_integer(case):
    """(pixel - 127) / 128 on a scale of 1/128 is an integer for every pixel; int8 lacks the last one alone."""
    graph = case("lite").graph
    grid = pixel_grid(graph, first_of(graph).source)
    assert (grid.scale, grid.mean) == (1 / 128, 127)
    assert [node.op_type for node in grid.nodes if node.op_type == "Transpose"] == ["Transpose"]
    values = (np.arange(256, dtype=np.float32) - grid.mean) * np.float32(grid.scale)
    integers = np.rint(values / np.float32(grid.scale))
    assert (integers + grid.mean == np.arange(256)).all()
    assert (np.clip(integers, -128, 127) == integers)[:255].all()


def test_other_tensors_and_other_normalisations_are_on_no_grid(case, lite, cnnf):
    graph = case("lite").graph
    assert pixel_grid(graph, find_layers(graph)["first.0"].source) is None
    assert pixel_grid(graph, "images") is None
    plain = Graph(load_graph(str(cnnf)))  # 123.68, 116.78, 103.94
    assert pixel_grid(plain, first_of(plain).source) is None
    half = Graph(with_constants(lite, off_the_grid))
    assert pixel_grid(half, first_of(half).source) is None


def test_cnnf_computes_the_same_from_exact_pixels(case, cnnf, run_model, make_smooth):
    model = load_graph(str(cnnf))
    exact = with_exact_pixels(model)
    onnx.checker.check_model(exact, full_check=True)
    grid = pixel_grid(Graph(exact), first_of(Graph(exact)).source)
    assert (grid.scale, grid.mean) == (1.0, 128)
    pixels = np.concatenate(
        [make_smooth(12, 67, 3), np.full((1, 67, 67, 3), 255, np.uint8), np.zeros((1, 67, 67, 3), np.uint8)]
    )
    before, after = (run_model(found, ["logits_16"], pixels)[0] for found in (model, exact))
    assert before.std() > 0.1
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())
    names = [node.op_type for node in Graph(exact).normalisation()]
    assert names.count("Sub") == 1
    assert len(exact.graph.node) == len(model.graph.node) - 1  # the scaling is gone
    assert model.SerializeToString() == load_graph(str(cnnf)).SerializeToString()


def test_models_on_the_grid_and_padded_convolutions_are_left_alone(lite):
    model = load_graph(str(lite))
    assert with_exact_pixels(model) is model
    padded = with_constants(lite, off_the_grid)
    assert with_exact_pixels(padded) is padded


@pytest.mark.parametrize("attribute", [("auto_pad", "SAME_UPPER"), ("pads", [1, 1, 1, 1])])
def test_padding_of_any_kind_forbids_it(cnnf, attribute):
    model = load_graph(str(cnnf))
    node = next(node for node in model.graph.node if node.op_type == "Conv")
    kept = [item for item in node.attribute if item.name not in ("auto_pad", "pads")]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(*attribute)])
    assert with_exact_pixels(model) is model
