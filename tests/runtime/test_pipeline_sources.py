"""Files, arrays and watched folders as sources of a pipeline."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from admth_runtime import HashPipeline, HashRuntime, PipelineOptions
from admth_runtime.errors import InputError, PipelineError
from admth_runtime.pipeline import ArraySource, FileSource, Frame, WatchedFolder
from admth_runtime.pipeline.sources import as_source

STOP = threading.Event()


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    return path


def uris(source) -> list[str]:
    return [frame.uri for frame in source.frames(STOP)]


class TestFileSource:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        for name in ("b.png", "a.jpg", "sub/c.png", "sub/deep/d.PNG"):
            picture(tmp_path / name)
        (tmp_path / "notes.txt").write_text("no picture")
        return tmp_path

    def names(self, folder, source) -> list[str]:
        return [os.path.relpath(uri, folder) for uri in uris(source)]

    def test_folder_list_and_pattern(self, folder):
        assert self.names(folder, FileSource(folder)) == ["a.jpg", "b.png", "sub/c.png", "sub/deep/d.PNG"]
        assert self.names(folder, FileSource(folder, recursive=False)) == ["a.jpg", "b.png"]
        assert self.names(folder, FileSource(str(folder / "*.png"))) == ["b.png"]
        assert self.names(folder, FileSource([folder / "**" / "*.png", folder / "a.jpg"])) == [
            "b.png",
            "sub/c.png",
            "a.jpg",
        ]
        assert len(FileSource(folder)) == 4

    def test_a_name_with_brackets_is_a_name(self, tmp_path):
        path = picture(tmp_path / "a[1].png")
        assert uris(FileSource(path)) == [str(path)]

    def test_nothing_there(self, tmp_path):
        with pytest.raises(InputError, match=r"\*\.jpg: no file matches this pattern"):
            FileSource(tmp_path / "*.jpg")
        with pytest.raises(InputError, match="no such file or folder"):
            FileSource(tmp_path / "gone.jpg")
        with pytest.raises(InputError, match="no images in"):
            FileSource(tmp_path)

    def test_arguments_that_mean_files(self, folder):
        assert isinstance(as_source(str(folder)), FileSource)
        assert isinstance(as_source([folder / "b.png", str(folder / "a.jpg")]), FileSource)


class TestArraySource:
    def test_passes_frames_and_names_the_rest(self, tmp_path):
        frame = Frame(None, "mine", 1.0, "lost")
        images = [np.zeros((2, 2, 3), np.uint8), frame, tmp_path / "x.png"]
        assert uris(ArraySource(images, name="lens")) == ["lens:0", "mine", str(tmp_path / "x.png")]

    def test_wrong_arguments(self):
        with pytest.raises(InputError, match="of type bytes are not an iterable of pictures"):
            ArraySource(b"jpeg")
        with pytest.raises(
            InputError, match=r"shape \(4, 4, 3\) is not \[n, height, width, 3\]: pass \[image\] for one"
        ):
            as_source(np.zeros((4, 4, 3), np.uint8))


class Watch:
    """A watched folder that is read in a thread, and what it has given."""

    def __init__(self, folder: Path, **options) -> None:
        self.names, self.error, self.stop = [], None, threading.Event()
        options = {"poll_s": 0.02, "settle_s": 0.1, **options}
        self._source = WatchedFolder(folder, **options)
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        try:
            for frame in self._source.frames(self.stop):
                self.names.append(Path(frame.uri).name)
        except PipelineError as error:
            self.error = str(error)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def until(self, count: int) -> list[str]:
        deadline = time.monotonic() + 10
        while len(self.names) < count and time.monotonic() < deadline:
            time.sleep(0.005)
        return self.names

    def wait(self) -> None:
        self._thread.join(10)
        assert not self._thread.is_alive()


class TestWatchedFolder:
    def test_gives_what_is_there_and_what_arrives_once(self, tmp_path):
        picture(tmp_path / "0.png")
        with Watch(tmp_path) as watch:
            assert watch.until(1) == ["0.png"]
            picture(tmp_path / "1.png")
            picture(tmp_path / "2.jpg")
            watch.until(3)
            time.sleep(0.3)
        assert sorted(watch.names) == ["0.png", "1.png", "2.jpg"]

    def test_may_leave_out_what_is_there(self, tmp_path):
        picture(tmp_path / "0.png")
        with Watch(tmp_path, existing=False) as watch:
            time.sleep(0.2)
            picture(tmp_path / "1.png")
            assert watch.until(1) == ["1.png"]

    def test_is_patient_with_a_slow_writer(self, tmp_path):
        content = picture(tmp_path / "whole.tmp.png").read_bytes()
        (tmp_path / "whole.tmp.png").unlink()
        with Watch(tmp_path, settle_s=0.4) as watch:
            with (tmp_path / "slow.png").open("wb") as file:
                for start in range(0, len(content), len(content) // 8):
                    file.write(content[start : start + len(content) // 8])
                    file.flush()
                    time.sleep(0.1)
                    assert watch.names == []
            assert watch.until(1) == ["slow.png"]
        with Image.open(tmp_path / "slow.png") as image:
            image.load()

    def test_leaves_empty_hidden_and_other_files_alone(self, tmp_path):
        (tmp_path / "empty.png").touch()
        picture(tmp_path / ".hidden.png")
        picture(tmp_path / "draft.png").rename(tmp_path / "draft.png.part")
        (tmp_path / "notes.txt").write_text("text")
        (tmp_path / "folder.png").mkdir()
        with Watch(tmp_path, idle_timeout_s=0.4) as watch:
            watch.wait()
        assert watch.names == []

    def test_gives_a_renamed_and_a_rewritten_file(self, tmp_path):
        with Watch(tmp_path) as watch:
            picture(tmp_path / ".0.png", 0).rename(tmp_path / "0.png")
            watch.until(1)
            picture(tmp_path / ".0.png", 1).replace(tmp_path / "0.png")
            assert watch.until(2) == ["0.png", "0.png"]

    def test_gives_a_file_again_that_was_removed_and_came_back(self, tmp_path):
        with Watch(tmp_path) as watch:
            picture(tmp_path / "0.png")
            watch.until(1)
            (tmp_path / "0.png").unlink()
            time.sleep(0.15)
            picture(tmp_path / "0.png")
            assert watch.until(2) == ["0.png", "0.png"]

    def test_oldest_first(self, tmp_path):
        for number, name in enumerate(["c.png", "a.png", "b.png"]):
            os.utime(picture(tmp_path / name), (1000 + number, 1000 + number))
        with Watch(tmp_path) as watch:
            assert watch.until(3) == ["c.png", "a.png", "b.png"]

    def test_looks_into_folders_when_told(self, tmp_path):
        picture(tmp_path / "day" / "hour" / "0.png")
        picture(tmp_path / ".thumbnails" / "1.png")
        with Watch(tmp_path, recursive=True, idle_timeout_s=0.3) as watch:
            watch.wait()
        assert watch.names == ["0.png"]
        with Watch(tmp_path, idle_timeout_s=0.3) as watch:
            watch.wait()
        assert watch.names == []

    def test_a_folder_that_vanishes_is_a_clear_error(self, tmp_path):
        folder = tmp_path / "in"
        picture(folder / "0.png")
        with Watch(folder) as watch:
            watch.until(1)
            shutil.rmtree(folder)
            watch.wait()
        assert watch.error.startswith(f"the watched folder {folder} has vanished or cannot be read (No such file")

    def test_ends_a_pipeline_that_way(self, tmp_path, tiny_path):
        folder, results = tmp_path / "in", []
        picture(folder / "0.png")

        def sink(result):
            results.append(result)
            shutil.rmtree(folder)

        with HashRuntime(tiny_path, device="cpu", threads=1) as runtime:
            source = WatchedFolder(folder, poll_s=0.02, settle_s=0.05)
            pipeline = HashPipeline(runtime, source, sink, PipelineOptions(max_wait_ms=0))
            with pytest.raises(PipelineError, match=r"the watched folder .* has vanished"):
                pipeline.run()
        assert [result.ok for result in results] == [True]

    def test_wrong_arguments(self, tmp_path):
        with pytest.raises(InputError, match="gone: no such folder: name the folder that pictures arrive in"):
            WatchedFolder(tmp_path / "gone")
        with pytest.raises(InputError, match="is a file, not a folder"):
            WatchedFolder(picture(tmp_path / "a.png"))
        with pytest.raises(InputError, match="poll_s 0 is not a positive number"):
            WatchedFolder(tmp_path, poll_s=0)
        with pytest.raises(InputError, match="settle_s -1 or idle_timeout_s None is out of range"):
            WatchedFolder(tmp_path, settle_s=-1)
