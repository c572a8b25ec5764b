from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from _tiny_model import LENGTHS, SIZE, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from admth_runtime import onnx_file
from admth_runtime.errors import ModelError
from admth_runtime.manifest import METADATA_KEY
from admth_runtime.onnx_file import OnnxFile, read_onnx

WHOLE = tiny_model().SerializeToString()


def saved(tmp_path: Path, model: onnx.ModelProto | bytes, name: str = "model.onnx") -> Path:
    path = tmp_path / name
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read_onnx(path)
    assert "\n" not in str(caught.value)


def external_tensor(name: str = "secret") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


def test_facts_equal_what_onnx_reads(tmp_path):
    facts = read_onnx(saved(tmp_path, WHOLE))
    model = onnx.load_from_string(WHOLE)
    assert facts.size == len(WHOLE)
    assert facts.ir_version == model.ir_version == 10
    assert facts.producer == "tests"
    assert facts.opsets == {"": 20}
    assert [(t.name, t.dtype, t.shape) for t in facts.inputs] == [("images", "uint8", ("batch", SIZE, SIZE, 3))]
    assert [t.name for t in facts.outputs] == [value.name for value in model.graph.output]
    assert str(facts.outputs[1]) == "logits_16: float32 [batch, 16]"
    assert facts.metadata[METADATA_KEY] == model.metadata_props[0].value
    names = [node.op_type for node in model.graph.node]
    assert facts.operators == {name: names.count(name) for name in names}
    assert facts.operators["Gemm"] == len(LENGTHS)


def test_dtypes_shapes_and_inputs_with_initializers(tmp_path):
    kinds = {1: "float32", 2: "uint8", 3: "int8", 7: "int64", 9: "bool", 10: "float16", 11: "float64", 16: "bfloat16"}
    inputs = [helper.make_tensor_value_info(f"x{kind}", kind, [1, None, "n"]) for kind in kinds]
    inputs.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, [1]))
    inputs.append(helper.make_tensor_value_info("unranked", TensorProto.FLOAT, None))
    inputs.append(helper.make_tensor_sequence_value_info("sequence", TensorProto.FLOAT, None))
    weight = numpy_helper.from_array(np.zeros(1, np.float32), "weight")
    graph = helper.make_graph([], "g", inputs, [], [weight])
    facts = read_onnx(saved(tmp_path, helper.make_model(graph)))
    *typed, unranked, sequence = facts.inputs
    assert [tensor.dtype for tensor in typed] == list(kinds.values())
    assert {tensor.shape for tensor in typed} == {(1, None, "n")}
    assert (unranked.dtype, unranked.shape, str(unranked)) == ("float32", None, "unranked: float32 [?]")
    assert sequence.dtype == "not a tensor"


def test_operators_of_subgraphs_and_of_com_microsoft_are_counted(tmp_path):
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "b", [], [helper.make_empty_tensor_value_info("y")]
    )
    nodes = [
        helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
        helper.make_node("QGemm", ["y"], ["z"], domain="com.microsoft"),
        helper.make_node("Relu", ["z"], ["w"], domain="ai.onnx"),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [], []),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)],
    )
    facts = read_onnx(saved(tmp_path, model))
    assert facts.operators == {"Relu": 3, "If": 1, "com.microsoft::QGemm": 1}
    assert facts.opsets == {"": 20, "com.microsoft": 1}


class TestRefusedFiles:
    def test_missing_folder_empty(self, tmp_path):
        refused(tmp_path / "none.onnx", "no such model file")
        refused(tmp_path, "is a folder: name the model file in it")
        refused(saved(tmp_path, b""), "is empty")

    def test_a_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.onnx")
        refused(tmp_path / "pipe.onnx", "not a regular file")

    def test_too_large(self, tmp_path):
        path = tmp_path / "large.onnx"
        with path.open("wb") as file:
            file.truncate(2**31)  # sparse: it takes no space
        refused(path, "2,147,483,648 bytes, more than the 2 GiB")

    @pytest.mark.parametrize(
        ("content", "name", "message"),
        [
            (b"ftrt" + bytes(60), "model.onnx", "TensorRT engine, not an ONNX model"),
            (b"vtrt" + bytes(60), "model.onnx", "TensorRT engine"),
            (b"anything", "model.fp16.plan", "TensorRT engine"),
            (b"anything", "model.RTX", "TensorRT engine"),
            (b"PK\x03\x04" + bytes(60), "model.pt", "zip file, such as a PyTorch checkpoint"),
            (bytes(8) + b'{"__metadata__":{}}', "model.safetensors", "safetensors"),
            (b"PAR1" + bytes(60), "codes.parquet", "Parquet"),
            (b"hello, world\n" * 20, "model.onnx", "is not an ONNX model"),
            (b"\x00" * 100, "model.onnx", "is not an ONNX model"),
            (b"\xff" * 100, "model.onnx", "is not an ONNX model"),
            (b"\x08", "model.onnx", "is not an ONNX model"),
        ],
    )
    def test_other_formats(self, tmp_path, content, name, message):
        refused(saved(tmp_path, content, name), message)

    @pytest.mark.parametrize("share", [0.01, 0.3, 0.9])
    def test_truncated(self, tmp_path, share):
        refused(saved(tmp_path, WHOLE[: int(len(WHOLE) * share)]), "truncated or damaged")

    def test_without_a_graph_or_an_operator_set(self, tmp_path):
        refused(saved(tmp_path, b"\x08\x0a"), "no graph")
        model = tiny_model()
        model.ClearField("opset_import")
        refused(saved(tmp_path, model), "no operator set")


class TestExternalData:
    def check(self, tmp_path, change):
        model = tiny_model()
        change(model)
        refused(saved(tmp_path, model), "keeps data in another file")

    def test_initializer(self, tmp_path):
        self.check(tmp_path, lambda model: model.graph.initializer.append(external_tensor()))

    def test_location_without_entries_and_entries_without_location(self, tmp_path):
        bare = TensorProto(name="t", data_location=TensorProto.EXTERNAL)
        self.check(tmp_path, lambda model: model.graph.initializer.append(bare))
        entries = external_tensor()
        entries.ClearField("data_location")
        self.check(tmp_path, lambda model: model.graph.initializer.append(entries))

    @pytest.mark.parametrize("part", ["values", "indices"])
    def test_sparse_initializer(self, tmp_path, part):
        def change(model):
            sparse = model.graph.sparse_initializer.add()
            getattr(sparse, part).CopyFrom(external_tensor())

        self.check(tmp_path, change)

    def test_attributes_of_every_kind(self, tmp_path):
        def with_attribute(fill):
            def change(model):
                node = model.graph.node.add(op_type="Constant", output=["k"])
                fill(node.attribute.add(name="value"))

            return change

        for fill in (
            lambda a: a.t.CopyFrom(external_tensor()),
            lambda a: a.tensors.append(external_tensor()),
            lambda a: a.sparse_tensor.values.CopyFrom(external_tensor()),
            lambda a: a.sparse_tensors.add().indices.CopyFrom(external_tensor()),
            lambda a: a.g.initializer.append(external_tensor()),
            lambda a: a.graphs.add().initializer.append(external_tensor()),
            lambda a: a.g.node.add().attribute.add().t.CopyFrom(external_tensor()),
        ):
            self.check(tmp_path, with_attribute(fill))

    def test_functions_and_training_graphs(self, tmp_path):
        self.check(tmp_path, lambda m: m.functions.add().node.add().attribute.add().t.CopyFrom(external_tensor()))
        self.check(tmp_path, lambda m: m.functions.add().attribute_proto.add().t.CopyFrom(external_tensor()))
        self.check(tmp_path, lambda m: m.training_info.add().algorithm.initializer.append(external_tensor()))

    def test_an_enumeration_that_readers_cut_to_external(self, tmp_path):
        # data_location (field 14, varint) = 2**32 + 1, within an initializer (5) of a second graph (7) that is merged.
        tensor = b"\x70\x81\x80\x80\x80\x10"
        graph = b"\x2a" + bytes([len(tensor)]) + tensor
        refused(saved(tmp_path, WHOLE + b"\x3a" + bytes([len(graph)]) + graph), "keeps data in another file")
        merged = onnx.load_from_string(WHOLE + b"\x3a" + bytes([len(graph)]) + graph)
        assert merged.graph.initializer[-1].data_location == TensorProto.EXTERNAL


class TestUnknownDomains:
    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.opset_import.append(helper.make_opsetid("evil.ops", 1)),
            lambda m: m.graph.node.append(helper.make_node("Run", [], ["k"], domain="evil.ops")),
            lambda m: m.functions.add(name="f", domain="evil.ops"),
            lambda m: m.functions.add(name="f").node.add(op_type="Run", domain="evil.ops"),
            lambda m: m.functions.add(name="f").opset_import.append(helper.make_opsetid("evil.ops", 1)),
            lambda m: m.graph.node.add(op_type="If").attribute.add().g.node.add(op_type="Run", domain="evil.ops"),
        ],
    )
    def test_everywhere(self, tmp_path, change):
        model = tiny_model()
        change(model)
        refused(saved(tmp_path, model), "unknown domain 'evil.ops'")


def test_nesting_is_bounded(tmp_path):
    def nested(depth: int) -> onnx.ModelProto:
        model = tiny_model()
        graph = model.graph
        for _ in range(depth):
            graph = graph.node.add(op_type="If").attribute.add(name="then_branch").g
        return model

    assert read_onnx(saved(tmp_path, nested(10))).operators["If"] == 10
    refused(saved(tmp_path, nested(30)), "nests more than 16 subgraphs")

    message = b""
    for _ in range(20_000):  # far deeper than Python's own stack: graph (6) in attribute (5) in node (1)
        for field in (b"\x32", b"\x2a", b"\x0a"):
            length, size = len(message), b""
            while length > 127:
                size += bytes([length & 127 | 128])
                length >>= 7
            message = field + size + bytes([length]) + message
        if len(message) > 60_000:
            break
    length = len(message)
    head = b"\x3a" + bytes([length & 127 | 128, length >> 7 & 127 | 128, length >> 14])
    refused(saved(tmp_path, WHOLE + head + message), "nests more than 16 subgraphs")


def test_a_metadata_key_twice_is_refused(tmp_path):
    model = tiny_model()
    model.metadata_props.add(key=METADATA_KEY, value="{}")
    refused(saved(tmp_path, model), "twice")


class TestFuzz:
    """Whatever the bytes, the answer is the facts or one ModelError."""

    def read(self, content: bytes) -> OnnxFile | None:
        path = self.folder / "fuzz.onnx"
        path.write_bytes(content)
        try:
            return read_onnx(path)
        except ModelError as error:
            assert "\n" not in str(error)
            return None

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.folder = tmp_path

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(0, len(WHOLE)))
    def test_truncation(self, length):
        facts = self.read(WHOLE[:length])
        # What a cut at the end of a field leaves may still be a model, but never one with a manifest.
        assert facts is None or METADATA_KEY not in facts.metadata or length == len(WHOLE)

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)), min_size=1, max_size=20))
    def test_flipped_bytes(self, flips):
        content = bytearray(WHOLE)
        for place, change in flips:
            content[place] ^= change
        self.read(bytes(content))

    @settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(0, 600), st.integers(1, 255))
    def test_flips_within_the_structure(self, place, change):
        structure = len(WHOLE) - 600 + place if place % 2 else place
        content = bytearray(WHOLE)
        content[structure if structure < len(WHOLE) else 0] ^= change
        self.read(bytes(content))

    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.binary(min_size=1, max_size=400))
    def test_random_bytes(self, content):
        self.read(content)
        self.read(b"\x08\x0a\x3a" + content)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_weights_are_not_read_into_memory(tmp_path):
    """A model of 300 MB is described within a process whose memory grows by less than a tenth of that."""
    model = tiny_model()
    path = saved(tmp_path, model)
    size = 300_000_000
    raw = b"\x4a" + varint(size)  # TensorProto.raw_data
    tensor_head = b"\x2a" + varint(len(raw) + size) + raw
    with path.open("ab") as file:
        file.write(b"\x3a" + varint(len(tensor_head) + size) + tensor_head)
        file.truncate(file.tell() + size)
    # VmHWM and not ru_maxrss, which a child process inherits from a large parent, so that nothing seems to grow.
    script = (
        "import sys\nfrom admth_runtime.onnx_file import read_onnx\n"
        "def peak():\n"
        "    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "before = peak()\nfacts = read_onnx(sys.argv[1])\nprint(facts.size, peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    found, kilobytes = map(int, done.stdout.split())
    assert found > size
    assert kilobytes < 30_000


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def test_reading_needs_neither_onnx_nor_protobuf():
    script = (
        "import sys\nimport admth_runtime.onnx_file\n"
        "assert not {'onnx', 'google.protobuf', 'onnxruntime', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    assert onnx_file.__all__
