"""Machines without a driver, or with a broken one, in real processes: an error of one line, and never a crash."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _tensorrt_double import save_engine

from admth_runtime.driver import ask_driver

pytestmark = pytest.mark.skipif(
    ask_driver().driver or not sys.platform.startswith("linux"), reason="this machine has an NVIDIA driver, or no Linux"
)


def run(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "admth_runtime", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("flavour", ["rtx", "tensorrt"])
@pytest.mark.parametrize("compatible", [False, True])
def test_no_driver(tmp_path, flavour, compatible):
    """With the real packages installed, where they are: TensorRT's lean runtime would crash if it were asked."""
    version = "1.7.1.116" if flavour == "rtx" else "11.4.0.106"
    path = save_engine(tmp_path, flavour, version, changes={"version_compatible": compatible})
    done = run("bench", path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"error: {path.name} needs an NVIDIA GPU: no NVIDIA driver; install or repair the driver and check it with  "
        "nvidia-smi , or run an ONNX model with device='cpu'\n"
    )


@pytest.fixture(params=["not a library", "another library"])
def broken(request, tmp_path):
    """A file by the driver's name that is something else."""
    folder = tmp_path / "lib"
    folder.mkdir()
    target = folder / "libcuda.so.1"
    if request.param == "not a library":
        target.write_bytes(b"hello")
        return folder, "cannot be loaded"
    import _struct

    if not getattr(_struct, "__file__", None):
        pytest.skip("no shared library at hand")
    shutil.copy(Path(_struct.__file__), target)
    return folder, "is another one or broken"


def test_a_broken_driver(tmp_path, broken):
    folder, message = broken
    done = run("bench", save_engine(tmp_path), LD_LIBRARY_PATH=str(folder))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_doctor_says_so(broken):
    folder, message = broken
    done = run("doctor", "--json", LD_LIBRARY_PATH=str(folder))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert message in facts["cuda"]["problem"]
    assert all(not flavour["usable"] and message in flavour["problem"] for flavour in facts["tensorrt"])
