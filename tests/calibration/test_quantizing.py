"""Q/DQ models in TensorRT's form: what is quantised, with which numbers, and what stays."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.numpy_helper
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from admth_calibration.graph import Graph, load_graph
from admth_calibration.probing import Range, collect_ranges, open_probe
from admth_calibration.quantizing import (
    layers_to_quantize,
    pixel_scale,
    quantize,
    quantize_weight,
    representable_scale,
    tensors_to_range,
)
from admth_runtime.errors import InputError, ModelError

INT8 = onnx.TensorProto.INT8


@pytest.fixture(scope="module")
def quantized(lite, make_smooth):
    model = load_graph(str(lite))
    layers = layers_to_quantize(Graph(model))
    ranges = collect_ranges(model, tensors_to_range(layers), [make_smooth(32, 64, 1)])
    return model, quantize(model, ranges, layers)


class TestScales:
    @given(st.floats(min_value=0.0, max_value=60000.0))
    def test_a_scale_is_the_next_number_that_fp16_has(self, scale):
        found = representable_scale(scale)
        assert found > 0
        assert float(np.float16(found)) == found
        if scale > 0:
            assert found >= scale
            below = float(np.nextafter(np.float16(found), np.float16(0)))
            assert below < scale or math.isclose(below, 0.0)

    @settings(max_examples=60)
    @given(
        arrays.arrays(
            np.float32,
            st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)),
            elements=st.floats(-100, 100, width=32),
        ),
        st.integers(0, 2),
    )
    def test_a_weight_is_within_half_a_step_of_its_integers(self, weight, axis):
        values, scales = quantize_weight(weight, axis)
        assert values.dtype == np.int8
        assert values.min(initial=0) >= -127  # symmetric: -128 has no counterpart
        assert scales.shape == (weight.shape[axis],)
        assert (scales > 0).all()
        assert (scales == scales.astype(np.float16)).all()
        shape = [1, 1, 1]
        shape[axis] = -1
        step = scales.reshape(shape)
        assert (np.abs(values * step - weight) <= step * 0.5001 + 1e-12).all()

    def test_a_channel_of_zeros(self):
        values, scales = quantize_weight(np.zeros((2, 3), dtype=np.float32), 0)
        assert not values.any()
        assert (scales == 1).all()

    def test_half_goes_to_even(self):
        values, scales = quantize_weight(np.float32([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]), 0)
        assert scales[0] == 1.0
        assert values[0].tolist() == [127, 0, 2, 2, 0, -2]


class TestModel:
    def test_the_form_is_tensorrts(self, quantized):
        model, result = quantized
        graph = Graph(result.model)
        onnx.checker.check_model(result.model, full_check=True)
        constants = graph.initializers
        pairs = [node for node in graph.nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
        for node in pairs:
            scale, zero = constants[node.input[1]], constants[node.input[2]]
            assert zero.data_type == INT8  # TensorRT takes uint8 for int8 without a word
            assert not onnx.numpy_helper.to_array(zero).any()
            assert (onnx.numpy_helper.to_array(scale) > 0).all()
        quantised = [node.input[0] for node in graph.nodes if node.op_type == "QuantizeLinear"]
        assert len(quantised) == len(set(quantised)) == len(result.scales)  # one pair a tensor, however many take it
        for layer, node in graph.layers().items():
            activation, weight = (graph.producers[name] for name in node.input[:2])
            assert activation.op_type == weight.op_type == "DequantizeLinear", layer
            assert constants[weight.input[0]].data_type == INT8
            assert list(constants[weight.input[1]].dims) == [node_channels(graph, node)]
            for name in node.input[2:]:
                assert constants[name].data_type == onnx.TensorProto.FLOAT
            takers = {taker.op_type for name in node.output for taker in graph.consumers.get(name, [])}
            assert "DequantizeLinear" not in takers
        names = {item.name for item in result.model.graph.initializer}
        assert not any(name.endswith(".weight") for name in names)  # no FP32 copy is left
        weights = sum(np.prod(item.dims) for item in result.model.graph.initializer if item.data_type == INT8)
        assert result.model.ByteSize() < 1.3 * weights + 400_000
        assert result.kept == ()
        assert len(result.layers) == len(Graph(model).layers())

    def test_values_are_what_the_definition_says(self, quantized, make_smooth):
        """The first convolution, computed with integers in NumPy, equals what ONNX Runtime gives."""
        _, result = quantized
        graph = Graph(result.model)
        node = graph.layers()["trunk.stem.conv"]
        source = graph.producers[graph.producers[node.input[0]].input[0]].input[0]
        names = [source, node.output[0]]
        pixels = make_smooth(2, 64, 5)
        with open_probe(result.model, names, types=dict.fromkeys(names, 1)) as probe:
            values, found = probe.run(pixels)
        scale = result.scales[source]
        integers = np.clip(np.rint(values / np.float32(scale)), -128, 127)
        weight_node = graph.producers[node.input[1]]
        weight, scales = (onnx.numpy_helper.to_array(graph.initializers[name]) for name in weight_node.input[:2])
        bias = onnx.numpy_helper.to_array(graph.initializers[node.input[2]])
        expected = convolve(integers, weight.astype(np.float64), node) * (scale * scales)[None, :, None, None]
        np.testing.assert_allclose(found, expected + bias[None, :, None, None], atol=2e-4)

    def test_codes_are_near_those_of_fp32(self, quantized, make_smooth):
        model, result = quantized
        names = Graph(model).logits
        pixels = make_smooth(40, 64, 11)
        with open_probe(model, names) as exact, open_probe(result.model, names) as rounded:
            pairs = list(zip(exact.run(pixels), rounded.run(pixels), strict=True))
        equal = np.mean([((a > 0) == (b > 0)).mean() for a, b in pairs])
        assert 0.85 < equal < 1.0

    def test_pixels_are_exact(self, quantized):
        """(pixel - 127) / 128 on a scale of 1/128 is an integer for every pixel; int8 lacks the last one alone."""
        model, result = quantized
        graph = Graph(model)
        source = graph.layers()["trunk.stem.conv"].input[0]
        assert pixel_scale(graph, source) == 1 / 128 == result.scales[source]
        values = (np.arange(256) - 127) / 128
        integers = np.clip(np.rint(values * 128), -128, 127)
        assert (integers / 128 == values)[:255].all()

    def test_other_normalisations_get_the_range(self, cnnf, make_smooth):
        model = load_graph(str(cnnf))
        graph = Graph(model)
        source = graph.layers()["trunk.conv1"].input[0]
        assert pixel_scale(graph, source) is None
        layers = layers_to_quantize(graph)
        ranges = collect_ranges(model, tensors_to_range(layers), [make_smooth(8, 67, 2)])
        result = quantize(model, ranges, layers)
        assert result.scales[source] == representable_scale(ranges[source].largest / 127)
        assert result.kept == ("trunk.norm1.window_sum", "trunk.norm2.window_sum")
        for name in result.kept:
            assert Graph(result.model).initializers[f"{name}.weight"].data_type == onnx.TensorProto.FLOAT

    def test_layers_that_stay(self, lite):
        graph = Graph(load_graph(str(lite)))
        everything = layers_to_quantize(graph)
        fewer = layers_to_quantize(graph, ["trunk.blocks.0", "first*"])
        assert set(everything) - set(fewer) == {
            "trunk.blocks.0.depthwise.conv",
            "trunk.blocks.0.project.conv",
            "first.0",
        }
        with pytest.raises(InputError, match=r"'trunk\.blok' matches no layer: name one such as trunk\.stem\.conv"):
            layers_to_quantize(graph, ["trunk.blok"])

    def test_ranges_that_are_not_finite(self, lite):
        model = load_graph(str(lite))
        layers = layers_to_quantize(Graph(model))
        ranges = dict.fromkeys(tensors_to_range(layers), Range(-1.0, math.inf))
        with pytest.raises(ModelError, match="is not finite on the calibration images"):
            quantize(model, ranges, layers)

    def test_a_gemm_that_has_no_int8_form(self):
        weight = onnx.numpy_helper.from_array(np.ones((4, 8), dtype=np.float32), "odd.weight")
        node = onnx.helper.make_node("Gemm", ["x", "odd.weight"], ["logits_8"], "odd", alpha=0.5)
        graph = onnx.helper.make_graph(
            [node],
            "odd",
            [onnx.helper.make_tensor_value_info("x", 1, ["batch", 4])],
            [onnx.helper.make_tensor_value_info("logits_8", 1, ["batch", 8])],
            [weight],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
        layers = layers_to_quantize(Graph(model))
        with pytest.raises(ModelError, match=r"odd is a Gemm with alpha, beta or transA.*--keep-fp32 odd"):
            quantize(model, {"x": Range(-1, 1)}, layers)

    def test_matrix_products_are_quantised_by_column(self):
        rng = np.random.default_rng(0)
        weight = rng.normal(size=(4, 8)).astype(np.float32) * np.logspace(-2, 2, 8, dtype=np.float32)
        node = onnx.helper.make_node("MatMul", ["x", "m.weight"], ["logits_8"], "m")
        graph = onnx.helper.make_graph(
            [node],
            "m",
            [onnx.helper.make_tensor_value_info("x", 1, ["batch", 4])],
            [onnx.helper.make_tensor_value_info("logits_8", 1, ["batch", 8])],
            [onnx.numpy_helper.from_array(weight, "m.weight")],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
        result = quantize(model, {"x": Range(-2, 2)}, layers_to_quantize(Graph(model)))
        onnx.checker.check_model(result.model, full_check=True)
        scales = onnx.numpy_helper.to_array(Graph(result.model).initializers["m.weight.scale"])
        assert scales.tolist() == [representable_scale(float(value) / 127) for value in np.abs(weight).max(axis=0)]


def test_ranges_do_not_depend_on_the_batches(lite, make_smooth):
    model = load_graph(str(lite))
    names = tensors_to_range(layers_to_quantize(Graph(model)))[:12]
    pixels = make_smooth(12, 64, 4)
    whole = collect_ranges(lite, names, [pixels])
    parts = collect_ranges(model, names, [pixels[:5], pixels[5:6], pixels[6:]])
    for name in names:
        assert parts[name].low == pytest.approx(whole[name].low, abs=1e-4)
        assert parts[name].high == pytest.approx(whole[name].high, abs=1e-4)


def node_channels(graph, node):
    name = graph.producers[node.input[1]].input[0]
    dims = list(graph.initializers[name].dims)
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return dims[0] if node.op_type == "Conv" or transposed else dims[-1]


def convolve(values, weight, node):
    attributes = {attribute.name: list(attribute.ints) for attribute in node.attribute if attribute.ints}
    top, left, bottom, right = attributes["pads"]
    step = attributes["strides"][0]
    padded = np.pad(values.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(2, 3))[:, :, ::step, ::step]
    return np.einsum("nchwij,ocij->nohw", windows, weight)
