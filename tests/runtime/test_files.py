from __future__ import annotations

import hashlib
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from admth_runtime.errors import OutputError
from admth_runtime.files import (
    atomic_path,
    check_target,
    make_folder,
    sha256_of_bytes,
    sha256_of_file,
    write_bytes,
    write_json,
    write_text,
)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_under_its_own_name(tmp_path):
    target = tmp_path / "a.npz"
    with atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".npz"
        temporary.write_bytes(b"new")
        assert not target.exists()
    assert target.read_bytes() == b"new"
    assert listing(tmp_path) == ["a.npz"]


def test_the_mode_is_that_of_an_ordinary_file(tmp_path):
    write_bytes(tmp_path / "ours", b"x")
    (tmp_path / "plain").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_any_exception_keeps_what_was_there(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert listing(tmp_path) == ["a.txt"]


def test_folders_devices_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(OutputError, match="it is a folder"):
        write_text(tmp_path, "x")
    with pytest.raises(OutputError, match="device or a pipe"):
        write_text("/dev/null", "x")
    with pytest.raises(OutputError, match="folder does not exist"):
        write_text(tmp_path / "none" / "a.txt", "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"cannot write .*file/a\.txt"):
        write_text(tmp_path / "file" / "a.txt", "x")
    with pytest.raises(OutputError, match="cannot create the folder"):
        make_folder(tmp_path / "file" / "sub")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o555)
    try:
        for attempt in (check_target, lambda path: write_text(path, "x")):
            with pytest.raises(OutputError, match="permission denied"):
                attempt(tmp_path / "a.txt")
    finally:
        tmp_path.chmod(0o755)


def test_a_file_that_outgrows_its_limit_leaves_nothing(tmp_path):
    script = (
        "import resource, signal, sys\n"
        "from admth_runtime.errors import OutputError\n"
        "from admth_runtime.files import write_bytes\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_bytes(sys.argv[1], bytes(5000))\n"
        "except OutputError as error:\n    print(error)\n"
    )
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    command = [sys.executable, "-c", script, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "grows beyond the allowed size" in done.stdout
    assert target.read_bytes() == b"old"
    assert listing(tmp_path) == ["a.bin"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_named(tmp_path):
    def fill(temporary: Path) -> None:
        temporary.write_bytes(b"x")
        with Path("/dev/full").open("wb") as full:  # every write to it fails with ENOSPC
            full.write(b"x")

    with pytest.raises(OutputError, match="the disk is full"), atomic_path(tmp_path / "a") as temporary:
        fill(temporary)
    assert listing(tmp_path) == []


def test_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert listing(tmp_path) == []


def test_digests(tmp_path):
    content = os.urandom(3_000_000)
    (tmp_path / "a").write_bytes(content)
    assert sha256_of_file(tmp_path / "a") == sha256_of_bytes(content) == hashlib.sha256(content).hexdigest()


def test_make_folder_accepts_one_that_is_there(tmp_path):
    assert make_folder(tmp_path / "a" / "b") == make_folder(tmp_path / "a" / "b")
