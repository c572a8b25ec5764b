"""The Makefile's own logic, such as its checks before it installs, and the demo's script without its minutes."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from _rooms import COMMANDS, REPOSITORY, run

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "-C", str(REPOSITORY), *arguments, *(f"{name}={value}" for name, value in variables.items())],
        cwd=cwd,
        # What an outer make, such as that of `make test`, says to its own children is not for this one.
        env={name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))},
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_lists_the_targets(tmp_path: Path) -> None:
    printed = make("help", cwd=tmp_path).stdout
    for target in ("demo", "test", "test-gpu", "bench", "bench-int8", "lint", "clean"):
        assert f"make {target} " in printed


def test_an_old_or_missing_python_is_named(tmp_path: Path) -> None:
    done = make("demo", cwd=tmp_path, PYTHON="no-such-python", VENV=str(tmp_path / "venv"))
    assert done.returncode != 0
    assert "no-such-python is missing or older than Python 3.10: run  make PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


def fake_python(folder: Path, *, passes: str) -> Path:
    """Write a python3 that refuses every check whose code does not contain a text."""
    script = folder / "python3"
    script.write_text(f'#!/bin/sh\ncase "$*" in *"{passes}"*) exit 0;; esac\nexit 1\n')
    script.chmod(0o755)
    return script


def test_a_missing_venv_module_is_named(tmp_path: Path) -> None:
    python = fake_python(tmp_path, passes="version_info")
    done = make("test", cwd=tmp_path, PYTHON=str(python), VENV=str(tmp_path / "venv"))
    assert done.returncode != 0
    assert "has no venv module: install it (on Debian and Ubuntu the package python3-venv)" in done.stderr


def test_an_interrupted_installation_is_done_again(tmp_path: Path) -> None:
    """The stamp comes last: without it the environment is made and filled again, and with it nothing happens."""
    stamp = tmp_path / "venv" / ".admth-installed"
    dry = ("--dry-run", "lint")
    assert "pip install" in make(*dry, cwd=tmp_path, VENV=str(tmp_path / "venv")).stdout
    stamp.parent.mkdir()
    stamp.touch()
    assert "pip install" not in make(*dry, cwd=tmp_path, VENV=str(tmp_path / "venv")).stdout
    os.utime(stamp, (0, 0))  # older than pyproject.toml
    assert "pip install" in make(*dry, cwd=tmp_path, VENV=str(tmp_path / "venv")).stdout


@pytest.fixture
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", REPOSITORY / "examples" / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_runs_commands_that_exist(demo: ModuleType) -> None:
    """Every option of every stage is one that the command has."""
    for _, line in demo.STAGES:
        program, *words = shlex.split(line)
        if program == "python":
            assert (REPOSITORY / words[0]).is_file()
            continue
        shown = run([sys.executable, "-m", COMMANDS[program], words[0], "--help"]).stdout
        for option in (word for word in words if word.startswith("-")):
            assert option in shown, f"{line}: no {option}"


def test_the_demo_query_is_one_of_its_images(demo: ModuleType, tmp_path: Path) -> None:
    printed = run(
        [sys.executable, str(REPOSITORY / "examples/unpack_images.py"), str(REPOSITORY / demo.DATA), str(tmp_path)]
    )
    assert "wrote 6,000 PNG files" in printed.stdout
    assert (tmp_path / Path(demo.QUERY).relative_to(f"{demo.RUN}/images")).is_file()
    assert len(list((tmp_path / "train").rglob("*.png"))) == 5000


def test_the_demo_stops_at_the_first_failure(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "REPOSITORY", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "STAGES", (("Fail", "python -c 'raise SystemExit(3)'"), ("Never", "python -c 1")))
    assert demo.main() == 3
    printed = capfd.readouterr()
    assert "[1/2] Fail\n$ python -c" in printed.out
    assert "Never" not in printed.out
    assert "stopped at stage 1" in printed.err


def test_ci_runs_make_test_and_keeps_its_exit_code(tmp_path: Path) -> None:
    """``.ci/run`` works from any folder, and fails where ``make`` fails."""
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "make").write_text('#!/bin/sh\necho "make $* in $(pwd)"\nexit 7\n')
    (fake / "make").chmod(0o755)
    done = subprocess.run(
        ["bash", str(REPOSITORY / ".ci" / "run")],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{fake}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7
    assert done.stdout == f"make test in {REPOSITORY}\n"
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)
