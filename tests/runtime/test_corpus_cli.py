"""``admth-run encode SOURCE --out FOLDER`` as its users meet it: killed, interrupted, twice at once, on a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from _corpus import command, fails, make_pictures, part_files, run, succeeds
from PIL import Image

from admth_runtime.corpus import read_corpus


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_path) -> Path:
    """A folder with a model, 60 small pictures, and 120 names of a picture that takes 50 ms to decode."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "model.onnx").symlink_to(tiny_path)
    make_pictures(folder / "pictures", 60)
    (folder / "large").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "large" / "000.png", compress_level=1)
    for copy in range(1, 120):
        (folder / "large" / f"{copy:03}.png").hardlink_to(folder / "large" / "000.png")
    return folder


def started(home: Path, out: Path, *arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        command("encode", "large", "--out", out, "--shard-size", 4, "--batch", 2, "--workers", 2, *arguments),
        cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for_parts(out: Path, count: int) -> None:
    end = time.monotonic() + 60
    while len(list(out.glob("part-*.parquet"))) < count:
        assert time.monotonic() < end
        time.sleep(0.02)


def workers_of(process: subprocess.Popen) -> list[int]:
    """The process ids of a command's workers."""
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


class TestWhatItPrints:
    def test_lines(self, home, tmp_path):
        done = succeeds("encode", "pictures", "--out", tmp_path / "c", "--shard-size", 25, cwd=home)
        wrote, following = done.stdout.splitlines()
        assert wrote.startswith(f"wrote {tmp_path}/c: 60 images in 3 parts, codes of 16, 32, 48 and 64 bits, ")
        assert wrote.endswith(" images/s")
        assert following == f"next:  admth-run search QUERY.jpg --index {tmp_path}/c --model model.onnx"
        assert done.stderr == ""
        again = succeeds("encode", "pictures", "--out", tmp_path / "c", cwd=home)
        assert again.stdout.splitlines()[0].endswith("; all was encoded already")

    def test_json_info_and_search(self, home, tmp_path):
        bad = tmp_path / "bad.png"
        bad.write_bytes(b"")
        done = succeeds("encode", "pictures", bad, "--out", tmp_path / "c", "--max-error-rate", 0.1, "--json", cwd=home)
        summary = json.loads(done.stdout)
        assert (summary["images"], summary["errors"], summary["images_encoded"]) == (61, 1, 61)
        facts = json.loads(succeeds("info", tmp_path / "c", "--json").stdout)
        assert (facts["encoded"], facts["errors"], facts["complete"]) == (60, 1, True)
        found = succeeds("search", "pictures/0007.png", "--index", tmp_path / "c", "-k", 1, "--json", cwd=home)
        assert json.loads(found.stdout)["hits"][0]["uri"] == "pictures/0007.png"

    def test_a_progress_bar_on_a_terminal(self, home, tmp_path):
        """With script(1), which gives the command a terminal of its own."""
        line = " ".join(command("encode", "pictures", "--out", tmp_path / "c", "--workers", 1))
        done = subprocess.run(
            ["script", "-qec", line, "/dev/null"], cwd=home, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0
        assert "encoding" in done.stdout
        assert "60/60" in done.stdout

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("none",), "none: no such file or folder"),
            (("pictures", "-m", "none.onnx"), "none.onnx: no such model file"),
            (("pictures", "--workers", "0"), "workers 0 is not a positive integer"),
            (("pictures", "--device", "tpu"), "device 'tpu' is unknown"),
            (("pictures", "--ray", "127.0.0.1:1"), "there is no Ray cluster at '127.0.0.1:1' (Connection refused)"),
            (("pictures", "--out", "c.npz", "--workers", "2"), "--workers is for a corpus"),
            (("pictures", "--out", "c.npz", "--restart"), "--restart is for a corpus"),
            (("pictures", "--out", "c.npz", "--ray"), "--ray is for a corpus"),
        ],
    )
    def test_bad_arguments(self, home, tmp_path, arguments, message):
        out = () if "--out" in arguments else ("--out", tmp_path / "c")
        fails(message, "encode", *arguments, *out, cwd=home)
        assert not list((tmp_path).glob("c/part-*"))
        assert not (home / "c.npz").exists()


class TestInterruption:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_it_stops_at_once_and_can_be_gone_on_with(self, home, tmp_path, number):
        out = tmp_path / "c"
        process = started(home, out)
        wait_for_parts(out, 1)
        workers = workers_of(process)
        assert len(workers) == 2
        begin = time.monotonic()
        process.send_signal(number)
        output, errors = process.communicate(timeout=30)
        assert time.monotonic() - begin < 5
        assert process.returncode == 130
        whole, interrupted = errors.splitlines()
        parts = len(list(out.glob("part-*.parquet")))
        assert whole == f"{parts} of 30 parts in {out} are whole; the same command goes on from there"
        assert interrupted == "error: interrupted: nothing half-written was left behind"
        assert output == ""
        assert not list(out.glob(".*.tmp.*"))
        assert len(read_corpus(out, allow_incomplete=True)) == 4 * parts
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)

    def test_a_killed_worker_is_replaced(self, home, tmp_path):
        out = tmp_path / "c"
        process = started(home, out)
        wait_for_parts(out, 1)
        for worker in workers_of(process):
            os.kill(worker, signal.SIGKILL)
        output, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
        assert output.startswith(f"wrote {out}: 120 images in 30 parts")
        assert len(read_corpus(out)) == 120

    def test_workers_end_with_a_killed_parent_and_the_lock_is_free(self, home, tmp_path):
        out = tmp_path / "c"
        process = started(home, out)
        wait_for_parts(out, 1)
        workers = workers_of(process)
        fails(f"is being written by process {process.pid} on ", "encode", "large", "--out", out, cwd=home)
        process.kill()
        process.wait()
        end = time.monotonic() + 10
        while any(_alive(worker) for worker in workers):
            assert time.monotonic() < end
            time.sleep(0.05)
        process.stdout.close()
        process.stderr.close()

    def test_a_shard_that_kills_every_worker_is_named(self, home, tmp_path):
        """A library that ends the process stands for an image that makes a decoder crash."""
        (tmp_path / "sitecustomize.py").write_text(
            "import os, sys\n"
            "if 'corpus.worker' in ' '.join(sys.orig_argv):\n"
            "    import builtins\n    real = builtins.open\n"
            "    def opened(file, *rest, **more):\n"
            "        if str(file).endswith('0031.png'):\n            os.abort()\n"
            "        return real(file, *rest, **more)\n"
            "    builtins.open = opened\n"
        )
        done = fails(
            "3 workers died on shard 1, images 20 to 39 of the listing (the last was killed by SIGABRT)",
            "encode", "pictures", "--out", tmp_path / "c", "--shard-size", 20, "--workers", 1, cwd=home,
            PYTHONPATH=f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        assert [path.name for path in (tmp_path / "c").glob("part-*.parquet")] == ["part-00000.parquet"]


class TestFullDisk:
    def test_nothing_is_half_written_and_it_goes_on(self, home, tmp_path):
        """A limit on the size of files gives the error that a full disk gives, in the middle of writing a part."""
        script = (
            "import resource, signal\nfrom admth_runtime.cli import main\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (7000, 7000))\nmain()\n"
        )
        arguments = ["encode", "pictures", "--out", str(tmp_path / "c"), "--logits", "--shard-size", "20"]
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], cwd=home, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith(f"error: cannot write {tmp_path}/c/part-0000")
        assert not list((tmp_path / "c").glob(".*.tmp.*"))
        assert not list((tmp_path / "c").glob("part-*.parquet"))
        succeeds(*arguments, cwd=home)
        assert len(read_corpus(tmp_path / "c")) == 60

    @pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
    def test_on_a_file_system_that_is_full(self, home, tmp_path):
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip("this container may not mount")
        try:
            fails("the disk is full; free space", "encode", "pictures", "--out", disk / "c", "--logits", "--shard-size",
                  20, cwd=home)  # fmt: skip
            assert not list((disk / "c").glob(".*.tmp.*"))
            whole = len(list((disk / "c").glob("part-*.parquet")))
            assert len(read_corpus(disk / "c", allow_incomplete=True)) == 20 * whole
            subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
            succeeds("encode", "pictures", "--out", disk / "c", "--logits", "--shard-size", 20, cwd=home)
            assert len(read_corpus(disk / "c")) == 60
        finally:
            subprocess.run(["umount", disk], check=True)


def test_a_script_without_a_main_guard_may_encode(home, tmp_path):
    """Workers do not import the caller's main module, which would encode again."""
    script = (
        "from admth_runtime.corpus import CorpusOptions, encode_corpus\n"
        f"print(encode_corpus(['pictures'], 'model.onnx', {str(tmp_path / 'c')!r}, CorpusOptions(workers=2)).images)\n"
    )
    done = subprocess.run([sys.executable, "-"], input=script, cwd=home, capture_output=True, text=True, check=True)
    assert done.stdout == "60\n"


def test_the_same_from_a_list_on_another_day(home, tmp_path):
    """A list of the same paths gives the same parts as the folder, since the listing is the same."""
    names = sorted(str(path.relative_to(home)) for path in (home / "pictures").glob("*.png"))
    names += sorted(str(path.relative_to(home)) for path in (home / "pictures" / "sub").glob("*.png"))
    (tmp_path / "all.txt").write_text("\n".join(names))
    succeeds("encode", tmp_path / "all.txt", "--out", tmp_path / "a", "--shard-size", 25, cwd=home)
    succeeds("encode", "pictures", "--out", tmp_path / "b", "--shard-size", 25, "--workers", 1, cwd=home)
    assert part_files(tmp_path / "a") == part_files(tmp_path / "b")
    assert run("encode", "pictures", "--out", tmp_path / "a", cwd=home).returncode == 1


def _alive(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
