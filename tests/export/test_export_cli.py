"""``admth-export`` as users run it: real processes, one line for each bad input, nothing left behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2", "COLUMNS": "200"}


def run_cli(*arguments, cwd=None, limit=None):
    return subprocess.run(
        [sys.executable, "-m", "admth_export", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=ENVIRONMENT,
        timeout=120,
        preexec_fn=limit,
        check=False,
    )


def fails(done, *parts):
    """The process says one line, exits 1, and prints no result."""
    assert done.returncode == 1, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert done.stdout == ""
    for part in parts:
        assert part in lines[0]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("arguments", [["--help"], ["onnx", "--help"], ["verify", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    program = (
        "import atexit, sys\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy'}\n"
        "atexit.register(lambda: print('LOADED', sorted(heavy & set(sys.modules))))\n"
        "from admth_export.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stdout
    assert done.stderr == ""


def test_the_bare_commands_work_in_a_runs_folder(tiny_run):
    done = run_cli("onnx", cwd=tiny_run)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert names(tiny_run) == [
        "config.json",
        "model.onnx",
        "model.parity.json",
        "model.parity.png",
        "model.safetensors",
    ]
    assert "sign parity with PyTorch on 24 of 24 query images" in done.stdout
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if "100.00 %" in line] == ["8", "16"]
    assert any(line.startswith("wrote model.onnx (") for line in lines)
    assert "wrote model.parity.json and model.parity.png" in lines
    assert lines[-2] == "next: admth-run encode IMAGES --model model.onnx --out codes.npz"
    before = (tiny_run / "model.onnx").read_bytes()

    checked = run_cli("verify", "model.onnx", "--json", "--images", "9", "--database-images", "0", cwd=tiny_run)
    assert checked.returncode == 0, checked.stderr
    report = json.loads(checked.stdout)
    assert report["passed"] is True
    assert report["images"]["images"] == 9
    assert report["retrieval"] is None
    assert (report["report"], report["picture"]) == ("model.parity.json", "model.parity.png")
    assert (tiny_run / "model.onnx").read_bytes() == before


def test_json_out_and_no_verify(tiny_run, tmp_path):
    out = tmp_path / "elsewhere.onnx"
    done = run_cli("onnx", tiny_run, "--out", out, "--no-verify", "--json", "--opset", 21)
    assert done.returncode == 0, done.stderr
    fields = json.loads(done.stdout)
    assert fields["model"] == str(out)
    assert fields["parity"] is None
    assert fields["bytes"] == out.stat().st_size
    assert names(tmp_path) == ["elsewhere.onnx", "run"]
    assert names(tiny_run) == ["config.json", "model.safetensors"]
    # The candidate's folder is no run, so the run has to be named.
    fails(run_cli("verify", out), "holds no config.json", "name the run with --run")


def test_a_failed_verification_writes_its_report_and_exits_1(exported, tmp_path):
    model = tmp_path / "copy.onnx"
    shutil.copy(exported / "model.onnx", model)
    run = tmp_path / "other"
    shutil.copytree(exported, run)
    _negate_weights(run / "model.safetensors")
    fails(run_cli("verify", model, "--run", run), "came from other weights", "--any-checkpoint")
    report = tmp_path / "report.json"
    arguments = ["verify", model, "--run", run, "--any-checkpoint", "--database-images", "0", "--out", report]
    done = run_cli(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "fails the parity gate" in done.stderr
    assert str(report) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert json.loads(report.read_text())["passed"] is False
    assert names(tmp_path) == ["copy.onnx", "other", "report.json", "report.png"]


def _negate_weights(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.startswith("branches.") and name.endswith(".3.weight"):
            tensors[name] = -tensor
    save_file(tensors, path)


def test_bad_runs(tiny_run, tmp_path):
    fails(run_cli("onnx", tmp_path / "nowhere"), "nowhere is not a run's folder", "admth-train fit")
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(run_cli("onnx", cwd=empty), ". is not a run's folder")
    shutil.copytree(tiny_run, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "model.safetensors").unlink()
    fails(run_cli("onnx", tmp_path / "unfinished"), "holds no model.safetensors", "--resume")
    mismatched = tmp_path / "mismatched"
    shutil.copytree(tiny_run, mismatched)
    config = json.loads((mismatched / "config.json").read_text())
    config["network"]["hidden"] = 24
    (mismatched / "config.json").write_text(json.dumps(config))
    fails(run_cli("onnx", mismatched), "the weights are not those of config.json")
    truncated = tmp_path / "truncated"
    shutil.copytree(tiny_run, truncated)
    content = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(content[: len(content) // 2])
    fails(run_cli("onnx", truncated), "is not a complete safetensors file")
    for folder in (empty, mismatched, truncated):
        assert not [name for name in names(folder) if "onnx" in name]


def test_bad_outputs(tiny_run, tmp_path):
    fails(run_cli("onnx", tiny_run, "--out", tmp_path / "model.bin"), "a model's name ends with .onnx")
    fails(run_cli("onnx", tiny_run, "--out", tmp_path / "no" / "model.onnx"), "its folder does not exist")
    assert not (tmp_path / "no").exists()
    fails(run_cli("onnx", tiny_run, "--out", tiny_run / "config.json" / "m.onnx"), "cannot write", "m.onnx")
    taken = tmp_path / "taken.onnx"
    taken.mkdir()
    fails(run_cli("onnx", tiny_run, "--out", taken), "it is a folder")
    fails(run_cli("verify", taken), "taken.onnx")

    def full_disk():
        # Writing past the limit fails like a full disk, once the signal of the limit is ignored.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    fails(run_cli("onnx", tiny_run, limit=full_disk), "cannot write", "model.onnx")
    assert names(tiny_run) == ["config.json", "model.safetensors"]


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="needs a folder that not even root may write into")
def test_a_folder_without_permission(tiny_run):
    fails(run_cli("onnx", tiny_run, "--out", "/sys/model.onnx"), "cannot write /sys/model.onnx", "--out")


def test_bad_arguments_and_data(tiny_run, exported, tmp_path, pictures):
    fails(run_cli("onnx", tiny_run, "--opset", 12), "opset 12 is not from 18 to 23")
    fails(run_cli("onnx", tiny_run, "--images", 0), "images 0 is not an integer from 1")
    fails(run_cli("onnx", tiny_run, "--noise-threshold", -1), "noise threshold -1.0")
    fails(run_cli("onnx", tiny_run, "--min-bit-parity", 2), "minimum bit parity 2.0 is not from 0 to 1")
    fails(run_cli("onnx", tiny_run, "--data", "folder:/no/such"), "/no/such does not exist")
    fails(run_cli("onnx", tiny_run, "--data", "pictures"), "names no kind")
    moved = json.loads((tiny_run / "config.json").read_text())
    moved["data"]["spec"] = f"folder:{tmp_path / 'gone'}"
    (tiny_run / "config.json").write_text(json.dumps(moved))
    fails(run_cli("onnx", tiny_run), "gone does not exist", "name it with --data")
    assert names(tiny_run) == ["config.json", "model.safetensors"]
    fails(run_cli("verify", exported / "model.onnx", "--device", "tpu"), "device 'tpu' is unknown")
    fails(run_cli("verify", exported / "model.onnx", "--out", tmp_path / "report"), "a report's name ends with .json")
    fails(run_cli("nonsense"), "--help")


def test_bad_candidates(exported, tmp_path):
    fails(run_cli("verify", tmp_path / "absent.onnx"), "absent.onnx")
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"ftrt" + bytes(64))
    fails(run_cli("verify", plan), "model.plan has no sidecar model.plan.json", "an engine is executable code")
    (tmp_path / "text.onnx").write_text("hello")
    fails(run_cli("verify", tmp_path / "text.onnx"), "text.onnx")
    truncated = tmp_path / "truncated.onnx"
    truncated.write_bytes((exported / "model.onnx").read_bytes()[:5000])
    fails(run_cli("verify", truncated), "truncated.onnx")


@pytest.mark.parametrize("stage", ["graph", "engine"])
def test_ctrl_c_leaves_nothing(tiny_run, tmp_path, stage):
    arguments = [sys.executable, "-m", "admth_export", "onnx", str(tiny_run)]
    process = subprocess.Popen(
        arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    try:
        _wait_for(lambda: list(tiny_run.glob(".model.*.tmp.onnx")), process)
        children = []
        if stage == "engine":
            _wait_for(lambda: _children(process.pid), process)
            children = _children(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert err.strip().splitlines()[-1] == "error: interrupted: nothing half-written was left behind"
    assert "Traceback" not in err
    assert names(tiny_run) == ["config.json", "model.safetensors"]
    assert not [pid for pid in children if Path("/proc", pid).exists()]


def _children(pid):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [
            child for child in children if b"admth_export.candidate" in Path("/proc", child, "cmdline").read_bytes()
        ]
    except OSError:
        return []


def _wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
