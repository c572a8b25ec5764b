"""``admth-run stream`` and the two examples for the edge, as real processes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from _tiny_model import save_tiny_model
from _videos import scenes, write_video
from PIL import Image

from admth_runtime import HashRuntime, read_codes

EXAMPLES = Path(__file__).parents[2] / "examples"
RUN = [sys.executable, "-m", "admth_runtime", "stream"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a model, a video of five scenes, and pictures."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "model.onnx")
    write_video(folder / "clip.mp4", scenes(50), codec="libx264")
    (folder / "pictures" / "sub").mkdir(parents=True)
    for number in range(12):
        picture(folder / "pictures" / ("sub" if number % 3 == 0 else ".") / f"{number:02}.png", number)
    return folder


def picture(path: Path, seed: int) -> Path:
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(np.repeat(np.repeat(cells, 10, axis=0), 10, axis=1)).save(path)
    return path


def stream(*arguments: object, cwd: Path, code: int = 0, **options) -> subprocess.CompletedProcess:
    command = [*RUN, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=cwd, **options)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def fails(message: str, *arguments: object, cwd: Path, **options) -> subprocess.CompletedProcess:
    done = stream(*arguments, cwd=cwd, code=1, **options)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], done.stderr
    return done


def start(*arguments: object, cwd: Path) -> subprocess.Popen:
    command = [*RUN, *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


class TestStream:
    def test_a_video_to_json_lines(self, home):
        done = stream("clip.mp4", "--every", 5, cwd=home)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert [line["id"] for line in lines] == list(range(10))
        assert [line["uri"] for line in lines[:2]] == ["clip.mp4#t=0.000000", "clip.mp4#t=0.200000"]
        assert {"16", "32", "48", "64"} == set(lines[0]["codes"])
        assert done.stderr.startswith("10 frames encoded, ")

    def test_pictures_give_the_codes_of_encode(self, home):
        done = stream("pictures", "--batch", 3, "--policy", "block", cwd=home)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        with HashRuntime(home / "model.onnx", device="cpu", threads=1) as runtime:
            codes = runtime.encode([home / line["uri"] for line in lines])
        assert [line["codes"]["64"] for line in lines] == codes.hex(64) and len(lines) == 12

    def test_a_pattern_to_parquet_from_another_folder(self, home, tmp_path):
        done = stream(
            str(home / "pictures" / "*.png"), "-m", home / "model.onnx", "-o", "out.parquet", "--json", cwd=tmp_path
        )
        facts = json.loads(done.stdout)
        assert facts["delivered"] == facts["frames"] == len(read_codes(tmp_path / "out.parquet")) == 8
        assert facts["out"] == "out.parquet" and facts["stages"]["infer"]["frames"] == 8

    def test_limit_and_numbered_files_that_go_on(self, home, tmp_path):
        for _ in range(2):
            options = ("-m", home / "model.onnx", "-o", tmp_path / "codes", "--rows-per-file", 10, "--limit", 15)
            assert "wrote" in stream(home / "clip.mp4", *options, "--batch", 5, cwd=home).stdout
        ids = np.concatenate([read_codes(path).ids for path in sorted((tmp_path / "codes").glob("*.parquet"))])
        assert ids.tolist() == list(range(30))

    def test_a_bad_picture_is_a_line_with_its_error(self, home, tmp_path):
        (tmp_path / "bad.png").write_text("no picture")
        picture(tmp_path / "good.png", 1)
        lines = stream(tmp_path, "-m", home / "model.onnx", cwd=home).stdout.splitlines()
        assert json.loads(lines[0])["error"] == "is not an image that Pillow can read"
        assert "codes" in json.loads(lines[1])
        fails("none of 1 frames could be encoded", tmp_path / "bad.png", "-m", home / "model.onnx", cwd=home)

    def test_a_reader_that_has_enough(self, home):
        process = start("clip.mp4", "--batch", 1, cwd=home)
        assert json.loads(process.stdout.readline())["id"] == 0
        process.stdout.close()
        assert process.wait(30) == 0
        assert "Traceback" not in process.stderr.read()
        process.stderr.close()

    def test_ctrl_c_on_a_watch_completes_the_file(self, home, tmp_path):
        picture(tmp_path / "0.png", 0)
        arguments = (tmp_path, "--watch", "--settle", 0.1, "-m", home / "model.onnx", "-o", tmp_path / "c.parquet")
        with start(*arguments, cwd=home) as process:
            deadline = time.monotonic() + 30
            while not list(tmp_path.glob(".c.*")) and time.monotonic() < deadline:
                time.sleep(0.02)  # until the file has been begun
            picture(tmp_path / "1.png", 1)
            time.sleep(1.8)
            process.send_signal(signal.SIGINT)
            out, error = process.communicate(timeout=20)
        assert process.returncode == 130, error
        assert "interrupted" in error and "wrote" in out
        assert {Path(uri).name for uri in read_codes(tmp_path / "c.parquet").uris} == {"0.png", "1.png"}
        assert not list(tmp_path.glob(".*"))

    def test_a_watch_that_nothing_comes_to_ends(self, home, tmp_path):
        picture(tmp_path / "0.png", 0)
        arguments = ("--watch", "--settle", 0.1, "--idle-timeout", 0.8, "-m", home / "model.onnx")
        assert len(stream(tmp_path, *arguments, cwd=home).stdout.splitlines()) == 1

    def test_a_full_disk(self, home, tmp_path):
        def small_files():
            resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))

        arguments = ("clip.mp4", "-o", tmp_path / "c.parquet", "--logits")
        fails("cannot write", *arguments, cwd=home, preexec_fn=small_files)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("gone.mp4",), "gone.mp4: no such file"),
            (("pictures", "--every", "2"), "--every is for a video, and pictures is not one"),
            (("pictures", "--watch", "--every", "2"), "--watch takes one folder, and no --every"),
            (("pictures", "--idle-timeout", "1"), "--idle-timeout is for --watch"),
            (("pictures", "--json"), "--json is for the summary of --out"),
            (("pictures", "--logits"), "are for Parquet: name the file or folder with --out"),
            (("pictures", "-o", "no/codes.parquet"), "its folder does not exist"),
            (("nothing/*.png",), "no file matches this pattern"),
        ],
    )
    def test_wrong_arguments_are_one_line(self, home, arguments, message):
        before = sorted(home.rglob("*"))
        fails(message, *arguments, cwd=home)
        assert sorted(home.rglob("*")) == before


def example(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=cwd, env={**os.environ})


class TestExamples:
    def test_edge_camera_finds_the_scenes_of_a_video(self, home):
        done = example("edge_camera.py", "clip.mp4", cwd=home)
        assert done.returncode == 0, done.stderr
        events = [json.loads(line) for line in done.stdout.splitlines()]
        # Five scenes of ten frames each, every change confirmed by the frame after it.
        assert [event["frame"] for event in events] == [0, 11, 21, 31, 41]
        assert "50 frames, 0 dropped, 0 unreadable" in done.stderr

    def test_edge_camera_says_what_is_wrong(self, home):
        done = example("edge_camera.py", "gone.mp4", cwd=home)
        assert done.returncode == 1 and done.stderr.startswith("error: gone.mp4: no such file")

    def test_watch_folder_finds_a_repeat_and_keeps_codes(self, home, tmp_path):
        incoming = tmp_path / "incoming"
        incoming.mkdir()
        for number in range(3):
            os.utime(picture(incoming / f"{number}.png", number), (1000 + number, 1000 + number))
        os.utime(picture(incoming / "again.png", 1), (2000, 2000))
        (incoming / "broken.png").write_text("no picture")
        done = example(
            "watch_folder.py", "incoming", "--model", home / "model.onnx", "--codes", "codes",
            "--settle", 0.1, "--idle-timeout", 0.5, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = {Path(line["uri"]).name: line for line in map(json.loads, done.stdout.splitlines())}
        assert len(lines) == 5 and "error" in lines["broken.png"]
        assert (lines["again.png"]["repeats"], lines["again.png"]["distance"]) == ("incoming/1.png", 0)
        assert "repeats" not in lines["2.png"]
        assert len(read_codes(tmp_path / "codes" / "codes-00000.parquet")) == 4
        assert "4 pictures encoded, 1 unreadable" in done.stderr
