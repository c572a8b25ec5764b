"""Where each target has quantised tensors: the places of both backbones, and scales that are shared."""

from __future__ import annotations

import pytest

from admth_calibration.affine import Affine
from admth_calibration.layers import find_layers, select_layers
from admth_calibration.places import affine_for, find_places


@pytest.mark.parametrize("backbone", ["lite", "cnnf"])
def test_tensorrt_has_the_inputs_alone(case, backbone):
    graph = case(backbone).graph
    layers = find_layers(graph)
    places = find_places(graph, layers, "trt")
    assert places.tensors == {layer.source for layer in layers.values()}
    assert dict(places.roots) == {name: name for name in places.tensors}  # nothing is shared, and nothing need be


@pytest.mark.parametrize("backbone", ["lite", "cnnf"])
def test_the_cpu_has_inputs_and_the_outputs_of_convolutions(case, backbone):
    graph = case(backbone).graph
    layers = find_layers(graph)
    places = find_places(graph, layers, "cpu")
    wanted = {layer.source for layer in layers.values()}
    wanted |= {layer.result for layer in layers.values() if layer.kind != "dense"}
    assert wanted <= places.tensors
    # What is left is what the values come from before operators that only move them.
    assert places.tensors - wanted <= {places.roots[name] for name in wanted}
    assert not places.tensors & {output.name for output in graph.model.graph.output}
    assert set(places.ranged) == set(places.roots.values())


def test_residual_sums_are_bytes_on_the_cpu(case):
    graph = case("lite").graph
    tensors = find_places(graph, find_layers(graph), "cpu").tensors
    sums = [node for node in graph.nodes if node.op_type == "Add" and not set(node.input) & set(graph.initializers)]
    assert len(sums) == 9
    for node in sums:
        assert {*node.input, *node.output} <= tensors


def test_operators_that_move_values_share_one_scale(case):
    recipe = case("cnnf").recipe("cpu")
    places = recipe.places(recipe.layers)
    moved = {name: root for name, root in places.roots.items() if name != root}
    makers = {recipe.graph.producers[name].op_type for name in moved}
    assert makers == {"MaxPool", "Reshape"}  # the pools before convolutions, and the flatten before the first Gemm
    affines = recipe.affines(places)
    for name, root in moved.items():
        assert affines[name] is affines[root]
    assert moved[recipe.layers["first.0"].source] == recipe.graph.producers[recipe.layers["first.0"].source].input[0]


def test_a_layer_in_float_takes_its_places_with_it(case):
    graph = case("cnnf").graph
    layers = find_layers(graph)
    whole = find_places(graph, layers, "cpu").tensors
    fewer = find_places(graph, select_layers(layers, ["trunk.conv3", "trunk.conv4"]), "cpu").tensors
    assert whole - fewer == {
        layers["trunk.conv3"].source,
        graph.producers[layers["trunk.conv3"].source].input[0],
        layers["trunk.conv3"].result,
    }
    assert layers["trunk.conv4"].result in fewer  # the next layer's input


def test_pixels_get_the_grid_and_other_tensors_their_range(case):
    for backbone, scale, mean in (("lite", 1 / 128, 127), ("cnnf", 1.0, 128)):
        graph = case(backbone).graph
        source = next(iter(find_layers(graph).values())).source
        assert affine_for(graph, source, -3.0, 2.0, "cpu") == Affine(scale, mean, signed=False)
        assert affine_for(graph, source, -3.0, 2.0, "trt") == Affine(scale, 0, signed=True)
    graph = case("lite").graph
    source = find_layers(graph)["trunk.blocks.1.expand.conv"].source
    assert affine_for(graph, source, -127.0, 128.0, "cpu") == Affine(1.0, 127, signed=False)
    assert affine_for(graph, source, -127.0, 64.0, "trt") == Affine(1.0, 0, signed=True)
