"""Weights in 8 or 4 bits: the blocks, the file that they are read from, and the whole way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from admth_calibration.blocks import error_feedback, fitting_block_size, quantize_blocks
from admth_calibration.stored_weights import load_without_weights
from admth_calibration.weights_only import weights_only
from admth_calibration.weights_options import WeightsOnlyOptions
from admth_runtime import HashRuntime, read_model
from admth_runtime.errors import DataError, InputError, ManifestError, ModelError, OutputError
from admth_runtime.manifest import METADATA_KEY, PRECISIONS
from admth_training.config import NetworkConfig


@pytest.fixture(scope="module")
def wide(tmp_path_factory, export_network):
    """A CNN-F whose fully connected layers hold a third of the weights, and are large enough to stay in the file."""
    config = NetworkConfig(backbone="cnnf", input_size=67, hidden=576, code_lengths=(16, 32))
    return export_network(tmp_path_factory.mktemp("wide") / "model.onnx", config)


@pytest.fixture(scope="module")
def w8(wide, tmp_path_factory):
    return weights_only(wide, tmp_path_factory.mktemp("w8") / "model.w8.onnx")


@pytest.fixture(scope="module")
def w4(wide, pictures, tmp_path_factory):
    options = WeightsOnlyOptions("int4", images=128, check_images=24)
    out = tmp_path_factory.mktemp("w4") / "model.w4.onnx"
    return weights_only(wide, out, options=options, data=f"folder:{pictures}")


def run_kernel(x, matrix, accuracy):
    """Multiply with ONNX Runtime's kernel; accuracy 1 is FP32, 4 rounds the activations too."""
    outputs = len(matrix.values)
    helper = onnx.helper
    node = helper.make_node(
        "MatMulNBits",
        ["x", "values", "scales"],
        ["y"],
        domain="com.microsoft",
        K=matrix.inputs,
        N=outputs,
        bits=matrix.bits,
        block_size=matrix.block_size,
        accuracy_level=accuracy,
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", 1, [None, matrix.inputs])],
        [helper.make_tensor_value_info("y", 1, [None, outputs])],
        [numpy_helper.from_array(matrix.values, "values"), numpy_helper.from_array(matrix.scales, "scales")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


class TestBlocks:
    @settings(max_examples=30, deadline=None)
    @given(
        outputs=st.integers(1, 9),
        inputs=st.integers(1, 300),
        bits=st.sampled_from([8, 4]),
        block_size=st.sampled_from([16, 32, 64, 128, 256]),
        seed=st.integers(0, 99),
    )
    def test_nearest_is_within_half_a_step(self, outputs, inputs, bits, block_size, seed):
        weight = np.random.default_rng(seed).standard_normal((outputs, inputs), dtype=np.float32)
        matrix = quantize_blocks(weight, bits, block_size)
        blocks = -(-inputs // block_size)
        assert matrix.values.shape == (outputs, blocks, block_size * bits // 8)
        assert matrix.scales.shape == (outputs, blocks)
        steps = np.repeat(np.abs(matrix.scales), block_size, axis=1)[:, :inputs]
        # 4 bits count from -8 to 7, so what lies between 7 and 8 steps is a step off at most.
        assert (np.abs(matrix.dequantized() - weight) <= (0.5 if bits == 8 else 1.0) * steps * 1.0001).all()

    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize(("inputs", "block_size"), [(512, 256), (96, 32), (100, 16), (24, 16), (300, 128)])
    def test_the_kernel_multiplies_with_these_numbers(self, bits, inputs, block_size):
        rng = np.random.default_rng(5)
        weight = rng.standard_normal((40, inputs), dtype=np.float32)
        x = rng.standard_normal((6, inputs), dtype=np.float32)
        matrix = quantize_blocks(weight, bits, block_size)
        wanted = x @ matrix.dequantized().T
        np.testing.assert_allclose(run_kernel(x, matrix, 1), wanted, atol=1e-4 * np.abs(wanted).max())
        np.testing.assert_allclose(run_kernel(x, matrix, 4), wanted, atol=0.015 * np.abs(wanted).max())

    @pytest.mark.parametrize("bits", [8, 4])
    def test_feedback_is_the_plain_loop(self, bits):
        rng = np.random.default_rng(3)
        weight = rng.standard_normal((5, 300), dtype=np.float32)
        x = np.abs(rng.standard_normal((80, 300), dtype=np.float32)) + 0.3
        feedback = error_feedback(x)
        found = quantize_blocks(weight, bits, 32, feedback).dequantized()
        low, high = (-127, 127) if bits == 8 else (-8, 7)
        for row in range(5):
            rounded = np.zeros(300)
            for k in range(300):
                block = slice(k // 32 * 32, k // 32 * 32 + 32)
                past = weight[row, :k] - rounded[:k]
                if k == block.start:
                    wanted = weight[row, block] + past @ feedback[:k, block]
                    largest = wanted[np.abs(wanted).argmax()]
                    scale = abs(largest) / 127 if bits == 8 else largest / -8
                rounded[k] = np.clip(np.rint((weight[row, k] + past @ feedback[:k, k]) / scale), low, high) * scale
            # Sums in another order may round a weight the other way, and all later ones of its row with it.
            agree = np.abs(found[row] - rounded) < 1e-3
            assert agree.mean() > 0.9
            assert agree[:64].all()

    def test_feedback_is_a_factor_of_the_second_moment(self):
        x = np.random.default_rng(1).standard_normal((50, 90), dtype=np.float32) + 0.5
        feedback = error_feedback(x)
        assert not np.tril(feedback).any()
        moment = x.T.astype(np.float64) @ x / 50
        moment += 0.1 * np.diag(moment).mean() * np.eye(90)
        upper = np.eye(90) + feedback
        inverse = np.linalg.inv(upper)
        diagonal = inverse @ moment @ inverse.T
        np.testing.assert_allclose(diagonal, np.diag(np.diag(diagonal)), atol=1e-3 * diagonal.max())

    @pytest.mark.parametrize("bits", [8, 4])
    def test_feedback_lowers_the_error_of_the_outputs(self, bits):
        rng = np.random.default_rng(0)
        mixing = rng.standard_normal((256, 256), dtype=np.float32) / 16
        x = np.maximum(rng.standard_normal((700, 256), dtype=np.float32) @ mixing + 0.3, 0)
        weight = rng.standard_normal((64, 256), dtype=np.float32)

        def error(matrix):
            return float(((x[350:] @ (matrix.dequantized() - weight).T) ** 2).mean())

        nearest = quantize_blocks(weight, bits, 64)
        chosen = quantize_blocks(weight, bits, 64, error_feedback(x[:350]))
        assert error(chosen) < 0.6 * error(nearest)

    def test_rows_of_zeros_and_numbers_that_are_none(self):
        weight = np.zeros((3, 32), dtype=np.float32)
        weight[1, 5], weight[2, 7] = np.nan, np.inf
        matrix = quantize_blocks(weight, 4, 16)
        assert (quantize_blocks(weight[:1], 4, 16).dequantized() == 0).all()
        assert np.isfinite(matrix.scales).tolist() == [[True, True], [False, True], [False, True]]
        assert (quantize_blocks(weight[:1], 8, 16, error_feedback(weight[:1])).dequantized() == 0).all()

    def test_block_sizes(self):
        assert fitting_block_size(9216, 256) == 256
        assert fitting_block_size(9216, 64) == 64
        assert fitting_block_size(80, 256) == 16
        assert fitting_block_size(25, 256) == 16


class TestStoredWeights:
    def test_everything_but_the_values_is_loaded(self, wide):
        light, stored = load_without_weights(wide)
        whole = onnx.load(wide)
        assert {"first.0.weight", "rests.0.2.weight"} <= set(stored)
        tensors = {tensor.name: tensor for tensor in whole.graph.initializer}
        for tensor in light.graph.initializer:
            wanted = numpy_helper.to_array(tensors[tensor.name])
            if tensor.name in stored:
                weight = stored[tensor.name]
                assert not tensor.HasField("raw_data")
                assert weight.shape == wanted.shape
                np.testing.assert_array_equal(weight[:], wanted)
                np.testing.assert_array_equal(weight[3:7], wanted[3:7])
                np.testing.assert_array_equal(weight[len(wanted) - 2 : len(wanted) + 9], wanted[-2:])
                tensor.CopyFrom(tensors[tensor.name])
        assert light == whole

    def test_damaged_files(self, wide, tmp_path):
        content = wide.read_bytes()
        for cut in (10, len(content) // 2, len(content) - 3):
            (tmp_path / "cut.onnx").write_bytes(content[:cut])
            with pytest.raises(ModelError, match="is not an ONNX model"):
                load_without_weights(tmp_path / "cut.onnx")


class TestModel:
    def test_eight_bits_without_images(self, wide, w8):
        manifest = w8.manifest
        assert (manifest.precision, manifest.target, manifest.parity) == ("int8-weights", "cpu", None)
        assert read_model(w8.model).manifest == manifest
        assert (w8.bytes, w8.source_bytes) == (w8.model.stat().st_size, wide.stat().st_size)
        facts = manifest.calibration
        assert facts["method"] == "weights only, rounded to nearest"
        assert facts["weights"] == {"fp16": 5, "int8": 7}
        assert facts["kept_fp32"] == list(w8.kept) == ["trunk.norm1.window_sum", "trunk.norm2.window_sum"]
        assert facts["layers"] == len(w8.layers) == 12
        assert "predicted" not in facts
        assert w8.bytes < 0.48 * w8.source_bytes  # two thirds of this one's weights are in convolutions
        assert [path.name for path in w8.model.parent.iterdir()] == ["model.w8.onnx"]

    def test_the_model_computes_with_the_stored_numbers(self, wide, w8, make_smooth, tmp_path):
        """The FP32 graph with the stored weights put back gives the same logits, but for the rounded activations."""
        compressed, back = onnx.load(w8.model), onnx.load(wide)
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in compressed.graph.initializer}
        for tensor in back.graph.initializer:
            if f"{tensor.name}.half" in stored:
                tensor.CopyFrom(numpy_helper.from_array(stored[f"{tensor.name}.half"].astype(np.float32), tensor.name))
            elif f"{tensor.name}.int8" in stored:
                values = stored[f"{tensor.name}.int8"].astype(np.float32) - 128
                values = values * stored[f"{tensor.name}.scale"][:, :, None]
                values = values.reshape(len(values), -1)[:, : tensor.dims[1]]
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(back, tmp_path / "back.onnx")
        pixels = make_smooth(24, 67, 5)
        with (
            HashRuntime(tmp_path / "back.onnx", device="cpu") as put_back,
            HashRuntime(w8.model, device="cpu") as blocks,
            HashRuntime(wide, device="cpu") as exact,
        ):
            wanted, found, reference = (each.encode_pixels(pixels) for each in (put_back, blocks, exact))
        for length in (16, 32):
            error = np.sqrt(np.square(found.logits[length] - wanted.logits[length]).mean())
            assert error < 0.1 * wanted.logits[length].std(axis=0).mean()
            bits = [codes.logits[length] > 0 for codes in (found, reference)]
            assert (bits[0] == bits[1]).mean() > 0.95

    @pytest.mark.parametrize("kind", ["w8", "w4"])
    def test_a_code_does_not_depend_on_its_neighbours(self, kind, make_smooth, request):
        pixels = make_smooth(9, 67, 11)
        others = pixels.copy()
        others[4] = 255
        with HashRuntime(request.getfixturevalue(kind).model, device="cpu") as runtime:
            before, after = runtime.encode_pixels(pixels), runtime.encode_pixels(others)
        same = np.arange(9) != 4
        for length in (16, 32):
            np.testing.assert_array_equal(before.logits[length][same], after.logits[length][same])
            assert (before.logits[length][4] != after.logits[length][4]).any()

    @pytest.mark.parametrize("convolutions", ["fp16", "int8"])
    def test_convolutions_become_fp32_on_loading(self, wide, convolutions, tmp_path):
        result = weights_only(wide, tmp_path / "m.onnx", options=WeightsOnlyOptions(convolutions=convolutions))
        assert result.layers["trunk.conv2"] == convolutions
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        onnxruntime.InferenceSession(str(result.model), options, providers=["CPUExecutionProvider"])
        loaded = onnx.load(tmp_path / "loaded.onnx").graph
        made = {name for node in loaded.node for name in node.output}
        assert not [node.name for node in loaded.node if node.op_type == "Conv" and node.input[1] in made]
        assert [node.op_type for node in loaded.node].count("MatMulNBits") == 7
        assert (result.bytes < 0.36 * result.source_bytes) == (convolutions == "int8")

    def test_four_bits_with_images(self, wide, w4, pictures):
        assert w4.manifest.precision == "int4-weights"
        facts = w4.manifest.calibration
        assert facts["method"] == "weights only, GPTQ"
        assert (facts["images"], facts["broken"], len(facts["data_sha256"])) == (128, 0, 64)
        # The code layers and the attention hold few weights, which 8 bits serve better.
        assert {layer for layer, kind in w4.layers.items() if kind == "int4"} == {"first.0", "rests.0.2", "rests.1.2"}
        predicted = facts["predicted"]
        assert predicted["images"] == 24
        assert predicted["images_seen_in_calibration"] is False
        assert min(predicted["bit_parity"].values()) > 0.9
        onnx.checker.check_model(w4.model, full_check=True)

    def test_images_choose_better_roundings(self, wide, w4, pictures, make_smooth, tmp_path):
        nearest = weights_only(wide, tmp_path / "n.onnx", options=WeightsOnlyOptions("int4"))
        pixels = make_smooth(64, 67, 21)
        with (
            HashRuntime(wide, device="cpu") as exact,
            HashRuntime(nearest.model, device="cpu") as plain,
            HashRuntime(w4.model, device="cpu") as chosen,
        ):
            wanted = exact.encode_pixels(pixels)
            errors = [
                float(np.mean([np.square(each.logits[n] - wanted.logits[n]).mean() for n in (16, 32)]))
                for each in (plain.encode_pixels(pixels), chosen.encode_pixels(pixels))
            ]
        assert errors[1] < 0.7 * errors[0]

    def test_equal_runs_give_equal_files(self, wide, w4, pictures, tmp_path):
        options = WeightsOnlyOptions("int4", images=128, check_images=24)
        again = weights_only(wide, tmp_path / "m.onnx", options=options, data=f"folder:{pictures}")
        assert again.sha256 == w4.sha256

    def test_layers_that_stay_and_smaller_blocks(self, wide, tmp_path):
        options = WeightsOnlyOptions(block_size=32, keep_fp32=("attention", "rests.*.4", "rests.0.2"))
        result = weights_only(wide, tmp_path / "m.onnx", options=options)
        assert {"attention.squeeze", "attention.excite", "rests.0.2", "rests.0.4", "rests.1.4"} <= set(result.kept)
        model = onnx.load(result.model)
        sizes = {
            attribute.i
            for node in model.graph.node
            if node.op_type == "MatMulNBits"
            for attribute in node.attribute
            if attribute.name == "block_size"
        }
        assert sizes == {32}
        kept, source = (
            {tensor.name: numpy_helper.to_array(tensor) for tensor in each.graph.initializer}
            for each in (model, onnx.load(wide))
        )
        np.testing.assert_array_equal(kept["rests.0.2.weight"], source["rests.0.2.weight"])

    def test_an_efficientnet(self, lite, pictures, tmp_path):
        shutil.copy(lite, tmp_path / "model.onnx")
        result = weights_only(tmp_path / "model.onnx", data=f"folder:{pictures}")
        assert result.model == tmp_path / "model.w8.onnx"
        assert min(result.manifest.calibration["predicted"]["bit_parity"].values()) > 0.98


class TestRefusals:
    @pytest.mark.parametrize(
        ("pattern", "message"),
        [("rests.0.3", r"matches no layer: name one such as .*rests\.0\.2"), ("zzz", "name one such as trunk.conv1")],
    )
    def test_layers_that_do_not_exist(self, wide, pattern, message, tmp_path):
        with pytest.raises(InputError, match=message):
            weights_only(wide, tmp_path / "m.onnx", options=WeightsOnlyOptions(keep_fp32=(pattern,)))
        assert not list(tmp_path.iterdir())

    def test_models_that_are_compressed_or_not_ours(self, wide, w8, tmp_path):
        with pytest.raises(ModelError, match=r"is int8-weights already: pass the FP32 model of  admth-export onnx"):
            weights_only(w8.model, tmp_path / "m.onnx")
        model = onnx.load(wide)
        kept = [entry for entry in model.metadata_props if entry.key != METADATA_KEY]
        del model.metadata_props[:]
        model.metadata_props.extend(kept)
        onnx.save(model, tmp_path / "plain.onnx")
        with pytest.raises(ManifestError, match="has no admth manifest"):
            weights_only(tmp_path / "plain.onnx")
        with pytest.raises(OutputError, match="it is the model itself"):
            weights_only(wide, wide)
        with pytest.raises(OutputError, match=r"ends with \.onnx"):
            weights_only(wide, tmp_path / "m.bin")
        with pytest.raises(ModelError, match="no layer is left to compress"):
            weights_only(wide, tmp_path / "m.onnx", options=WeightsOnlyOptions(keep_fp32=("*",)))
        assert [path.name for path in tmp_path.iterdir()] == ["plain.onnx"]

    @pytest.mark.parametrize("layer", ["trunk.conv2", "first.0", "rests.0.2", "rests.1.4"])
    def test_weights_that_are_no_numbers(self, wide, layer, tmp_path):
        model = onnx.load(wide)
        tensor = next(item for item in model.graph.initializer if item.name == f"{layer}.weight")
        values = numpy_helper.to_array(tensor).copy()
        values.flat[values.size // 2] = np.nan
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(model, tmp_path / "nan.onnx")
        with pytest.raises(ModelError, match=f"the weights of {layer} are not finite: train again"):
            weights_only(tmp_path / "nan.onnx")
        assert [path.name for path in tmp_path.iterdir()] == ["nan.onnx"]

    def test_weights_beyond_half_precision(self, wide, tmp_path):
        model = onnx.load(wide)
        tensor = next(item for item in model.graph.initializer if item.name == "trunk.conv3.weight")
        values = numpy_helper.to_array(tensor).copy()
        values.flat[0] = 7e4
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(model, tmp_path / "model.onnx")
        with pytest.raises(ModelError, match=r"trunk\.conv3 reach 7e\+04, beyond FP16: pass --keep-fp32 trunk\.conv3"):
            weights_only(tmp_path / "model.onnx")
        weights_only(tmp_path / "model.onnx", options=WeightsOnlyOptions(keep_fp32=("trunk.conv3",)))

    def test_images(self, wide, pictures, tmp_path):
        few = tmp_path / "few"
        few.mkdir()
        for path in sorted(pictures.iterdir())[:20]:
            shutil.copy(path, few)
        with pytest.raises(DataError, match="holds 20 images and a calibration takes 128 or more"):
            weights_only(wide, tmp_path / "m.onnx", data=f"folder:{few}")
        with pytest.raises(InputError, match="--root means nothing without --data"):
            weights_only(wide, tmp_path / "m.onnx", root=tmp_path)

    def test_too_little_memory(self, wide, tmp_path, monkeypatch):
        def full(*arguments):
            raise MemoryError

        monkeypatch.setattr("admth_calibration.weights_only.quantize_blocks", full)
        with pytest.raises(ModelError, match="too little memory to compress it: use a computer with more, or --keep"):
            weights_only(wide, tmp_path / "m.onnx")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"weights": "int3"}, "weights 'int3' are unknown: use --weights-only int8 or int4"),
            ({"block_size": 48}, "block size 48 is none of 16, 32, 64, 128, 256"),
            ({"convolutions": "int4"}, "convolutions 'int4' are unknown: use fp16 or int8"),
            ({"images": 100}, "images 100 is not an integer from 128"),
            ({"images": 5000}, "images 5,000 is above 4,096"),
            ({"check_images": 0}, "check images 0 is not an integer from 1"),
        ],
    )
    def test_options_out_of_range(self, values, message):
        with pytest.raises(InputError, match=message):
            WeightsOnlyOptions(**values)

    def test_every_precision_has_a_gate(self):
        from admth_export.gate import GATES

        assert set(GATES) >= set(PRECISIONS)


class TestCommand:
    def run(self, *words, cwd):
        return subprocess.run(
            [sys.executable, "-m", "admth_calibration", *map(str, words)],
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "2", "COLUMNS": "200"},
            timeout=120,
            check=False,
        )

    def test_the_bare_command_works_beside_a_model(self, wide, tmp_path):
        shutil.copy(wide, tmp_path / "model.onnx")
        done = self.run("--weights-only", "int8", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert lines[0] == "weights of 12 layers: 5 in fp16, 7 in int8; 2 kept in FP32"
        assert lines[-2].startswith("wrote model.w8.onnx (")
        assert lines[-1] == "next: admth-export verify model.w8.onnx"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.w8.onnx"]

    def test_json_with_images(self, wide, pictures, tmp_path):
        words = ["--weights-only", "int4", "--data", f"folder:{pictures}", "--check-data", f"folder:{pictures}"]
        done = self.run(wide, *words, "--out", "m.onnx", "--check-images", 9, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
        assert facts["precision"] == "int4-weights"
        assert facts["bytes"] == (tmp_path / "m.onnx").stat().st_size
        assert facts["calibration"]["predicted"]["images"] == 9
        assert facts["layers"]["first.0"] == "int4"

    def test_errors_are_one_line(self, wide, tmp_path):
        done = self.run(wide, "--weights-only", "int2", "--out", "m.onnx", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "error: weights 'int2' are unknown: use --weights-only int8 or int4\n"
        done = self.run(wide, "--weights-only", "int8", "--target", "trt", cwd=tmp_path)
        assert done.stderr == "error: --target trt means nothing with --weights-only: leave one of them out\n"
        assert not list(tmp_path.iterdir())
