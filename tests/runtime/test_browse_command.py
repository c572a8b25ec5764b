"""``admth-run browse`` as a real process: starting, stopping, and what it says when it cannot."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from _browse_corpus import make_corpus

from admth_runtime.runtime import HashRuntime


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_path) -> Path:
    place = tmp_path_factory.mktemp("corpus")
    with HashRuntime(tiny_path, threads=1) as runtime:
        make_corpus(place, runtime).save(place / "codes.parquet")
    return place


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "admth_runtime", "browse", *map(str, arguments)]


@contextmanager
def started(folder: Path, *arguments):
    """A running server and its first line."""
    process = subprocess.Popen(
        command(*arguments), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.communicate()


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=20) as answer:
        content: bytes = answer.read()
        return content


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_starts_on_a_free_port_serves_and_stops_at_once(folder, tiny_path, number):
    with started(folder, "codes.parquet", "--model", tiny_path, "--port", "0") as (process, line):
        assert line.startswith("51 images at http://127.0.0.1:") and line.endswith("(Ctrl-C stops)\n")
        url = line.split()[3]
        assert b"<title>admth" in fetch(url)
        assert json.loads(fetch(f"{url}api/index"))["images"] == 51
        with socket.create_connection(("127.0.0.1", int(url.split(":")[2].strip("/")))):  # an idle connection
            process.send_signal(number)
            out, err = process.communicate(timeout=10)
        assert process.returncode == 0 and out == "" and err == "stopped\n"


def test_json_and_a_second_server_on_the_same_port(folder, tiny_path):
    with started(folder, "codes.parquet", "--model", tiny_path, "--port", "0", "--json") as (process, line):
        assert process.stdout is not None
        text = line
        while "}" not in text:
            text += process.stdout.readline()
        facts = json.loads(text)
        assert facts["images"] == 51 and facts["code_lengths"] == [16, 32, 48, 64]
        port = facts["url"].split(":")[2].strip("/")
        second = subprocess.run(
            command("codes.parquet", "--model", tiny_path, "--port", port),
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert second.returncode == 1 and second.stdout == ""
        assert second.stderr == (
            f"error: port {port} of 127.0.0.1 is in use: choose another with --port, or --port 0 for any that is free\n"
        )


def test_listening_beyond_loopback_is_warned_of(folder, tiny_path):
    with started(folder, "codes.parquet", "--model", tiny_path, "--port", "0", "--host", "0.0.0.0") as (process, line):
        assert "http://localhost:" in line
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    assert err.startswith("warning: there is no password: whoever reaches 0.0.0.0 sees the images")


def test_what_cannot_be_served_is_one_line(folder, tiny_path, tmp_path):
    (tmp_path / "empty.parquet").write_bytes(b"")
    for arguments, said in [
        (["absent.parquet", "--model", tiny_path], "error: absent.parquet"),
        ([tmp_path / "empty.parquet", "--model", tiny_path], f"error: {tmp_path / 'empty.parquet'} is empty"),
        (["codes.parquet", "--model", "absent.onnx"], "error: absent.onnx"),
        (["codes.parquet", "--model", tiny_path, "--root", "absent"], "error: --root absent is not a folder"),
        (["codes.parquet", "--model", tiny_path, "--upload-limit", "0"], "error: --upload-limit 0"),
    ]:
        done = subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1, arguments
        assert done.stderr.startswith(said) and done.stderr.count("\n") == 1 and done.stdout == ""
