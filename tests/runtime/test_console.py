from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from admth_runtime.console import parse_integers, track
from admth_runtime.errors import InputError, MissingExtraError, require

APP = """
import sys, time, typer
from admth_runtime.console import new_app, note, print_json, progress, run_app, say, warn
from admth_runtime.errors import InputError
app = new_app("Test.")

@app.command()
def bad(): raise InputError("line one\\nline two")

@app.command()
def bug(): raise RuntimeError("a bug")

@app.command()
def missing(): open("/no/such/file")

@app.command()
def status() -> int: return 3

@app.command()
def talk(number: int = 1):
    note("to stderr"); warn("two\\nlines"); print_json({"number": number})
    with progress("work", 2) as advance: advance(2)

@app.command()
def many():
    for number in range(100_000): say(str(number))

@app.command()
def sleep():
    say("ready"); sys.stdout.flush(); time.sleep(30)

run_app(app)
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", APP, *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_our_errors_are_one_line():
    done = run("bad")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: line one line two\n")


def test_system_errors_are_one_line():
    done = run("missing")
    assert (done.returncode, done.stderr) == (1, "error: /no/such/file: No such file or directory\n")


def test_bugs_keep_their_traceback():
    done = run("bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RuntimeError: a bug" in done.stderr


def test_a_commands_status_is_the_exit_code():
    assert run("status").returncode == 3


def test_results_go_to_stdout_and_notes_to_stderr():
    done = run("talk", "--number", "5")
    assert done.returncode == 0
    assert json.loads(done.stdout) == {"number": 5}
    assert done.stderr == "to stderr\nwarning: two lines\n"


@pytest.mark.parametrize("arguments", [("nope",), ("talk", "--nope"), ("talk", "--number", "x"), ("talk", "extra")])
def test_usage_errors_are_one_line_with_the_way_to_the_help(arguments):
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "--help" in done.stderr


def test_version():
    done = run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("admth ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption(number):
    process = subprocess.Popen([sys.executable, "-c", APP, "sleep"], stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "error: interrupted: nothing half-written was left behind"
    assert "Traceback" not in errors


def test_a_reader_that_has_enough():
    reader, writer = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", APP, "many"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert os.read(reader, 1) == b"0"
    os.close(reader)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, "")


def test_track_passes_items_through():
    assert list(track([1, 2, 3], "work")) == [1, 2, 3]
    assert list(track(iter("ab"), "work")) == ["a", "b"]


def test_parse_integers():
    assert parse_integers("16, 32,64,", name="--lengths") == (16, 32, 64)
    with pytest.raises(InputError, match="--lengths '16;32' is not a list"):
        parse_integers("16;32", name="--lengths")


def test_require():
    assert require("json", extra="x", purpose="testing") is json
    with pytest.raises(MissingExtraError, match=r"testing needs the package no_such_package.*pip install 'admth\[x\]'"):
        require("no_such_package", extra="x", purpose="testing")


def test_require_a_package_that_is_broken(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError, match="installed but fails to import"):
        require("broken_package", extra="x", purpose="testing")


def test_an_interruption_while_native_code_loads_is_no_broken_package(tmp_path, monkeypatch):
    """Extension modules turn it into an ImportError of their own, with the interruption as its cause."""
    text = (
        "try:\n    raise KeyboardInterrupt\nexcept KeyboardInterrupt as error:\n    raise ImportError('x') from error\n"
    )
    (tmp_path / "slow_package.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        require("slow_package", extra="x", purpose="testing")
