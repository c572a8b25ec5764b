"""The wheel, and the environment of an edge device: the wheel with its extra ``cpu``, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from _rooms import REPOSITORY, FinishedRun, run

from admth_runtime import HashRuntime

UNREACHABLE = ("NewConnectionError", "ConnectionError", "Temporary failure in name resolution", "Connection refused",
               "Network is unreachable", "ProxyError", "ReadTimeoutError")  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from this checkout, with the build tools of the development environment."""
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(REPOSITORY)])
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_rooms_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    rooms = {name.split("/")[0] for name in names}
    assert rooms == {"admth_runtime", "admth_training", "admth_calibration", "admth_export"}
    for room in rooms:
        assert f"{room}/py.typed" in names
    allowed = (".py", "py.typed", ".jinja", ".css", ".html", ".js", ".svg")
    assert not [name for name in names if not name.endswith(allowed)]
    assert not [name for name in names if name.rsplit("/", 1)[-1].startswith(("test_", "conftest"))]
    assert {"admth_export/report/templates/report.css", "admth_export/report/templates/report.html.jinja"} <= set(names)
    source = {
        f"{room}/{path.relative_to(folder).as_posix()}"
        for room in rooms
        for folder in [next(REPOSITORY.glob(f"*/{room}"))]
        for path in folder.rglob("*.py")
    }
    assert source == {name for name in names if name.endswith(".py")}


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith("dist-info/METADATA")]
        text = archive.read(metadata).decode()
        assert any("licenses/LICENSE" in name for name in archive.namelist())
    assert "Name: admth\n" in text
    assert "License-Expression: Apache-2.0" in text
    base = [line for line in text.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert {line.split()[1].split(">")[0] for line in base} == {"numpy", "pillow", "typer", "rich"}


@pytest.fixture(scope="module")
def bare_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment with ``admth[cpu]`` from the wheel; without a package index there is nothing to test."""
    folder = tmp_path_factory.mktemp("bare") / "env"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    done = subprocess.run(
        [str(python), "-m", "pip", "install", "--quiet", "--retries", "1", f"{wheel}[cpu]"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 and any(sign in done.stderr for sign in UNREACHABLE):
        pytest.skip("the package index cannot be reached, so admth[cpu] cannot be installed")
    assert done.returncode == 0, done.stderr
    return python


@pytest.mark.slow
def test_the_bare_environment_has_no_training_packages(bare_python: Path) -> None:
    listed = json.loads(run([str(bare_python), "-m", "pip", "list", "--format", "json"]).stdout)
    names = {package["name"].lower() for package in listed}
    assert {"admth", "numpy", "pillow", "onnxruntime"} <= names
    assert not names & {"torch", "onnx", "onnxscript", "safetensors", "matplotlib", "pyarrow", "jinja2"}


@pytest.mark.slow
def test_the_bare_environment_gives_the_same_codes(
    bare_python: Path, finished_run: FinishedRun, tmp_path: Path
) -> None:
    pictures = sorted(finished_run.pictures.rglob("*.png"))[:20]
    with HashRuntime(finished_run.model, threads=1) as runtime:
        expected = runtime.encode(pictures)
    code = (
        "import sys\nfrom admth_runtime import HashRuntime, write_codes\nimport numpy as np\n"
        "with HashRuntime(sys.argv[1], threads=1) as runtime:\n    codes = runtime.encode(sys.argv[3:])\n"
        "np.savez(sys.argv[2], **{str(length): codes[length] for length in codes.code_lengths})\n"
        "assert not {'torch', 'onnx', 'admth_training', 'admth_export'} & set(sys.modules)\n"
    )
    out = tmp_path / "codes.npz"
    run([str(bare_python), "-c", code, str(finished_run.model), str(out), *map(str, pictures)], cwd=tmp_path)
    with np.load(out) as found:
        assert {int(length) for length in found} == set(expected.code_lengths)
        for length in expected.code_lengths:
            np.testing.assert_array_equal(found[str(length)], expected[length])


@pytest.mark.slow
def test_the_commands_of_the_bare_environment(bare_python: Path, finished_run: FinishedRun, tmp_path: Path) -> None:
    """``admth-run`` works; the other commands show their help and say what to install."""
    tools = bare_python.parent
    doctor = json.loads(run([str(tools / "admth-run"), "doctor", "--json"], cwd=tmp_path).stdout)
    assert doctor["engine_works"] is True
    out = tmp_path / "codes.npz"
    model, pictures = str(finished_run.model), str(finished_run.pictures)
    run([str(tools / "admth-run"), "encode", pictures, "--model", model, "--out", str(out)], cwd=tmp_path)
    assert out.is_file()
    for program, arguments, extra in (
        ("admth-train", ["fit", "--data", f"folder:{pictures}", "--out", "run"], "train"),
        ("admth-export", ["onnx", str(finished_run.folder)], "export"),
        ("admth-export", ["report", str(finished_run.folder)], "export"),
    ):
        assert "Usage" in run([str(tools / program), "--help"], cwd=tmp_path).stdout
        done = subprocess.run(
            [str(tools / program), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, (program, arguments, done)
        assert done.stderr.startswith("error: "), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert f"pip install 'admth[{extra}]'" in done.stderr or "pip install 'admth[train]'" in done.stderr, (
            done.stderr
        )
