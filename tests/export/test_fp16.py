"""FP32 ONNX to FP16-typed ONNX: what changes type, what stays, and which layers are blamed."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.checker
import onnx.helper
import onnx.numpy_helper
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from admth_calibration.graph import Graph, matches_layer
from admth_calibration.probing import Range, collect_ranges, open_probe
from admth_export.blame import first_non_finite, layer_shares
from admth_export.deployed import BandedResponseNorm
from admth_export.fp16 import automatic_islands, named_islands, sensitive_islands, to_half
from admth_export.fp16_simulation import simulate_half
from admth_export.onnx_export import build_graph
from admth_export.options import OnnxOptions
from admth_runtime.errors import InputError, ModelError
from admth_training.backbones import LocalResponseNorm
from admth_training.backbones.efficientnet_lite0 import load_imagenet_weights
from admth_training.config import NetworkConfig

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def graph_of(network, size):
    return build_graph(network, (size, size, 3), OnnxOptions())


@pytest.fixture(scope="module")
def cnnf(make_network):
    return graph_of(make_network(NetworkConfig(backbone="cnnf", input_size=67, hidden=24, code_lengths=(8, 16))), 67)


@pytest.fixture(scope="module")
def lite(make_network):
    """EfficientNet-Lite0 with ImageNet weights: unlike a random one, it is as well conditioned as in use."""
    config = NetworkConfig(input_size=64, hidden=32, code_lengths=(8, 16))
    network = make_network(config)
    load_imagenet_weights(network.trunk)
    return graph_of(network, 64)


def kinds(model):
    graph = Graph(model)
    return graph, {node.name: graph.types[node.output[0]] for node in graph.nodes}


def logits_of(model, pixels):
    names = [output.name for output in model.graph.output if output.name.startswith("logits")]
    with open_probe(model, names, threads=2) as probe:
        return dict(zip(names, probe.run(pixels), strict=True))


def test_types_after_the_conversion(cnnf):
    before = cnnf.SerializeToString()
    half = to_half(cnnf, automatic_islands(Graph(cnnf), {}))
    assert cnnf.SerializeToString() == before
    model = half.model
    onnx.checker.check_model(model, full_check=True)  # strict types, and sorted
    assert [item.SerializeToString() for item in model.graph.input] == [
        item.SerializeToString() for item in cnnf.graph.input
    ]
    assert [item.SerializeToString() for item in model.graph.output] == [
        item.SerializeToString() for item in cnnf.graph.output
    ]
    graph, types = kinds(model)
    layers = graph.layers()
    halves = {layer for layer, node in layers.items() if graph.types[node.input[1]] == HALF}
    assert halves == set(layers) - {"trunk.norm1.window_sum", "trunk.norm2.window_sum"}
    assert half.layers_kept == {
        "packing": "fp32",
        "pixels": "fp32",
        "trunk.norm1.window_sum": "fp32",
        "trunk.norm2.window_sum": "fp32",
    }
    for node in (*graph.packing(), *graph.normalisation()):
        if not node.name.startswith("cast."):
            assert HALF not in {graph.types.get(name) for name in (*node.input, *node.output)}, node.name
    for name in graph.logits:  # the codes are packed from the very logits that leave
        assert {taker.op_type for taker in graph.consumers[name]} == {"Greater"}
        assert graph.producers[name].op_type == "Cast"
    casts = [node.input[0] for node in model.graph.node if node.name.startswith("cast.")]
    assert len(casts) == len(set(casts))
    assert len(types) == len(model.graph.node)
    weights = {item.name: item for item in model.graph.initializer}
    assert model.ByteSize() < 0.7 * cnnf.ByteSize()
    assert weights["trunk.conv2.weight.half"].data_type == HALF


def test_bits_are_those_of_fp32(lite, make_pixels):
    pixels = make_pixels(48, 64, seed=3)
    exact = logits_of(lite, pixels)
    half = to_half(lite).model
    onnx.checker.check_model(half, full_check=True)
    equal = total = 0
    for name, found in logits_of(simulate_half(half), pixels).items():
        assert found.dtype == np.float32
        assert np.abs(found - exact[name]).max() < 0.25
        equal += int(((found > 0) == (exact[name] > 0)).sum())
        total += found.size
    assert equal / total >= 0.995


class TestSimulation:
    """ONNX Runtime drops the casts between FP16 nodes on x86, so an FP16 model proves nothing there by itself."""

    def test_it_rounds_every_stored_tensor(self):
        """Three sums of which each loses its small term in FP16: 2048 + 1 is 2048."""
        nodes = [
            onnx.helper.make_node("Cast", ["images"], ["x"], "cast", to=FLOAT),
            onnx.helper.make_node("MatMul", ["x", "one"], ["m"], "product"),
            onnx.helper.make_node("Add", ["m", "big"], ["a"], "up"),
            onnx.helper.make_node("Sub", ["a", "big"], ["logits_8"], "down"),
        ]
        constants = [
            onnx.numpy_helper.from_array(np.eye(3, 8, dtype=np.float32), "one"),
            onnx.numpy_helper.from_array(np.float32(2048), "big"),
        ]
        graph = onnx.helper.make_graph(
            nodes,
            "sums",
            [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", 1, 1, 3])],
            [onnx.helper.make_tensor_value_info("logits_8", FLOAT, ["batch", 1, 1, 8])],
            constants,
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
        half = to_half(model).model
        pixels = np.full((2, 1, 1, 3), 1, dtype=np.uint8)
        assert not logits_of(simulate_half(half), pixels)["logits_8"].any()
        assert logits_of(model, pixels)["logits_8"].sum() == 6.0

    def test_it_equals_pytorchs_half_arithmetic_on_a_chain(self, make_pixels):
        """Each product of a chain is rounded once; PyTorch's own FP16 matrix products say what comes out."""
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(3, 8, generator=generator), torch.randn(8, 8, generator=generator)]
        nodes = [
            onnx.helper.make_node("Cast", ["images"], ["x"], "cast", to=FLOAT),
            onnx.helper.make_node("MatMul", ["x", "w0"], ["m"], "first"),
            onnx.helper.make_node("MatMul", ["m", "w1"], ["logits_8"], "second"),
        ]
        constants = [onnx.numpy_helper.from_array(weight.numpy(), f"w{i}") for i, weight in enumerate(weights)]
        graph = onnx.helper.make_graph(
            nodes,
            "chain",
            [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", 1, 1, 3])],
            [onnx.helper.make_tensor_value_info("logits_8", FLOAT, ["batch", 1, 1, 8])],
            constants,
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
        pixels = make_pixels(9, 1)
        found = logits_of(simulate_half(to_half(model).model), pixels)["logits_8"]
        values = torch.from_numpy(pixels).float()
        for weight in weights:
            values = (values @ weight.half().float()).half().float()
        np.testing.assert_array_equal(found, values.numpy())

    def test_a_model_without_fp16_stays_as_it_is(self, cnnf):
        same = simulate_half(cnnf)
        assert [node.SerializeToString() for node in same.graph.node] == [
            node.SerializeToString() for node in cnnf.graph.node
        ]

    def test_the_checker_accepts_it(self, lite, cnnf):
        for model in (lite, cnnf):
            simulated = simulate_half(to_half(model).model)
            onnx.checker.check_model(simulated, full_check=True)
            kinds_of = Graph(simulated).types
            halves = {name for name, kind in kinds_of.items() if kind == HALF}
            assert all(name.endswith(".rounded") for name in halves)
            assert halves


def test_codes_are_the_packed_signs_of_the_logits_that_leave(lite, make_pixels):
    half = to_half(lite).model
    names = ["code_8", "logits_8", "code_16", "logits_16"]
    with open_probe(half, names, threads=2) as probe:
        found = dict(zip(names, probe.run(make_pixels(20, 64)), strict=True))
    for length in (8, 16):
        np.testing.assert_array_equal(found[f"code_{length}"], np.packbits(found[f"logits_{length}"] > 0, axis=1))


def test_everything_kept_is_the_fp32_model(cnnf, make_pixels):
    kept = named_islands(Graph(cnnf), ["*"])
    half = to_half(cnnf, kept).model
    assert not [node for node in half.graph.node if node.name.startswith("cast.")]
    pixels = make_pixels(4, 67)
    for name, found in logits_of(half, pixels).items():
        np.testing.assert_array_equal(found, logits_of(cnnf, pixels)[name])


class TestResponseNormalisation:
    def test_fp32_is_the_same_to_the_bit_as_without_scaling(self):
        norm = LocalResponseNorm()
        banded = BandedResponseNorm(24, norm)
        features = torch.rand(2, 24, 5, 5, generator=torch.Generator().manual_seed(0)) * 800
        with torch.no_grad():
            sums = F.conv2d(
                features * features,
                (banded.window_sum.weight != 0).float() * (norm.alpha / norm.size),
                torch.full((24,), norm.k),
            )
            root = torch.sqrt(sums)
            assert torch.equal(banded(features), features / (root * torch.sqrt(root)))

    @settings(max_examples=30, deadline=None)
    @given(largest=st.floats(1e-2, 65504), seed=st.integers(0, 99))
    def test_fp16_agrees_with_pytorch_for_any_activation_that_fp16_has(self, largest, seed):
        """Plain squares are infinite from 256 on, and plain sums of squares from 11,400 on."""
        generator = torch.Generator().manual_seed(seed)
        features = (torch.rand(2, 16, 3, 3, generator=generator) * largest).half()
        features[0, :5] = float(np.float16(largest))  # a whole window at the largest value
        expected = LocalResponseNorm()(features.float())
        with torch.no_grad():
            found = BandedResponseNorm(16, LocalResponseNorm()).half()(features).float()
        assert torch.isfinite(found).all()
        # Eleven bits, through two roots, a sum, a product and a quotient.
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=1e-4)

    def test_fp16_in_the_graph_with_large_activations(self, cnnf, make_pixels):
        model = onnx.ModelProto()
        model.CopyFrom(cnnf)
        scale_weight(model, "trunk.conv1.weight", 60.0)
        pixels = make_pixels(6, 67)
        graph = Graph(model)
        (first, *_), _ = graph.response_norms()
        ranges = collect_ranges(model, [first.input[0]], [pixels])
        assert 3000 < ranges[first.input[0]].largest < 60000
        exact = logits_of(model, pixels)
        for name, found in logits_of(simulate_half(to_half(model).model), pixels).items():
            assert np.isfinite(found).all()
            np.testing.assert_allclose(found, exact[name], atol=0.15)

    def test_the_banded_sum_is_found_in_the_graph(self, cnnf, lite):
        regions = Graph(cnnf).response_norms()
        assert [[node.op_type for node in region] for region in regions] == [
            ["Mul", "Mul", "Conv", "Sqrt", "Sqrt", "Mul", "Div"]
        ] * 2
        assert Graph(lite).response_norms() == []


class TestIslands:
    def test_values_and_constants_beyond_fp16(self, cnnf):
        model = onnx.ModelProto()
        model.CopyFrom(cnnf)
        scale_weight(model, "trunk.conv4.weight", 1e8)
        graph = Graph(model)
        hot = graph.layers()["trunk.conv3"].output[0]
        islands = automatic_islands(graph, {hot: Range(-10.0, 40000.0)})
        reasons = {island.layer: island.reason for island in islands}
        assert reasons["trunk.conv3"] == "values up to 4e+04 on the images"
        assert reasons["trunk.conv4"].startswith("a constant of ")
        takers = {island.node for island in islands}
        assert {node.name for node in graph.consumers[hot]} <= takers
        onnx.checker.check_model(to_half(model, islands).model, full_check=True)
        with pytest.raises(ModelError, match=r"trunk\.conv4\.weight has values up to .* --keep-fp32 trunk\.conv4"):
            to_half(model)

    def test_a_range_that_is_not_a_number_is_not_trusted(self, cnnf):
        graph = Graph(cnnf)
        hot = graph.layers()["trunk.conv5"].output[0]
        islands = automatic_islands(graph, {hot: Range(float("nan"), float("nan"))})
        assert "trunk.conv5" in {island.layer for island in islands}

    def test_names(self, lite):
        graph = Graph(lite)
        assert [island.layer for island in named_islands(graph, ["trunk.stem.conv"])] == ["trunk.stem.conv"]
        block = {island.layer for island in named_islands(graph, ["trunk.blocks.1"])}
        assert block == {f"trunk.blocks.1.{part}.conv" for part in ("expand", "depthwise", "project")}
        assert len(named_islands(graph, ["*.depthwise.*"])) == 16
        node = graph.layers()["trunk.head.conv"].name
        assert [island.layer for island in named_islands(graph, [node])] == ["trunk.head.conv"]
        with pytest.raises(
            InputError, match=r"'trunk\.stm\.conv' matches no layer: name one such as trunk\.stem\.conv"
        ):
            named_islands(graph, ["trunk.stm.conv"])

    def test_an_island_is_fp32_inside(self, lite):
        graph = Graph(lite)
        half = to_half(lite, named_islands(graph, ["trunk.blocks.0"]))
        onnx.checker.check_model(half.model, full_check=True)
        after = Graph(half.model)
        for layer, node in after.layers().items():
            expected = FLOAT if layer.startswith("trunk.blocks.0.") else HALF
            assert {after.types[name] for name in (*node.input, *node.output)} == {expected}, layer

    @given(st.from_regex(r"[a-z]{1,4}(\.[a-z0-9]{1,4}){0,3}", fullmatch=True), st.integers(1, 4))
    def test_a_pattern_matches_whole_parts_from_the_left(self, layer, count):
        parts = layer.split(".")
        assert matches_layer(layer, ".".join(parts[:count]))
        assert not matches_layer(layer + "x", layer)

    def test_a_graph_that_cannot_be_told_apart_is_refused(self, cnnf):
        model = onnx.ModelProto()
        model.CopyFrom(cnnf)
        model.graph.node[3].name = model.graph.node[4].name
        with pytest.raises(ModelError, match="without a name or with the same one"):
            to_half(model)

    def test_a_subgraph_is_refused(self, cnnf):
        model = onnx.ModelProto()
        model.CopyFrom(cnnf)
        body = onnx.helper.make_graph([], "body", [], [])
        model.graph.node.append(onnx.helper.make_node("If", ["gt"], [], "branch", then_branch=body, else_branch=body))
        with pytest.raises(ModelError, match=r"'branch' \(If\) holds a subgraph"):
            Graph(model)


class TestBlame:
    def test_the_first_layer_that_overflows(self, cnnf, make_pixels):
        model = onnx.ModelProto()
        model.CopyFrom(cnnf)
        largest = np.abs(onnx.numpy_helper.to_array(Graph(model).initializers["trunk.conv3.weight"])).max()
        scale_weight(model, "trunk.conv3.weight", 3e4 / largest)
        pixels = make_pixels(6, 67)
        half = to_half(model).model
        assert not all(np.isfinite(found).all() for found in logits_of(simulate_half(half), pixels).values())
        assert first_non_finite(half, pixels) == "trunk.conv3"
        assert first_non_finite(to_half(cnnf).model, pixels) is None

    def test_the_layers_that_add_most_of_the_error(self, cnnf, make_pixels):
        """A bias of 500 that the next layer takes back changes nothing in FP32, and costs nine bits in FP16."""
        model = onnx.ModelProto()
        model.CopyFrom(cnnf)
        layers = Graph(model).layers()
        offset = 500.0
        tensors = {item.name: item for item in model.graph.initializer}
        weight = onnx.numpy_helper.to_array(tensors[layers["rests.0.4"].input[1]])
        add_bias(model, layers["rests.0.2"], np.full(weight.shape[1], offset, dtype=np.float32))
        add_bias(model, layers["rests.0.4"], -offset * weight.sum(axis=1))
        pixels = make_pixels(8, 67)
        shares = layer_shares(model, automatic_islands(Graph(model), {}), pixels)
        assert shares[0].layer == "rests.0.2"
        assert shares[0].share > 0.9
        assert "rests.0.4" not in {share.layer for share in shares}  # its new bias is beyond FP16, so it is kept
        assert sum(share.share for share in shares) == pytest.approx(1.0)
        assert [share.share for share in shares] == sorted((share.share for share in shares), reverse=True)
        assert "% of the error" in str(shares[0])
        islands = sensitive_islands(Graph(model), {shares[0].layer: shares[0].share})
        assert [island.layer for island in islands] == [shares[0].layer]


def add_bias(model, layer, values):
    """Add to the bias of a Gemm, which has none where the exporter left out zeros."""
    node = next(item for item in model.graph.node if item.name == layer.name)
    tensors = {item.name: item for item in model.graph.initializer}
    old = onnx.numpy_helper.to_array(tensors[node.input[2]]) if len(node.input) > 2 else 0.0
    model.graph.initializer.append(
        onnx.numpy_helper.from_array((old + values).astype(np.float32), f"{node.name}.offset")
    )
    del node.input[2:]
    node.input.append(f"{node.name}.offset")


def scale_weight(model, name, factor):
    tensor = next(item for item in model.graph.initializer if item.name == name)
    values = onnx.numpy_helper.to_array(tensor) * np.float32(factor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
