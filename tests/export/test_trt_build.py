"""Engines, built for real by TensorRT-RTX, which needs no GPU for that: both backbones, every precision, every GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise

import numpy as np
import onnx
import onnx.helper
import pytest

from admth_calibration import CalibrationOptions, calibrate
from admth_export import (
    EngineOptions,
    EnginePrecision,
    Gate,
    HalfChoice,
    ImageChoice,
    export_engine,
    export_onnx,
    worker_process,
)
from admth_export.locking import export_lock
from admth_export.tensorrt import prediction
from admth_export.tensorrt.prediction import load_reference, measure_engine
from admth_runtime import read_model
from admth_runtime.driver import CudaFacts, ask_driver
from admth_runtime.engine_file import read_engine_file, read_header
from admth_runtime.errors import CheckpointError, DeviceError, InputError, ModelError, OutputError, ParityError
from admth_runtime.files import sha256_of_file
from admth_runtime.manifest import METADATA_KEY
from admth_runtime.sidecar import BatchProfile, read_sidecar
from admth_training.backbones.efficientnet_lite0 import load_imagenet_weights
from admth_training.config import NetworkConfig
from admth_training.network import build_network

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'admth[rtx]'")

FP32, FP16, INT8, MIXED = (
    EnginePrecision("fp32"),
    EnginePrecision("fp16"),
    EnginePrecision("int8"),
    EnginePrecision("int8", half_rest=True),
)
FEW = ImageChoice(images=24, database_images=0)
ALL = ImageChoice(images=72, database_images=0)
OPEN = Gate(noise_threshold=None, minimum_bit_parity=0.0)
AMPERE_AND_LATER = ("sm80", "sm86", "sm89", "sm120", "sm121")


def make_pretrained(config, make_pixels):
    """A network with ImageNet weights, and heads whose logits lie around zero: as well conditioned as a trained one."""
    import torch

    network = build_network(config, seed=0).eval()
    load_imagenet_weights(network.trunk)
    pixels = torch.from_numpy(make_pixels(48, config.size, 99))
    with torch.no_grad():
        for branch, logits in zip(network.branches, network(pixels), strict=True):
            last, spread = branch[-1], logits.std(dim=0).clamp_min(1e-6)
            last.weight.div_(spread[:, None])
            last.bias.copy_((last.bias - logits.median(dim=0).values) / spread)
    return network


@pytest.fixture(scope="module")
def lite(tmp_path_factory, make_run, make_pixels, pictures):
    """A run of EfficientNet-Lite0 at 64 pixels, exported, and calibrated on its pictures."""
    network = make_pretrained(NetworkConfig(input_size=64, hidden=32, code_lengths=(16, 64)), make_pixels)
    return exported_run(tmp_path_factory.mktemp("lite") / "run", network, make_run, pictures)


@pytest.fixture(scope="module")
def cnnf(tmp_path_factory, make_run, make_network, pictures):
    """A run of CNN-F with narrow hidden layers at 67 pixels, exported and calibrated."""
    network = make_network(NetworkConfig(backbone="cnnf", input_size=67, hidden=32, code_lengths=(16, 64)))
    return exported_run(tmp_path_factory.mktemp("cnnf") / "run", network, make_run, pictures)


def exported_run(folder, network, make_run, pictures):
    run = make_run(folder, network, f"folder:{pictures}")
    export_onnx(run, images=FEW)
    many = folder.parent / "many"
    many.mkdir()
    for path in sorted(pictures.rglob("*.png")):
        for copy in range(3):
            shutil.copy(path, many / f"{path.parent.name}-{path.stem}-{copy}.png")
    calibrate(run / "model.onnx", f"folder:{many}", options=CalibrationOptions("trt", check_images=16))
    return run


@pytest.fixture
def run_of(lite, cnnf, tmp_path):
    """A copy of a run that a test may write into."""

    def copy(name):
        shutil.copytree({"lite": lite, "cnnf": cnnf}[name], tmp_path / name)
        return tmp_path / name

    return copy


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def build(folder, precision, **arguments):
    model = "model.int8.trt.onnx" if precision.name == "int8" else "model.onnx"
    defaults = {"precision": precision, "flavour": "rtx", "images": FEW, "gate": OPEN}
    return export_engine(folder / model, **{**defaults, **arguments})


class TestEngines:
    @pytest.mark.parametrize("precision", [FP32, FP16, INT8, MIXED], ids=lambda precision: precision.label)
    @pytest.mark.parametrize("backbone", ["lite", "cnnf"])
    def test_an_engine_and_its_sidecar(self, run_of, backbone, precision):
        run = run_of(backbone)
        options = EngineOptions(batch=BatchProfile(2, 4, 24), workspace_mib=512, optimization_level=2)
        result = build(run, precision, options=options)
        source = run / ("model.int8.trt.onnx" if precision.name == "int8" else "model.onnx")
        assert result.file == run / f"model.{precision.label}.rtx"
        assert (result.bytes, result.sha256) == (result.file.stat().st_size, sha256_of_file(result.file))
        assert not [path for path in run.iterdir() if path.name.startswith(".")]

        found = read_engine_file(result.file)  # holds header, size and SHA-256 against the sidecar
        assert result.file.read_bytes()[:4] == b"vtrt"
        assert found.header.flavour == "rtx"
        assert found.header.version_text.rpartition(".")[0] == rtx.__version__.rpartition(".")[0]
        sidecar = found.sidecar
        assert sidecar == result.sidecar
        assert sidecar.tensorrt_version == rtx.__version__
        assert sidecar.compute_capabilities == AMPERE_AND_LATER
        assert sidecar.profiles == (BatchProfile(2, 4, 24),)
        assert (sidecar.source_name, sidecar.source_sha256) == (source.name, sha256_of_file(source))
        assert sidecar.build_options["workspace_mib"] == 512
        assert sidecar.build_options["precision"] == precision.flags
        assert sidecar.build_seconds > 0
        assert (sidecar.manifest.precision, sidecar.manifest.target) == (precision.name, "tensorrt")
        assert sidecar.predicted_parity["bit_parity"].keys() == {"16", "64"}
        assert (sidecar.measured_parity is None) == (result.measured is None)
        half = precision.name == "fp16" or precision.half_rest
        assert {"packing", "pixels"} <= set(sidecar.layers_kept) if half else not sidecar.layers_kept
        assert set(sidecar.build_options["kept_because"]) == set(sidecar.layers_kept)
        if backbone == "cnnf" and half:
            assert {"trunk.norm1.window_sum", "trunk.norm2.window_sum"} <= set(sidecar.layers_kept)

    @pytest.mark.parametrize("gpu", ["sm75", *AMPERE_AND_LATER])
    @pytest.mark.parametrize("backbone", ["lite", "cnnf"])
    def test_every_gpu(self, run_of, backbone, gpu):
        run = run_of(backbone)
        result = build(run, FP16, options=EngineOptions(gpus=(gpu,)), verify=False)
        assert result.sidecar.compute_capabilities == (gpu,)
        assert result.sidecar.predicted_parity is None
        assert read_engine_file(result.file).sidecar.compute_capabilities == (gpu,)
        mixed = build(run, MIXED, options=EngineOptions(gpus=(gpu,)), verify=False)
        assert mixed.sidecar.manifest.calibration["rest"] == "fp16"

    @pytest.mark.parametrize("precision", [FP32, FP16, INT8, MIXED], ids=lambda precision: precision.label)
    @pytest.mark.parametrize("backbone", ["lite", "cnnf"])
    def test_nvidias_parser_sees_the_promised_graph(self, run_of, backbone, precision):
        """Inputs, outputs and the types inside, as TensorRT understands the typed model."""
        run = run_of(backbone)
        typed = build(run, precision, onnx_only=True, verify=False).file
        assert typed.name == f"model.{precision.label}.onnx"
        size = read_model(typed).manifest.preprocessing.height
        logger = rtx.Logger(rtx.Logger.ERROR)
        builder = rtx.Builder(logger)
        network = builder.create_network(1 << int(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = rtx.OnnxParser(network, logger)
        assert parser.parse(typed.read_bytes())
        assert network.num_inputs == 1
        images = network.get_input(0)
        assert (images.name, images.dtype, tuple(images.shape)) == ("images", rtx.uint8, (-1, size, size, 3))
        outputs = {network.get_output(index).name: network.get_output(index) for index in range(network.num_outputs)}
        assert {name: (output.dtype, tuple(output.shape)) for name, output in outputs.items()} == {
            "code_16": (rtx.uint8, (-1, 2)),
            "logits_16": (rtx.float32, (-1, 16)),
            "code_64": (rtx.uint8, (-1, 8)),
            "logits_64": (rtx.float32, (-1, 64)),
        }
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        counts = {kind: sum(layer.type == kind for layer in layers) for kind in {layer.type for layer in layers}}
        convolutions = [layer for layer in layers if layer.type == rtx.LayerType.CONVOLUTION]
        types = {layer.get_output(0).dtype for layer in convolutions}
        half = precision.name == "fp16" or precision.half_rest
        expected = {rtx.float16} if half else {rtx.float32}
        if backbone == "cnnf" and half:
            expected |= {rtx.float32}  # the response normalisation
        assert types == expected
        quantised = counts.get(rtx.LayerType.QUANTIZE, 0)
        assert bool(quantised) == (precision.name == "int8")
        if quantised:
            outputs_of = {layer.get_output(0).dtype for layer in layers if layer.type == rtx.LayerType.QUANTIZE}
            assert outputs_of == {rtx.int8}

    def test_a_typed_model_is_built_elsewhere(self, run_of, tmp_path):
        """What a workstation makes, a device builds, without the run and with the parity that was measured."""
        run = run_of("lite")
        typed = build(run, FP16, onnx_only=True)
        assert typed.sidecar is None
        assert typed.predicted["passed"] is True
        device = tmp_path / "device"
        device.mkdir()
        shutil.copy(typed.file, device)
        result = export_engine(device / "model.fp16.onnx", precision=FP16, flavour="rtx")
        assert result.file == device / "model.fp16.rtx"
        assert result.parity is None
        assert result.sidecar.predicted_parity == typed.predicted
        assert names(device) == ["model.fp16.onnx", "model.fp16.rtx", "model.fp16.rtx.json"]

    def test_a_device_needs_neither_pytorch_nor_onnx(self, run_of, tmp_path):
        run = run_of("lite")
        typed = build(run, FP16, onnx_only=True).file
        shutil.copy(typed, tmp_path)
        program = (
            "import sys\n"
            "for name in ('torch', 'onnx', 'onnxscript', 'onnxruntime', 'matplotlib', 'safetensors'):\n"
            "    sys.modules[name] = None\n"
            "sys.argv = ['admth-export', 'trt', 'model.fp16.onnx', '--fp16', '--flavor', 'rtx']\n"
            "from admth_export.cli import main\n"
            "main()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "predicted parity, from the model's manifest: 16: " in done.stdout
        assert read_engine_file(tmp_path / "model.fp16.rtx").sidecar.predicted_parity["passed"] is True

    def test_a_device_with_a_gpu_and_without_pytorch_says_that_the_engine_was_not_run(self, run_of, monkeypatch):
        typed = build(run_of("lite"), FP16, onnx_only=True).file
        gpu = CudaFacts(True, "12.8", 1, None, (("NVIDIA L4", "sm89"),))
        monkeypatch.setattr(prediction, "ask_driver", lambda: gpu)
        monkeypatch.setitem(sys.modules, "torch", None)
        arguments = {"verify": True, "precision": FP16, "onnx_only": False}
        reference, reason = load_reference(read_model(typed), None, FEW, targets=("sm89",), **arguments)
        assert reference is None
        assert "pip install 'admth[export]'" in reason
        _, reason = load_reference(read_model(typed), None, FEW, targets=("sm86",), **arguments)
        assert reason == "the GPU here is sm89 and the engine is for sm86"

    def test_the_default_gate_passes_fp16_of_a_network_that_was_trained_on_images(self, run_of):
        result = build(run_of("lite"), FP16, gate=None)
        assert result.predicted["passed"] is True
        assert result.predicted["minimum_bit_parity"] == 0.998
        assert min(result.predicted["bit_parity"].values()) >= 0.997  # of 384 bits, one may differ
        assert result.parity.engine.name == "onnxruntime"
        assert [path.name for path in result.reports] == ["model.fp16.parity.json", "model.fp16.parity.png"]
        assert json.loads(result.reports[0].read_text())["model"]["sha256"] == result.sha256

    @pytest.mark.slow
    def test_the_whole_cnnf(self, tmp_path, make_run, pictures):
        """221 million parameters, 884 MB of ONNX: every precision is built, and keeps its size."""
        network = build_network(NetworkConfig(backbone="cnnf"), seed=0).eval()
        run = make_run(tmp_path / "run", network, f"folder:{pictures}")
        del network
        export_onnx(run, verify=False)
        many = tmp_path / "many"
        shutil.copytree(pictures, many)
        shutil.copytree(pictures, many / "again")
        calibrate(run / "model.onnx", f"folder:{many}", options=CalibrationOptions("trt", images=128, check_images=2))
        sizes = {}
        for precision in (FP32, FP16, INT8, MIXED):
            result = build(run, precision, verify=False)
            sizes[precision.label] = result.bytes
            assert read_sidecar(result.file).manifest.precision == precision.name
            result.file.unlink()
        assert 880e6 < sizes["fp32"] < 900e6
        assert 440e6 < sizes["fp16"] < 460e6
        assert 220e6 < sizes["int8"] < 240e6
        assert 220e6 < sizes["int8.fp16"] < 240e6


class TestGate:
    def test_a_model_below_the_gate_is_not_built_and_the_layers_are_named(self, run_of):
        run = run_of("cnnf")
        before = names(run)
        every_bit = Gate(noise_threshold=None, minimum_bit_parity=1.0)
        with pytest.raises(ParityError, match=r"model\.fp16\.rtx fails the parity gate and was not written") as caught:
            build(run, FP16, gate=every_bit, keep=HalfChoice(auto=False, names=("trunk.norm1",)), images=ALL)
        assert "the layers that add most to the error are" in str(caught.value)
        assert "keep them in FP32 with  --keep-fp32 auto," in str(caught.value)
        assert names(run) == sorted([*before, "model.fp16.parity.failed.json", "model.fp16.parity.failed.png"])

    def test_auto_leaves_more_and_more_layers_in_fp32(self, run_of, monkeypatch):
        run = run_of("cnnf")
        tried = []
        real = prediction.write_half

        def watched(source, path, precision, choice, pixels):
            tried.append(dict(choice.sensitive))
            return real(source, path, precision, choice, pixels)

        monkeypatch.setattr(prediction, "write_half", watched)
        tight = Gate(noise_threshold=None, minimum_bit_parity=1.0)
        with pytest.raises(ParityError, match=r"leaving \d+ of 12 layers in FP32 was not enough: build with --fp32"):
            build(run, FP16, gate=tight, images=ALL)
        assert tried[0] == {}
        assert len(tried) == 4
        for fewer, more in pairwise(tried):
            assert set(fewer) < set(more) or set(fewer) == set(more)
        assert sum(tried[1].values()) >= 0.5
        assert sum(tried[3].values()) >= 0.95

    def test_values_that_overflow_are_found_and_named(self, run_of):
        """A layer whose outputs are beyond FP16: ``auto`` leaves it in FP32, and without it the gate names it."""
        run = run_of("cnnf")
        model = onnx.load(run / "model.onnx")
        tensors = {item.name: item for item in model.graph.initializer}
        for name, factor in (("trunk.conv3.weight", 3e5), ("trunk.conv4.weight", 1 / 3e5)):
            values = onnx.numpy_helper.to_array(tensors[name]) * np.float32(factor)
            tensors[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
        onnx.save(model, run / "model.onnx")
        choice = HalfChoice(auto=False)
        with pytest.raises(ParityError, match=r"not finite.*comes from the layer trunk\.conv3: keep it in FP32 with"):
            build(run, FP16, keep=choice)
        result = build(run, FP16)
        assert "values up to" in result.sidecar.build_options["kept_because"]["trunk.conv3"]
        assert result.predicted["passed"] is True

    def test_the_gate_needs_the_run(self, run_of, tmp_path):
        run = run_of("lite")
        lonely = tmp_path / "lonely"
        lonely.mkdir()
        shutil.copy(run / "model.onnx", lonely)
        with pytest.raises(CheckpointError, match=r"lonely.*holds no config"):
            build(lonely, FP16)
        assert names(lonely) == ["model.onnx"]
        assert build(lonely, FP16, run=run).predicted is not None
        other = run_of("cnnf")
        with pytest.raises(CheckpointError, match="came from other weights"):
            build(lonely, FP16, run=other)
        without = build(lonely, FP16, verify=False)
        assert without.sidecar.predicted_parity is None
        assert without.unmeasured == "the gate was left out with --no-verify"

    def test_fp32_that_passed_when_it_was_exported_is_not_measured_again(self, run_of, tmp_path):
        run = run_of("lite")
        shutil.move(run / "model.onnx", tmp_path / "model.onnx")
        result = export_engine(tmp_path / "model.onnx", precision=FP32, flavour="rtx")
        assert result.parity is None
        assert result.predicted["bit_parity"] == read_model(tmp_path / "model.onnx").manifest.parity["bit_parity"]

    @pytest.mark.skipif(bool(ask_driver().gpus), reason="there is a GPU, so the engine itself is run")
    def test_an_engine_that_cannot_run_leaves_no_sidecar_of_its_trial(self, run_of):
        run = run_of("lite")
        result = build(run, FP16)
        assert result.measured is None
        assert result.unmeasured.startswith("there is no NVIDIA driver") or "driver" in result.unmeasured
        trial = run / "trial.rtx"
        shutil.copy(result.file, trial)
        reference, _ = load_reference(
            read_model(run / "model.onnx"), run, FEW, verify=True, precision=FP16, targets=(), onnx_only=True
        )
        with pytest.raises(DeviceError, match="NVIDIA"):
            measure_engine(trial, run / "model.fp16.rtx", result.sidecar, reference, None)
        assert not (run / "trial.rtx.json").exists()


class TestBadInput:
    def test_models_of_a_wrong_precision(self, run_of, tmp_path):
        run = run_of("lite")
        with pytest.raises(ModelError, match=r"no such calibrated model; make it with  admth-calibrate"):
            export_engine(tmp_path / "model.int8.trt.onnx", precision=INT8)
        with pytest.raises(ModelError, match=r"is fp32 and --int8 needs a calibrated model: make it with"):
            export_engine(run / "model.onnx", precision=INT8)
        with pytest.raises(ModelError, match=r"is int8, and no fp16 engine can be made of that"):
            export_engine(run / "model.int8.trt.onnx", precision=FP16)
        model = onnx.load(run / "model.int8.trt.onnx")
        manifest = replace(read_model(run / "model.int8.trt.onnx").manifest, target="cpu")
        onnx.helper.set_model_props(model, {METADATA_KEY: manifest.to_json()})
        onnx.save(model, tmp_path / "cpu.onnx")
        with pytest.raises(ModelError, match=r"is made for CPUs .int8.*--target trt"):
            export_engine(tmp_path / "cpu.onnx", precision=INT8)

    def test_an_operator_that_tensorrt_lacks_is_named(self, run_of):
        run = run_of("cnnf")
        model = onnx.load(run / "model.onnx")
        (last,) = [node for node in model.graph.node if "logits_16" in node.output]
        odd = onnx.helper.make_node("Bernoulli", [last.input[0]], ["noise"], "odd_node", seed=1.0)
        last.input[0] = "noise"
        model.graph.node.insert(list(model.graph.node).index(last), odd)
        onnx.save(model, run / "model.onnx")
        before = names(run)
        with pytest.raises(ModelError, match=r"parser refuses the model .*odd_node.*Bernoulli"):
            build(run, FP32, verify=False)
        assert names(run) == before

    def test_unsafe_models(self, run_of, tmp_path):
        run = run_of("cnnf")
        model = onnx.load(run / "model.onnx")
        onnx.save(
            model, tmp_path / "outside.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
        )
        with pytest.raises(ModelError, match=r"keeps data in another file .external data of tensor"):
            export_engine(tmp_path / "outside.onnx", precision=FP32)
        (tmp_path / "linked.onnx").symlink_to(tmp_path / "outside.onnx")
        with pytest.raises(ModelError, match="keeps data in another file"):
            export_engine(tmp_path / "linked.onnx", precision=FP32)
        (tmp_path / "dangling.onnx").symlink_to(tmp_path / "nothing")
        with pytest.raises(ModelError, match="no such model file"):
            export_engine(tmp_path / "dangling.onnx", precision=FP32)

    def test_a_model_of_a_fixed_batch(self, run_of, tmp_path):
        run = run_of("cnnf")
        model = onnx.load(run / "model.onnx")
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
        onnx.save(model, tmp_path / "fixed.onnx")
        with pytest.raises(ModelError, match="with a dynamic batch"):
            export_engine(tmp_path / "fixed.onnx", precision=FP32)

    def test_too_small_a_workspace(self, run_of):
        run = run_of("lite")
        before = names(run)
        with pytest.raises(DeviceError, match=r"cannot build the engine: .*OutOfMemory.*: raise --workspace"):
            build(run, FP32, options=EngineOptions(workspace_mib=1), verify=False)
        assert names(run) == before

    def test_outputs_that_cannot_be_written(self, run_of, tmp_path):
        run = run_of("lite")
        with pytest.raises(OutputError, match=r"its name must end with .rtx; pass for example --out engine.rtx"):
            build(run, FP32, out=tmp_path / "engine.plan")
        with pytest.raises(OutputError, match="its folder does not exist"):
            build(run, FP32, out=tmp_path / "no" / "engine.rtx")
        (tmp_path / "taken.rtx.json").mkdir()
        with pytest.raises(OutputError, match=r"taken\.rtx\.json: it is a folder"):
            build(run, FP32, out=tmp_path / "taken.rtx")
        with pytest.raises(OutputError, match="it is the model itself"):
            build(run, FP32, onnx_only=True, out=run / "model.onnx")

    def test_two_builds_into_one_file(self, run_of):
        run = run_of("lite")
        with (
            export_lock(run / "model.fp32.rtx", what="build"),
            pytest.raises(OutputError, match=r"model\.fp32\.rtx is being written by another build: wait for it"),
        ):
            build(run, FP32)
        assert build(run, FP32).file.is_file()

    def test_a_layer_that_does_not_exist(self, run_of):
        run = run_of("lite")
        before = names(run)
        with pytest.raises(InputError, match=r"'trunk\.block\.3' matches no layer"):
            build(run, FP16, keep=HalfChoice(names=("trunk.block.3",)), verify=False)
        assert names(run) == before

    def test_a_builder_that_is_killed(self, run_of, monkeypatch):
        run = run_of("lite")
        before = names(run)
        build(run, FP32)
        old = (run / "model.fp32.rtx").read_bytes()
        started = []

        class Watched(worker_process.subprocess.Popen):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options)
                started.append(self)
                threading.Timer(0.2, self.kill).start()

        monkeypatch.setattr(worker_process.subprocess, "Popen", Watched)
        with pytest.raises(DeviceError, match=r"the process that built .*model\.fp32\.rtx was ended by SIGKILL"):
            build(run, FP32)
        assert started[0].returncode == -9
        assert (run / "model.fp32.rtx").read_bytes() == old  # the old pair stays whole
        assert read_engine_file(run / "model.fp32.rtx").sidecar is not None
        assert names(run) == sorted([*before, "model.fp32.rtx", "model.fp32.rtx.json"])

    def test_a_header_is_what_the_runtime_expects(self, run_of):
        run = run_of("lite")
        result = build(run, FP32)
        header = read_header(result.file)
        assert header.flavour == "rtx"
        altered = bytearray(result.file.read_bytes())
        altered[5000] ^= 1
        result.file.write_bytes(bytes(altered))
        with pytest.raises(ModelError, match="was altered, or is not the engine of its sidecar"):
            read_engine_file(result.file)
