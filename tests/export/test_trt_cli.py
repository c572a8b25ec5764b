"""``admth-export trt`` and ``inspect`` as users run them: real processes, one line for each bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from admth_export.inspection import inspect_file, lines_of, model_layers
from admth_export.tensorrt.layers_worker import layer_table
from admth_runtime.driver import ask_driver
from admth_runtime.errors import ManifestError, ModelError

needs_rtx = pytest.mark.skipif(
    not any(Path(place, "tensorrt_rtx").is_dir() for place in sys.path),
    reason="TensorRT-RTX is not installed: pip install 'admth[rtx]'",
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2", "COLUMNS": "200"}
LOOSE = ("--min-bit-parity", "0.5", "--noise-threshold", "100", "--database-images", "0")


def run_cli(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "admth_export", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
        timeout=180,
        check=False,
    )


def fails(done, *parts):
    assert done.returncode == 1, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert done.stdout == ""
    for part in parts:
        assert part in lines[0]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def run(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "run"))


@pytest.mark.parametrize("command", ["trt", "inspect"])
def test_help_imports_nothing_heavy(command):
    program = (
        "import atexit, sys\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'tensorrt', 'tensorrt_rtx'}\n"
        "atexit.register(lambda: print('LOADED', sorted(heavy & set(sys.modules))))\n"
        "from admth_export.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, command, "-h"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout


@needs_rtx
def test_the_bare_command_works_in_a_runs_folder(run):
    before = names(run)
    done = run_cli("trt", "--fp16", "--flavor", "rtx", *LOOSE, cwd=run)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    made = ["model.fp16.parity.json", "model.fp16.parity.png", "model.fp16.rtx", "model.fp16.rtx.json"]
    assert names(run) == sorted([*before, *made])
    lines = done.stdout.splitlines()
    assert "sign parity with PyTorch on 24 of 24 query images" in lines[0]
    assert "kept in FP32: packing, pixels" in lines
    (wrote,) = [line for line in lines if line.startswith("wrote model.fp16.rtx (")]
    assert "sm80, sm86, sm89, sm120, sm121, batch 1-32 (best 8)" in wrote
    assert lines[-1] == "next: admth-run encode IMAGES --model model.fp16.rtx --out codes.npz"

    shown = run_cli("inspect", "model.fp16.rtx", cwd=run)
    assert shown.returncode == 0, shown.stderr
    assert "TensorRT-RTX 1." in shown.stdout
    assert "1 to 32, tuned for 8" in shown.stdout
    assert "packing (fp32: packs the codes of the FP32 logits)" in shown.stdout
    if not ask_driver().gpus:
        assert "not run here, since there is no NVIDIA driver" in done.stdout or "not run here" in done.stdout
        assert "the engine itself was not run where it was built" in shown.stdout
        fails(run_cli("inspect", "model.fp16.rtx", "--layers", cwd=run), "needs an NVIDIA GPU")


@needs_rtx
def test_json_and_all_options(run, tmp_path):
    out = tmp_path / "engine.rtx"
    words = ["trt", run / "model.onnx", "--fp32", "--flavor", "rtx", "--batch", 1, 2, 4, "--workspace", 256]
    words += ["--optimization-level", 1, "--gpu", "8.9,sm120", "--tf32", "--out", out, "--json"]
    done = run_cli(*words)
    assert done.returncode == 0, done.stderr
    fields = json.loads(done.stdout)
    assert fields["engine"] == str(out)
    assert fields["bytes"] == out.stat().st_size
    assert fields["sidecar"] == json.loads(Path(f"{out}.json").read_text())
    assert fields["sidecar"]["profiles"] == [{"min": 1, "opt": 2, "max": 4}]
    assert fields["sidecar"]["compute_capabilities"] == ["sm89", "sm120"]
    assert fields["sidecar"]["build_options"]["tf32"] is True
    assert fields["predicted_parity"]["bit_parity"].keys() == {"8", "16"}


@needs_rtx
def test_verbose_shows_tensorrts_messages(run):
    quiet = run_cli("trt", run / "model.onnx", "--fp32", "--flavor", "rtx")
    loud = run_cli("trt", run / "model.onnx", "--fp32", "--flavor", "rtx", "--verbose")
    assert quiet.returncode == loud.returncode == 0
    assert quiet.stderr == ""
    assert "TensorRT INFO: " in loud.stderr


@needs_rtx
def test_without_the_gate(run):
    done = run_cli("trt", run / "model.onnx", "--fp16", "--flavor", "rtx", "--no-verify")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: the parity gate was left out, and the sidecar says so")
    sidecar = json.loads((run / "model.fp16.rtx.json").read_text())
    assert sidecar["predicted_parity"] is None
    assert "not measured: the gate was left out" in run_cli("inspect", run / "model.fp16.rtx").stdout


@needs_rtx
@pytest.mark.skipif(ask_driver().problem is None, reason="an NVIDIA GPU is here, where the engine itself runs")
def test_an_engine_is_verified_where_there_is_a_gpu_and_its_file_is_checked_first(run):
    done = run_cli("trt", "--fp16", "--flavor", "rtx", "--images", "16", *LOOSE, cwd=run)
    assert done.returncode == 0, done.stderr
    fails(run_cli("verify", "model.fp16.rtx", cwd=run), "model.fp16.rtx needs an NVIDIA GPU")
    damaged = bytearray((run / "model.fp16.rtx").read_bytes())
    damaged[-1] ^= 1
    (run / "model.fp16.rtx").write_bytes(damaged)
    fails(run_cli("verify", "model.fp16.rtx", cwd=run), "was altered, or is not the engine of its sidecar")
    assert not (run / "model.fp16.rtx.parity.json").exists()


def test_bad_arguments(run, tmp_path):
    model = run / "model.onnx"
    before = names(run)
    fails(run_cli("trt", model), "no precision is named: pass --fp32, --fp16, --int8")
    fails(run_cli("trt", model, "--fp32", "--int8"), "--fp32 and --int8 contradict each other")
    fails(run_cli("trt", model, "--fp32", "--batch", 8, 4, 32), "are out of order: pass them as --batch MIN OPT MAX")
    fails(run_cli("trt", model, "--fp32", "--batch", 0, 4, 32), "are not three positive integers")
    fails(run_cli("trt", model, "--fp32", "--flavor", "onnx"), "flavor 'onnx' is unknown")
    fails(run_cli("trt", model, "--fp32", "--gpu", "ada"), "GPU 'ada' is not a compute capability")
    fails(run_cli("trt", model, "--fp32", "--keep-fp32", "trunk"), "--keep-fp32 means nothing for --fp32")
    fails(run_cli("trt", model, "--fp32", "--flavor", "rtx", "--version-compatible"), "cannot honour --version-compat")
    fails(run_cli("trt", model, "--fp32", "--flavor", "rtx", "--timing-cache", "c"), "cannot honour --timing-cache")
    fails(run_cli("trt", model, "--fp32", "--flavor", "tensorrt", "--gpu", "sm89"), "TensorRT cannot honour --gpu")
    cache = tmp_path / "no" / "cache"
    fails(
        run_cli("trt", model, "--fp32", "--flavor", "tensorrt", "--timing-cache", cache), "timing cache: cannot write"
    )
    fails(run_cli("trt", tmp_path / "absent.onnx", "--fp32"), "no such model file; make one with  admth-export onnx")
    fails(run_cli("trt", "--int8", cwd=tmp_path), "model.int8.trt.onnx: no such calibrated model", "admth-calibrate")
    fails(run_cli("trt", "--fp16", cwd=tmp_path), "model.onnx: no such model file")
    assert names(run) == before


@needs_rtx
@pytest.mark.skipif(bool(ask_driver().gpus), reason="there is a GPU, so TensorRT may build")
def test_a_flavour_that_is_not_there(run):
    before = names(run)
    done = run_cli("trt", run / "model.onnx", "--fp32", "--flavor", "tensorrt")
    fails(done, "needs the package tensorrt, which is not installed: run  pip install 'admth[tensorrt]'")
    assert names(run) == before


@needs_rtx
@pytest.mark.parametrize("stage", ["gate", "builder"])
def test_ctrl_c_leaves_nothing(run, stage):
    before = names(run)
    words = ["trt", str(run / "model.onnx"), "--fp16", "--flavor", "rtx", *LOOSE]
    words += ["--no-verify"] if stage == "builder" else []
    module = "admth_export.candidate" if stage == "gate" else "admth_export.tensorrt.build_worker"
    process = subprocess.Popen(
        [sys.executable, "-m", "admth_export", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not (children := _children(process.pid, module)):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert err.strip().splitlines()[-1] == "error: interrupted: nothing half-written was left behind"
    assert "Traceback" not in err
    assert names(run) == before
    assert not [pid for pid in children if Path("/proc", pid).exists()]


def _children(pid, module):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [child for child in children if module.encode() in Path("/proc", child, "cmdline").read_bytes()]
    except OSError:
        return []


class TestInspect:
    def test_an_onnx_model_and_its_layers(self, exported):
        facts = inspect_file(exported / "model.onnx", layers=True)
        assert facts["kind"] == "onnx"
        assert facts["precision"] == "fp32"
        layers = facts["layers"]
        assert layers == model_layers(exported / "model.onnx")
        assert {layer["precision"] for layer in layers} == {"fp32"}
        assert layers[0] == {"name": "trunk.stem.conv", "operator": "Conv", "precision": "fp32"}
        text = "\n".join(lines_of(facts))
        assert "IR version 10, opset ai.onnx 20" in text
        assert "predicted parity" in text
        assert "fp32     Conv         trunk.stem.conv" in text

    def test_json(self, exported):
        done = run_cli("inspect", exported / "model.onnx", "--json")
        assert done.returncode == 0, done.stderr
        fields = json.loads(done.stdout)
        assert (fields["kind"], "layers" in fields) == ("onnx", False)
        assert fields["code_lengths"] == [8, 16]

    def test_files_that_are_nothing(self, tmp_path):
        (tmp_path / "text.onnx").write_text("hello")
        (tmp_path / "empty.plan").write_bytes(b"")
        (tmp_path / "foreign.plan").write_bytes(b"ptrt" + bytes(100))
        (tmp_path / "lonely.plan").write_bytes(b"ftrt" + bytes(100))
        with pytest.raises(ModelError, match=r"text\.onnx"):
            inspect_file(tmp_path / "text.onnx")
        with pytest.raises(ModelError, match=r"empty\.plan is empty"):
            inspect_file(tmp_path / "empty.plan")
        with pytest.raises(ModelError, match=r"foreign\.plan is not a TensorRT engine"):
            inspect_file(tmp_path / "foreign.plan")
        with pytest.raises(ManifestError, match=r"lonely\.plan has no sidecar"):
            inspect_file(tmp_path / "lonely.plan")
        fails(run_cli("inspect", tmp_path / "absent.plan"), "no such engine file")

    def test_the_inspectors_answer_becomes_a_table(self):
        """The two forms that TensorRT's inspector writes: with details, and names alone."""
        answer = {
            "Layers": [
                {
                    "Name": "conv1 + relu",
                    "LayerType": "CaskConvolution",
                    "Outputs": [{"Name": "x", "Format/Datatype": "Channel major FP16 format where C % 8 == 0"}],
                },
                {"Name": "q", "LayerType": "Scale", "Outputs": [{"Format/Datatype": "Row major Int8 format"}]},
                {"Name": "codes", "LayerType": "Reduce", "Outputs": [{"Datatype": "Float"}]},
                "names only",
            ]
        }
        assert [(row["name"], row["precision"]) for row in layer_table(answer)] == [
            ("conv1 + relu", "fp16"),
            ("q", "int8"),
            ("codes", "fp32"),
            ("names only", ""),
        ]
