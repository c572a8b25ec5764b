"""The emitted models: TensorRT's form, and for the CPU what ONNX Runtime's optimiser makes of it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper
import onnxruntime
import pytest

from admth_calibration.graph import Graph
from admth_calibration.layers import find_layers
from admth_calibration.probing import session_options

INT8, UINT8, INT32, FLOAT = (getattr(onnx.TensorProto, name) for name in ("INT8", "UINT8", "INT32", "FLOAT"))
BACKBONES = ("lite", "cnnf")


@pytest.fixture(scope="module")
def optimised(tmp_path_factory):
    """Give the graph that ONNX Runtime runs, after all its optimisers."""

    def get(model):
        path = tmp_path_factory.mktemp("optimised") / "model.onnx"
        options = session_options(1)
        options.optimized_model_filepath = str(path)
        onnxruntime.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["WeightBiasQuantization"],  # as the runtime does
        )
        return onnx.load(path)

    return get


def constant(graph, name):
    return onnx.numpy_helper.to_array(graph.initializers[name])


def pairs_of(graph):
    return [node for node in graph.nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")]


@pytest.mark.parametrize("backbone", BACKBONES)
class TestCpu:
    def test_every_layer_becomes_an_integer_kernel(self, candidate, optimised, backbone):
        found = candidate(backbone, "cpu")
        model = optimised(found.model)
        kernels = Counter(node.op_type for node in model.graph.node)
        dense = 5
        assert kernels["QLinearConv"] == len(found.layers) - dense
        assert kernels["QGemm"] == dense
        for operator in ("Conv", "FusedConv", "Gemm", "FusedGemm", "Clip", "ConvInteger", "MatMulInteger"):
            assert not kernels[operator], (operator, kernels)
        # The sums of the response normalisation alone stay in float.
        assert kernels["MatMul"] == (2 if backbone == "cnnf" else 0)
        if backbone == "lite":
            assert kernels["QLinearAdd"] == 9
        else:
            assert kernels["NhwcMaxPool"] == 3  # of bytes: its input and output share one scale
        # A weight that is dequantised in every run would cost more than INT8 gains.
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear":
                assert node.input[0] not in constants
        large = {tensor.data_type for tensor in constants.values() if np.prod(tensor.dims) > 3000}
        assert large <= ({INT8, UINT8} if backbone == "lite" else {INT8, UINT8, FLOAT})
        # Logits and codes leave straight from the last layers.
        makers = {name: node.op_type for node in model.graph.node for name in node.output}
        assert {makers[output.name] for output in found.model.graph.output if "logits" in output.name} == {"QGemm"}

    def test_pixels_go_in_as_they_are(self, candidate, optimised, backbone):
        model = optimised(candidate(backbone, "cpu").model)
        takers = [node for node in model.graph.node if "images" in node.input]
        assert len(takers) == 1
        assert takers[0].op_type in ("Transpose", "QLinearConv")  # no cast, and no float normalisation

    def test_biases_have_the_scale_of_their_sums_to_the_last_bit(self, candidate, backbone):
        found = candidate(backbone, "cpu")
        graph = Graph(found.model)
        layers = graph.layers()
        for name in found.layers:
            activation, weight, bias = (graph.producers[tensor] for tensor in layers[name].input)
            assert {node.op_type for node in (activation, weight, bias)} == {"DequantizeLinear"}
            assert constant(graph, activation.input[2]).dtype == np.uint8
            assert constant(graph, weight.input[0]).dtype == np.int8
            assert not constant(graph, weight.input[2]).any()
            assert constant(graph, bias.input[0]).dtype == np.int32
            assert not constant(graph, bias.input[2]).any()
            expected = constant(graph, activation.input[1]) * constant(graph, weight.input[1])
            assert expected.dtype == np.float32
            np.testing.assert_array_equal(constant(graph, bias.input[1]), expected)
            exact = found.integers[name].bias
            steps = constant(graph, bias.input[0]) * expected.astype(np.float64)
            assert (np.abs(steps - exact) <= 0.501 * expected).all()

    def test_outputs_are_quantised_and_logits_are_not(self, candidate, case, backbone):
        found = candidate(backbone, "cpu")
        graph = Graph(found.model)
        layers = find_layers(case(backbone).graph)
        quantised = {node.input[0] for node in graph.nodes if node.op_type == "QuantizeLinear"}
        for layer in layers.values():
            if layer.kind != "dense":
                assert layer.result in quantised
        assert not quantised & {output.name for output in found.model.graph.output}


@pytest.mark.parametrize("backbone", BACKBONES)
class TestTensorRT:
    def test_inputs_and_weights_alone_are_quantised(self, candidate, case, backbone):
        found = candidate(backbone, "trt")
        graph = Graph(found.model)
        for node in pairs_of(graph):
            scale, zero = constant(graph, node.input[1]), constant(graph, node.input[2])
            assert zero.dtype == np.int8  # TensorRT takes uint8 for int8 without a word
            assert not zero.any()
            assert (scale > 0).all()
            assert (scale.astype(np.float16).astype(np.float32) == scale).all()
        quantised = [node.input[0] for node in graph.nodes if node.op_type == "QuantizeLinear"]
        sources = {layer.source for layer in find_layers(case(backbone).graph).values()}
        assert sorted(quantised) == sorted(sources)  # one pair a tensor, however many take it
        layers = graph.layers()
        for name in found.layers:
            node = layers[name]
            activation, weight = (graph.producers[tensor] for tensor in node.input[:2])
            assert activation.op_type == weight.op_type == "DequantizeLinear", name
            assert graph.initializers[weight.input[0]].data_type == INT8
            assert graph.initializers[node.input[2]].data_type == FLOAT
            np.testing.assert_array_equal(constant(graph, node.input[2]), found.integers[name].bias)

    def test_activations_stay_as_nodes(self, candidate, case, backbone):
        """TensorRT fuses them itself."""
        kinds = Counter(node.op_type for node in candidate(backbone, "trt").model.graph.node)
        before = Counter(node.op_type for node in case(backbone).graph.nodes)
        assert (kinds["Clip"], kinds["Relu"], kinds["Conv"]) == (before["Clip"], before["Relu"], before["Conv"])


@pytest.mark.parametrize("target", ["cpu", "trt"])
@pytest.mark.parametrize("backbone", BACKBONES)
class TestBoth:
    def test_the_model_is_valid_and_small(self, candidate, case, backbone, target):
        found = candidate(backbone, target)
        onnx.checker.check_model(found.model, full_check=True)
        source = case(backbone).graph.model
        assert found.model.graph.input == source.graph.input
        assert found.model.graph.output == source.graph.output
        assert found.model.metadata_props == source.metadata_props
        assert found.model.opset_import == source.opset_import
        names = {item.name for item in found.model.graph.initializer}
        assert len(names) == len(found.model.graph.initializer)
        assert not {f"{name}.weight" for name in found.layers} & names  # no FP32 copy is left
        used = {name for node in found.model.graph.node for name in node.input}
        assert names <= used
        weights = sum(np.prod(item.dims) for item in found.model.graph.initializer if item.data_type == INT8)
        assert found.model.ByteSize() < 1.3 * weights + 400_000
        assert (found.kept, len(found.layers)) == ((), len(find_layers(case(backbone).graph)))
        # The norm's windows are read again as layers, under their own names, so that reports can name them.
        kept = set(Graph(found.model).layers()) - set(found.layers)
        assert len(kept) == (2 if backbone == "cnnf" else 0)

    def test_codes_are_near_those_of_fp32(self, candidate, case, make_smooth, run_model, backbone, target):
        size = {"lite": 64, "cnnf": 67}[backbone]
        pixels = make_smooth(40, size, 11)
        names = case(backbone).graph.logits
        pairs = zip(
            run_model(case(backbone).model, names, pixels),
            run_model(candidate(backbone, target).model, names, pixels),
            strict=True,
        )
        equal = np.mean([((a > 0) == (b > 0)).mean() for a, b in pairs])
        assert equal > 0.93


def test_relu6_is_left_out_only_where_saturation_does_its_work(case, optimised):
    """Whatever factor tuning puts on a range, ReLU6's bound stays the last integer, and the kernel an integer one."""
    found = case("lite")
    for factor in (0.9, 1.08):
        recipe = found.recipe("cpu", "nearest", factors={"relu6_1": factor, "relu6_5": factor})
        made = recipe.fit(found.pixels[:8])
        assert made.affines["relu6_1"].bounds[1] <= 6.0001
        kernels = Counter(node.op_type for node in optimised(made.model).graph.node)
        assert (kernels["QLinearConv"], kernels["FusedConv"], kernels["Conv"]) == (49, 0, 0)


@pytest.mark.parametrize("target", ["cpu", "trt"])
def test_layers_in_float_keep_their_weights(case, candidate, run_model, optimised, target):
    found, whole = case("cnnf"), candidate("cnnf", target)
    recipe = found.recipe(target)
    kept = ["trunk.conv2", "first.0"]
    made = recipe.reuse(whole.integers, kept)
    assert made.kept == tuple(kept)
    onnx.checker.check_model(made.model, full_check=True)
    graph = Graph(made.model)
    for name in kept:
        node = graph.layers()[name]
        source = found.graph.layers()[name]
        assert node.input[1:] == source.input[1:]
        for tensor in node.input[1:]:
            np.testing.assert_array_equal(constant(graph, tensor), constant(found.graph, tensor))
    if target == "cpu":
        kernels = Counter(node.op_type for node in optimised(made.model).graph.node)
        assert (kernels["QLinearConv"], kernels["QGemm"]) == (4, 4)
        assert kernels["FusedConv"] + kernels["Conv"] == 1
    exact, rounded, mixed = (
        run_model(model, ["logits_16"], found.pixels)[0] for model in (found.model, whole.model, made.model)
    )
    assert np.square(mixed - exact).mean() < np.square(rounded - exact).mean()


def test_a_model_with_nothing_in_int8_is_the_fp32_model(case, run_model):
    found = case("cnnf")
    recipe = found.recipe("cpu")
    made = recipe.reuse({}, list(recipe.layers))
    assert (made.layers, made.kept) == ((), tuple(recipe.layers))
    assert not pairs_of(Graph(made.model))
    a, b = (run_model(model, ["logits_16"], found.pixels[:4])[0] for model in (found.model, made.model))
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


def test_matrix_products_are_quantised_by_column():
    from admth_calibration.fitting_layers import LayerFitter
    from admth_calibration.observing import POINTS, Observation
    from admth_calibration.recipe import Recipe

    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 8)).astype(np.float32) * np.logspace(-1, 2, 8, dtype=np.float32)
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Cast", ["images"], ["x"], "cast", to=FLOAT),
            onnx.helper.make_node("MatMul", ["x", "m.weight"], ["logits_8"], "m"),
        ],
        "m",
        [info("images", UINT8, ["batch", 4])],
        [info("logits_8", 1, ["batch", 8])],
        [onnx.numpy_helper.from_array(weight, "m.weight")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    pixels = rng.integers(0, 256, (30, 4), dtype=np.uint8)
    seen = {"x": Observation(0.0, 255.0, np.zeros(POINTS, dtype=np.int64))}
    for target in ("cpu", "trt"):
        made = Recipe(Graph(model), target, seen, "min-max", LayerFitter("nearest")).fit(pixels)
        onnx.checker.check_model(made.model, full_check=True)
        scales = constant(Graph(made.model), "m.weight.scale")
        np.testing.assert_allclose(scales, np.abs(weight).max(axis=0) / 127, rtol=1e-6)
        session = onnxruntime.InferenceSession(made.model.SerializeToString(), providers=["CPUExecutionProvider"])
        found = session.run(None, {"images": pixels})[0]
        assert (np.abs(found - pixels @ weight) <= 3 * scales * 255).all()


@pytest.mark.parametrize("name", ["trunk.stem.conv", "trunk.blocks.1.expand.conv"])
def test_channels_that_are_all_but_zero(case, run_model, name):
    """Their bias is all they have: it is neither cut off, nor rounded to steps of their tiny or missing weights.

    Pretrained networks hold such channels. Sums of 32 bits would wrap around above a bias that fills them.
    """
    found = case("lite")
    model = onnx.ModelProto()
    model.CopyFrom(found.graph.model)
    weight, bias = (
        next(tensor for tensor in model.graph.initializer if tensor.name == f"{name}.{part}")
        for part in ("weight", "bias")
    )
    values, shifts = onnx.numpy_helper.to_array(weight).copy(), onnx.numpy_helper.to_array(bias).copy()
    for channel, (size, shift) in enumerate(((0, 2.3), (0, -3.0), (2e-6, 4.1), (2e-6, -4.1), (1e-9, 1.9), (0, 0))):
        values[channel] = np.where(np.arange(values[channel].size) % 2, size, -size).reshape(values[channel].shape)
        shifts[channel] = shift
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    bias.CopyFrom(onnx.numpy_helper.from_array(shifts, bias.name))
    recipe = found.of(model).recipe("cpu", "nearest", correct_bias=False)
    made = recipe.fit(found.pixels[:4])
    layer, integers = recipe.layers[name], made.integers[name]
    steps = integers.bias / (made.affines[layer.source].scale * integers.scales.astype(np.float64))
    assert np.abs(steps).max() < 2**30
    got = run_model(made.model, [f"{layer.result}.int8"], found.pixels[:4], **{f"{layer.result}.int8": UINT8})[0]
    exact = made.affines[layer.result].quantize(np.clip(shifts[:6], 0, 6).astype(np.float32))
    assert np.abs(got[:, :6].astype(int) - exact[None, :, None, None]).max() <= 1
