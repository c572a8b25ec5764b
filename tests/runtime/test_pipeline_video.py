"""Video files, cameras that are pulled out, and streams of the network, through PyAV."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from _videos import RATE, scenes, write_video

from admth_runtime import HashPipeline, HashRuntime, PipelineOptions
from admth_runtime.errors import InputError, PipelineError
from admth_runtime.pipeline import FrameResult, VideoSource

FRAMES = scenes()


@pytest.fixture(scope="module")
def runtime(tiny_path):
    with HashRuntime(tiny_path, device="cpu", threads=1, batch_size=8) as opened:
        yield opened


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "clip.mp4", FRAMES, codec="libx264")
    write_video(folder / "clip.mkv", FRAMES)
    write_video(folder / "clip.ts", FRAMES)
    write_video(folder / "start.mp4", scenes(250), options={"movflags": "faststart"})
    return folder


def run(runtime: HashRuntime, source: VideoSource, **options) -> list[FrameResult]:
    results: list[FrameResult] = []
    HashPipeline(runtime, source, results.append, PipelineOptions(**options)).run()
    return results


class TestFiles:
    @pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.ts"])
    def test_every_frame_with_its_time(self, runtime, videos, name):
        results = run(runtime, VideoSource(videos / name))
        assert len(results) == len(FRAMES) and all(result.ok for result in results)
        times = [float(result.uri.partition("#t=")[2]) for result in results]
        assert np.allclose(np.diff(times), 1 / RATE, atol=1e-3)
        assert results[0].uri.startswith(str(videos / name))
        # The pictures are those that were encoded, but for the codec's losses.
        codes = runtime.encode(FRAMES)
        wrong = sum(bin(int(r.hex(64), 16) ^ int(codes.hex(64)[r.id], 16)).count("1") for r in results)
        assert wrong / (64 * len(results)) < 0.05

    def test_every_nth_frame(self, runtime, videos):
        every, all_of_them = VideoSource(videos / "clip.mp4", every=7), VideoSource(videos / "clip.mp4")
        results, expected = run(runtime, every), run(runtime, all_of_them)[::7]
        assert [result.uri for result in results] == [result.uri for result in expected]
        assert [result.hex(64) for result in results] == [result.hex(64) for result in expected]
        assert [result.id for result in results] == list(range(8))

    def test_turned_as_the_file_says(self, tmp_path):
        flat, turned = (write_video(tmp_path / f"{name}.mp4", FRAMES[:3], rotation=angle)
                        for name, angle in (("flat", None), ("turned", 90)))  # fmt: skip
        upright = next(VideoSource(flat).frames(threading.Event())).image()
        lying = next(VideoSource(turned).frames(threading.Event())).image()
        assert lying.shape == (64, 48, 3)
        assert np.array_equal(lying, np.rot90(upright))

    def test_a_broken_packet_is_an_error_of_one_frame(self, runtime, videos, tmp_path):
        data = bytearray((videos / "clip.ts").read_bytes())
        middle = len(data) // 188 // 2 * 188
        for place in range(middle, middle + 6 * 188, 20):
            data[place] ^= 0xFF
        (tmp_path / "scratched.ts").write_bytes(data)
        results = run(runtime, VideoSource(tmp_path / "scratched.ts"))
        assert sum(result.ok for result in results) >= len(FRAMES) // 2
        assert [result.id for result in results] == list(range(len(results)))

    @pytest.mark.parametrize("name", ["start.mp4", "clip.mkv"])
    def test_a_truncated_file_is_named_after_its_last_frame(self, runtime, videos, tmp_path, name):
        data = (videos / name).read_bytes()
        path = tmp_path / f"half-{name}"
        path.write_bytes(data[: len(data) * 2 // 5])
        results: list[FrameResult] = []
        pipeline = HashPipeline(runtime, VideoSource(path), results.append)
        with pytest.raises(PipelineError, match=rf"half-{name} ends after \d+\.\d of \d+\.\d s: it is truncated"):
            pipeline.run()
        assert results and pipeline.stats().discarded == 0

    def test_no_video_at_all(self, runtime, videos, tmp_path):
        (tmp_path / "empty.mp4").touch()
        (tmp_path / "text.mp4").write_text("no video")
        (tmp_path / "no-index.mp4").write_bytes((videos / "clip.mp4").read_bytes()[:2000])
        for name in ("empty.mp4", "text.mp4", "no-index.mp4"):
            with pytest.raises(PipelineError, match=rf"{name} cannot be opened \(.*\): is it whole, and a video\?"):
                run(runtime, VideoSource(tmp_path / name))

    def test_wrong_arguments(self, tmp_path, videos):
        for arguments, message in (
            ((tmp_path / "gone.mp4",), "gone.mp4: no such file: pass a video file, a camera"),
            ((tmp_path,), "is a folder, not a video"),
        ):
            with pytest.raises(InputError, match=message):
                VideoSource(*arguments)
        with pytest.raises(InputError, match="every 0 is not an integer of 1 or more"):
            VideoSource(videos / "clip.mp4", every=0)
        with pytest.raises(InputError, match="reconnect_s is for cameras and streams"):
            VideoSource(videos / "clip.mp4", reconnect_s=1)
        with pytest.raises(InputError, match="timeout_s 0 or"):
            VideoSource(videos / "clip.mp4", timeout_s=0)

    def test_an_unknown_format_is_named(self, runtime, videos):
        with pytest.raises(InputError, match="cannot be opened with format 'betamax'"):
            run(runtime, VideoSource(videos / "clip.mp4", format="betamax"))

    def test_a_camera_that_is_not_there(self, runtime):
        with pytest.raises(PipelineError, match=r"/dev/video99 cannot be opened \(No such file.*\): is it plugged in"):
            run(runtime, VideoSource("/dev/video99"))

    def test_without_pyav_the_mend_is_one_command(self):
        script = (
            "import sys; sys.modules['av'] = None\n"
            "from admth_runtime import AdmthError\nfrom admth_runtime.pipeline import VideoSource\n"
            "try:\n    VideoSource('/dev/video0')\nexcept AdmthError as error:\n    print(error)\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert "pip install 'admth[video]'" in done.stdout


class Camera:
    """A network camera: it sends a stream to one caller after the other, and then does as it is told."""

    def __init__(self, stream: bytes, then: str) -> None:
        self._stream, self._then, self._done = stream, then, threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._socket.getsockname()[1]}"
        self.calls = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:
                return
            self.calls += 1
            with caller:
                try:
                    caller.sendall(self._stream)
                    if self._then == "silence":
                        self._done.wait(30)
                except OSError:
                    pass

    def close(self) -> None:
        self._done.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)


@pytest.fixture
def camera(videos) -> Iterator:
    opened: list[Camera] = []

    def make(then: str) -> Camera:
        opened.append(Camera((videos / "clip.ts").read_bytes(), then))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


class TestLive:
    def test_one_that_ends_is_an_error_after_its_last_frame(self, runtime, camera):
        source = VideoSource(camera("hang up").address, format="mpegts")
        assert source.live
        results: list[FrameResult] = []
        with pytest.raises(PipelineError, match="has ended: unplugged, or closed at the other end"):
            HashPipeline(runtime, source, results.append).run()
        assert len(results) == len(FRAMES)

    def test_one_that_falls_silent_is_an_error_too(self, runtime, camera):
        source = VideoSource(camera("silence").address, format="mpegts", timeout_s=0.5)
        results: list[FrameResult] = []
        with pytest.raises(PipelineError, match=r"can no longer be read \(nothing came for 0\.5 s\): connect it"):
            HashPipeline(runtime, source, results.append).run()
        assert len(results) >= len(FRAMES) - 2  # the newest may still be in the decoder

    def test_one_that_is_opened_again(self, runtime, camera, caplog):
        there = camera("hang up")
        source = VideoSource(there.address, format="mpegts", reconnect_s=0.05)
        results = run(runtime, source, max_frames=2 * len(FRAMES) + 20)
        assert len(results) == 2 * len(FRAMES) + 20 and there.calls >= 3
        assert [result.id for result in results] == list(range(len(results)))
        assert "has ended" in caplog.text and "opening it again in 0.05 s" in caplog.text

    def test_stop_does_not_wait_for_the_next_try(self, runtime, camera):
        there = camera("hang up")
        results: list[FrameResult] = []
        with HashPipeline(runtime, VideoSource(there.address, format="mpegts", reconnect_s=3600), results.append):
            deadline = time.monotonic() + 10
            while len(results) < len(FRAMES) and time.monotonic() < deadline:
                time.sleep(0.01)
            start = time.monotonic()
        assert time.monotonic() - start < 2 and len(results) == len(FRAMES)
