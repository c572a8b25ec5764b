"""``admth-calibrate`` as users run it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from admth_runtime import read_model
from admth_runtime.files import sha256_of_file

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2", "COLUMNS": "200"}
FAST = ("--images", 128, "--block-images", 16, "--rounding", "zero-sum")


def run_cli(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "admth_calibration", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
        timeout=240,
        check=False,
    )


def fails(done, *parts):
    assert done.returncode == 1, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def test_the_bare_command_works_beside_a_model(cnnf, pictures, tmp_path):
    """With the gate on parity, and in place of what an earlier run left."""
    shutil.copy(cnnf, tmp_path / "model.onnx")
    (tmp_path / "model.int8.onnx").write_bytes(b"of an earlier run")
    quick = ("--check-images", 32, "--rounding", "zero-sum")
    done = run_cli("--data", f"folder:{pictures}", *quick, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress where there is no terminal
    lines = done.stdout.splitlines()
    manifest = read_model(tmp_path / "model.int8.onnx").manifest
    facts = manifest.calibration
    assert facts["gates"] == {"min_bit_parity": 0.995}
    assert facts["predicted"]["bit_parity"]["16"] >= 0.995
    assert (facts["method"], facts["rounding"], facts["images"]) == ("mse", "zero-sum", 128)
    assert (
        lines[0] == f"{facts['layers']} layers in INT8, {len(facts['kept_fp32'])} kept in float, ranges of 128 images"
    )
    assert lines[1] == "parity with the FP32 model, on 32 images on the CPU:"
    share = facts["predicted"]["bit_parity"]["16"]
    assert lines[2].strip().startswith(f"16 bits: {100 * share:.3f} % of the bits equal, ")
    assert any(line.startswith("one image takes ") for line in lines)
    assert any(line.startswith("wrote model.int8.onnx (") for line in lines)
    assert lines[-1] == "next: admth-export verify model.int8.onnx"


def test_json_from_another_folder(cnnf, pictures, tmp_path):
    (tmp_path / "models").mkdir()
    shutil.copy(cnnf, tmp_path / "models" / "net.onnx")
    done = run_cli(
        tmp_path / "models" / "net.onnx",
        *("--data", f"folder:{pictures}", "--target", "both", "--all-int8", "--check-images", 4, *FAST),
        *("--keep-fp32", "trunk.conv1,attention", "--json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert [item["target"] for item in found] == ["cpu", "tensorrt"]
    for fields, name in zip(found, ("net.int8.onnx", "net.int8.trt.onnx"), strict=True):
        assert fields["model"] == str(tmp_path / "models" / name)
        assert fields["sha256"] == sha256_of_file(tmp_path / "models" / name)
        assert fields["bytes"] == (tmp_path / "models" / name).stat().st_size
        assert fields["calibration"]["kept_fp32"] == ["trunk.conv1", "attention.squeeze", "attention.excite"]
        assert set(fields["calibration"]["kept_fp32"]) < set(fields["kept"])
        assert fields["calibration"]["predicted"]["images"] == 4
        assert (fields["report"], fields["pictures"]) == (None, [])
        assert "gates" not in fields["calibration"]
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_a_gate_that_cannot_be_met(cnnf, pictures, tmp_path):
    data = ("--data", f"folder:{pictures}", "--check-images", 8, *FAST)
    fails(
        run_cli(cnnf, *data, "--max-latency-ratio", "0.001", "--out", tmp_path / "m.onnx"),
        "no INT8 model for cpu meets the gates, and nothing is written",
        "of FP32 misses 0.001 by",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_nothing(lite, pictures, tmp_path, number):
    shutil.copy(lite, tmp_path / "model.onnx")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "admth_calibration", "--data", f"folder:{pictures}", "--target", "both"],
        cwd=tmp_path,
        env={**ENVIRONMENT, "TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    deadline = time.monotonic() + 120
    while not any(scratch.glob("admth-*")):  # it is inside: a probed model is being written or run
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert output == ""
    assert errors.splitlines()[-1] == "error: interrupted: nothing half-written was left behind"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "scratch"]
    assert list(scratch.glob("admth-*")) == []


def test_help_imports_nothing_heavy():
    program = (
        "import atexit, sys\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'PIL', 'matplotlib'}\n"
        "atexit.register(lambda: print('LOADED', sorted(heavy & set(sys.modules))))\n"
        "from admth_calibration.cli import main\n"
        "main()\n"
    )
    for word in ("--help", "--version"):
        done = subprocess.run([sys.executable, "-c", program, word], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "LOADED []" in done.stdout


def test_bad_input(cnnf, pictures, tmp_path):
    data = ("--data", f"folder:{pictures}")
    out = ("--out", tmp_path / "m.onnx")
    fails(run_cli(cnnf), "needs images for its ranges: pass --data")
    fails(run_cli(cnnf, *data, "--target", "gpu"), "target 'gpu' is unknown: use cpu, trt or both")
    fails(run_cli(cnnf, *data, "--min-bit-parity", "99.5"), "--min-bit-parity 99.5 is not above 0 and at most 1")
    fails(run_cli(cnnf, *data, "--all-int8", "--min-bit-parity", "0.99"), "exclude each other")
    fails(run_cli(cnnf, "--data", "folder:/no/such"), "/no/such does not exist")
    fails(run_cli(*data, cwd=tmp_path), "model.onnx: no such model file")
    fails(run_cli(cnnf, *data, "--out", cnnf), "it is the model itself")
    fails(run_cli(cnnf, *data, *out, "--target", "both"), "names one file and --target both makes two")
    fails(run_cli(cnnf, *data, *out, "--keep-fp32", "trunk.conv9"), "matches no layer: name one such as trunk.conv")
    fails(run_cli(cnnf, *data, *out, "--check-data", "pictures"), "names no images")
    fails(run_cli(cnnf, *data, *out, "--min-map-ratio", "0.99"), "needs labels")
    assert list(tmp_path.iterdir()) == []
