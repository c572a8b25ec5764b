"""The deployed graph: the same bits as PyTorch's, and the form that the design promises."""

from __future__ import annotations

import copy
import socket
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional as F

from admth_export.deployed import BandedResponseNorm, DeployedNetwork
from admth_export.model_file import check_file, write_graph, write_manifest
from admth_export.onnx_export import build_graph, build_model, check_model
from admth_export.options import OnnxOptions
from admth_runtime import HashRuntime, read_model
from admth_runtime.errors import InputError, ModelError
from admth_runtime.manifest import Manifest
from admth_runtime.packing import pack_logits
from admth_runtime.preprocessing import PreprocessingSpec
from admth_training.backbones import LocalResponseNorm
from admth_training.config import NetworkConfig
from admth_training.encode import reference_logits


def manifest_for(config: NetworkConfig) -> Manifest:
    return Manifest(
        code_lengths=config.code_lengths,
        preprocessing=PreprocessingSpec(config.size, config.size),
        network={"backbone": config.backbone},
        checkpoint_sha256="0" * 64,
    )


CASES = {
    "lite0-8-at-32": NetworkConfig(input_size=32, hidden=16, code_lengths=(8,)),
    "lite0-four-at-97-no-attention": NetworkConfig(input_size=97, hidden=24, attention=False),
    "lite0-8-128-at-66": NetworkConfig(input_size=66, hidden=16, code_lengths=(8, 128)),
    "cnnf-24-conv-at-67": NetworkConfig("cnnf", input_size=67, hidden=32, code_lengths=(24,)),
    "cnnf-four-fc6-at-97": NetworkConfig("cnnf", input_size=97, hidden=32, split="fc6"),
    "cnnf-8-128-fc7-no-attention": NetworkConfig(
        "cnnf", input_size=70, hidden=32, code_lengths=(8, 128), split="fc7", attention=False
    ),
}


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def case(request, tmp_path_factory, make_network):
    network = make_network(CASES[request.param]).train()
    before = copy.deepcopy(network.state_dict())
    path = tmp_path_factory.mktemp("case") / "model.onnx"
    onnx.save(build_model(network, manifest_for(network.config), OnnxOptions()), path)
    # The trained network is left as it was.
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    return network, path


@pytest.fixture(scope="module")
def tiny_graph(tiny_network):
    return build_graph(tiny_network, (32, 32, 3), OnnxOptions())


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_bits_are_pytorchs(case, make_pixels, batch_size):
    network, path = case
    pixels = make_pixels(40, network.config.size)
    reference = reference_logits(network, pixels)
    with HashRuntime(path, threads=2, batch_size=batch_size) as runtime:
        codes = runtime.encode_pixels(pixels)
    assert codes.code_lengths == network.config.code_lengths
    for length, expected in reference.items():
        ones = (expected > 0).mean()
        assert 0.2 < ones < 0.8, "the test's network must give both kinds of bits"
        np.testing.assert_allclose(codes.logits[length], expected, atol=5e-4, rtol=1e-4)
        certain = np.abs(expected) > 1e-3
        assert ((codes.logits[length] > 0) == (expected > 0))[certain].all()
        np.testing.assert_array_equal(codes[length], pack_logits(codes.logits[length]))


def test_the_file_has_the_promised_form(case):
    network, path = case
    model = onnx.load(path)
    assert (model.ir_version, [(item.domain, item.version) for item in model.opset_import]) == (10, [("", 20)])
    assert [item.name for item in model.graph.input] == ["images"]
    lengths = network.config.code_lengths
    assert [item.name for item in model.graph.output] == [
        name for length in lengths for name in (f"code_{length}", f"logits_{length}")
    ]
    size = network.config.size
    shapes = {item.name: _shape(item) for item in (*model.graph.input, *model.graph.output)}
    types = {item.name: item.type.tensor_type.elem_type for item in (*model.graph.input, *model.graph.output)}
    assert shapes["images"] == ["batch", size, size, 3]
    assert types["images"] == onnx.TensorProto.UINT8
    for length in lengths:
        assert (shapes[f"code_{length}"], types[f"code_{length}"]) == (["batch", length // 8], onnx.TensorProto.UINT8)
        assert (shapes[f"logits_{length}"], types[f"logits_{length}"]) == (["batch", length], onnx.TensorProto.FLOAT)
    # Only the batch is dynamic, everywhere.
    symbols = {value for item in model.graph.value_info for value in _shape(item) if isinstance(value, str)}
    assert symbols <= {"batch"}
    assert not model.functions
    assert all(not item.HasField("data_location") or not item.data_location for item in model.graph.initializer)
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert read_model(path).manifest == manifest_for(network.config)


def test_operators_are_those_that_engines_like(case):
    network, path = case
    operators = [node.op_type for node in onnx.load(path).graph.node]
    # TensorRT takes uint8 as a network's input for a Cast alone.
    graph = onnx.load(path).graph
    (first,) = [node for node in graph.node if "images" in node.input]
    assert first.op_type == "Cast"
    for unwanted in ("AveragePool", "Pad", "Pow", "LRN", "BatchNormalization", "Dropout", "Identity", "Constant"):
        assert unwanted not in operators, unwanted
    # The branches' first layers are one, so there is one Split or, with one length, none.
    assert operators.count("Split") == (len(network.config.code_lengths) > 1)


def test_the_file_tells_nothing_of_the_machine(case):
    _, path = case
    content = path.read_bytes()
    import admth_export

    needles = {
        str(Path(admth_export.__file__).parents[2]),
        str(Path.home()) + "/",
        "site-packages",
        sys.prefix,
        "stack_trace",
        "pkg.torch",
        "pytorch",
    }
    if len(socket.gethostname()) > 3:
        needles.add(socket.gethostname())
    assert {needle for needle in needles if needle.encode() in content} == set()


def test_large_layers_are_shared_and_not_copied(make_network):
    network = make_network(NetworkConfig("cnnf", input_size=67, hidden=64))
    deployed = DeployedNetwork(network)
    trained = {parameter.data_ptr() for parameter in network.parameters()}
    own = {name for name, value in deployed.named_parameters() if value.data_ptr() not in trained}
    assert not {name for name in own if name.startswith("rests.")}
    assert {"first.0.weight", "first.0.bias"} <= own


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4, 1e8])
def test_banded_response_norm_equals_pytorchs_and_a_plain_loop(scale):
    torch.manual_seed(0)
    features = torch.relu(torch.randn(2, 12, 3, 3)) * scale
    norm = LocalResponseNorm()
    banded = BandedResponseNorm(12, norm)(features)
    torch.testing.assert_close(banded, F.local_response_norm(features, 5, 5e-4, 0.75, 2.0), rtol=2e-6, atol=1e-6)
    wide = features.double().numpy()
    expected = np.empty_like(wide)
    for channel in range(12):
        window = wide[:, max(channel - 2, 0) : channel + 3]
        # MatConvNet's form, alpha 1e-4 not divided by the window.
        expected[:, channel] = wide[:, channel] / (2.0 + 1e-4 * (window**2).sum(axis=1)) ** 0.75
    np.testing.assert_allclose(banded.detach().numpy(), expected, rtol=2e-6)
    assert torch.isfinite(banded).all()


def test_another_opset_and_ir_version_give_the_same_bits(tmp_path, tiny_network, make_pixels):
    pixels = make_pixels(4, 32)
    expected = reference_logits(tiny_network, pixels)
    for opset, ir_version in ((18, 8), (23, 11)):
        path = tmp_path / f"{opset}.onnx"
        options = OnnxOptions(opset, ir_version)
        onnx.save(build_model(tiny_network, manifest_for(tiny_network.config), options), path)
        model = read_model(path).onnx
        assert (model.opsets[""], model.ir_version) == (opset, ir_version)
        with HashRuntime(path, threads=1) as runtime:
            codes = runtime.encode_pixels(pixels)
        for length, logits in expected.items():
            np.testing.assert_allclose(codes.logits[length], logits, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("values", [{"opset": 17}, {"opset": 24}, {"ir_version": 7}, {"ir_version": 99}])
def test_versions_out_of_range_are_refused(values):
    with pytest.raises(InputError, match="leave --"):
        OnnxOptions(**values)


def test_the_manifest_is_the_files_tail_and_can_be_replaced(tmp_path, tiny_network, tiny_graph):
    path, manifest = tmp_path / "model.onnx", manifest_for(tiny_network.config)
    size = write_graph(path, tiny_graph)
    check_file(path)
    graph = path.read_bytes()
    for parity in ({"passed": True, "note": "x" * 500}, None):
        expected = Manifest(**{**vars(manifest), "parity": parity})
        write_manifest(path, size, expected)
        assert read_model(path).manifest == expected
        assert path.read_bytes()[:size] == graph
        assert len(onnx.load(path).metadata_props) == 1
    check_file(path)


def test_a_broken_graph_fails_the_checker(tmp_path, tiny_graph):
    model = copy.deepcopy(tiny_graph)
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    gemm.input[0] = "nowhere"
    write_graph(tmp_path / "model.onnx", model)
    with pytest.raises(ModelError, match="fails the ONNX checker"):
        check_file(tmp_path / "model.onnx")
    with pytest.raises(ModelError, match="fails the ONNX checker"):
        check_model(model)


@pytest.mark.slow
def test_full_size_cnnf_has_pytorchs_bits(tmp_path, make_network, make_pixels):
    """221 million parameters, 884 MB: one file, under protobuf's 2 GiB, within reasonable memory."""
    network = make_network(NetworkConfig("cnnf"))
    manifest = manifest_for(network.config)
    path = tmp_path / "model.onnx"
    size = write_graph(path, build_graph(network, manifest.preprocessing.shape, OnnxOptions()))
    assert 880e6 < size < 890e6
    check_file(path)
    write_manifest(path, size, manifest)
    pixels = make_pixels(8, 224)
    expected = reference_logits(network, pixels)
    with HashRuntime(path, threads=2) as runtime:
        codes = runtime.encode_pixels(pixels)
    for length, logits in expected.items():
        np.testing.assert_allclose(codes.logits[length], logits, atol=1e-3)
        np.testing.assert_array_equal(codes[length], pack_logits(codes.logits[length]))
    path.unlink()  # pytest keeps the folders of three runs


def _shape(item) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in item.type.tensor_type.shape.dim]
