"""Which layers have an INT8 form, what stands around them, and how a user names them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper
import pytest

from admth_calibration.graph import Graph
from admth_calibration.layers import check_layer_names, find_layers, select_layers
from admth_runtime.errors import InputError, ModelError


def one_layer(operator, weight, **attributes):
    """A graph of one matrix product."""
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["x", "odd.weight"], ["logits_8"], "odd", **attributes)],
        "odd",
        [info("x", 1, ["batch", 4])],
        [info("logits_8", 1, ["batch", 8])],
        [onnx.numpy_helper.from_array(weight, "odd.weight")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    return Graph(model)


def test_both_backbones(case):
    lite, cnnf = (find_layers(case(name).graph) for name in ("lite", "cnnf"))
    kinds = [layer.kind for layer in lite.values()]
    assert (kinds.count("depthwise"), kinds.count("conv"), kinds.count("dense")) == (16, 33, 5)
    assert lite["trunk.blocks.1.depthwise.conv"].kind == "depthwise"
    assert lite["trunk.blocks.1.depthwise.conv"].activation.op_type == "Clip"
    assert lite["trunk.blocks.1.project.conv"].activation is None
    assert lite["trunk.blocks.1.project.conv"].result == lite["trunk.blocks.1.project.conv"].output
    # The windows of the response normalisation sum squares with exact weights: they are no layers.
    assert list(cnnf) == [f"trunk.conv{number}" for number in range(1, 6)] + [
        "attention.squeeze",
        "attention.excite",
        "first.0",
        "rests.0.2",
        "rests.0.4",
    ]
    for layer in (*lite.values(), *cnnf.values()):
        assert layer.name == layer.weight.removesuffix(".weight")
    assert cnnf["rests.0.4"].output == "logits_16"


@pytest.mark.parametrize(("operator", "turned"), [("Gemm", False), ("Gemm", True), ("MatMul", False)])
def test_rows_are_output_channels(operator, turned):
    weight = np.arange(32, dtype=np.float32).reshape((8, 4) if turned else (4, 8))
    graph = one_layer(operator, weight, **({"transB": 1} if turned else {}))
    layer = find_layers(graph)["odd"]
    rows = layer.rows(weight)
    assert rows.shape == (8, 4)
    np.testing.assert_array_equal(rows, weight if turned else weight.T)
    np.testing.assert_array_equal(layer.from_rows(rows, weight.shape), weight)


@pytest.mark.parametrize("attributes", [{"alpha": 0.5}, {"beta": 2.0}, {"transA": 1}])
def test_a_gemm_that_has_no_int8_form(attributes):
    graph = one_layer("Gemm", np.ones((4, 8), dtype=np.float32), **attributes)
    with pytest.raises(ModelError, match=r"odd is a Gemm with alpha, beta or transA.*--keep-fp32 odd"):
        find_layers(graph)


def test_layers_that_stay(case):
    everything = find_layers(case("lite").graph)
    fewer = select_layers(everything, ["trunk.blocks.0", "first*"])
    assert set(everything) - set(fewer) == {
        "trunk.blocks.0.depthwise.conv",
        "trunk.blocks.0.project.conv",
        "first.0",
    }
    assert list(fewer) == [name for name in everything if name in fewer]
    with pytest.raises(
        InputError, match=r"--keep-fp32 'trunk\.stm\.conv' matches no layer: name one such as trunk\.st"
    ):
        select_layers(everything, ["first", "trunk.stm.conv"])
    with pytest.raises(InputError, match=r"--other 'zzz' matches no layer: name one such as trunk\.stem\.conv, "):
        check_layer_names(everything, ["zzz"], "--other")
