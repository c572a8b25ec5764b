from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from admth_runtime import HashRuntime, InputError, encoding
from admth_runtime.encoding import TooManyUnreadableError, UnreadableImage, encode_files, list_images


@pytest.fixture
def runtime(tiny_path):
    with HashRuntime(tiny_path, threads=1, batch_size=4) as opened:
        yield opened


@pytest.fixture
def pictures(tmp_path):
    """Twenty-five readable pictures, some of them in folders within the folder."""
    folder = tmp_path / "pictures"
    (folder / "b" / "deep").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(25):
        place = folder / ("b/deep" if number % 5 == 4 else "b" if number % 5 == 3 else ".")
        Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(place / f"{number:02}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


class TestListing:
    def test_folders_are_searched_in_sorted_order(self, pictures):
        found = list_images([pictures])
        assert len(found) == 25
        assert found[0] == str(pictures / "00.png")
        assert found[-1] == str(pictures / "b" / "deep" / "24.png")
        assert not any(path.endswith(".txt") for path in found)
        assert len(list_images([pictures], recursive=False)) == 15

    def test_named_files_may_have_any_ending_and_nothing_comes_twice(self, pictures):
        note = pictures / "notes.txt"
        found = list_images([pictures / "01.png", pictures, note, note])
        assert found[0] == str(pictures / "01.png")
        assert found[-1] == str(note)
        assert len(found) == 26

    def test_paths_stay_as_given(self, pictures, monkeypatch):
        monkeypatch.chdir(pictures.parent)
        assert list_images(["pictures"], recursive=False)[0] == os.path.join("pictures", "00.png")  # noqa: PTH118
        assert list_images(["./pictures/01.png"]) == ["./pictures/01.png"]

    def test_nothing_to_encode(self, tmp_path):
        with pytest.raises(InputError, match=r"none: no such file or folder"):
            list_images([tmp_path / "none"])
        with pytest.raises(InputError, match=r"no images in .*\.jpeg"):
            list_images([tmp_path])
        with pytest.raises(InputError, match="no images"):
            list_images([])


def test_codes_equal_those_of_one_call_after_another(runtime, pictures):
    uris = list_images([pictures])
    steps = []
    encoded, unreadable = encode_files(runtime, uris, keep_logits=True, advance=steps.append)
    assert unreadable == []
    assert sum(steps) == 25
    assert encoded.uris == tuple(uris)
    assert encoded.ids.tolist() == list(range(25))
    assert encoded.model_sha256 == runtime.model_sha256
    assert encoded.preprocessing_sha256 == runtime.manifest.preprocessing.digest()
    expected = runtime.encode(uris)
    for length in runtime.code_lengths:
        assert np.array_equal(encoded.codes[length], expected[length])
        assert np.array_equal(encoded.codes.logits[length], expected.logits[length])


def test_logits_are_left_out_by_default(runtime, pictures):
    encoded, _ = encode_files(runtime, list_images([pictures]))
    assert dict(encoded.codes.logits) == {}


def test_unreadable_images_are_listed_and_left_out(runtime, pictures):
    (pictures / "03x.jpg").write_bytes(b"")
    (pictures / "07x.jpg").write_bytes(b"text")
    uris = list_images([pictures])
    encoded, unreadable = encode_files(runtime, uris, max_error_rate=0.1)
    assert unreadable == [
        UnreadableImage(str(pictures / "03x.jpg"), "is empty"),
        UnreadableImage(str(pictures / "07x.jpg"), "is not an image that Pillow can read"),
    ]
    readable = [uri for uri in uris if not uri.endswith("x.jpg")]
    assert list(encoded.uris) == readable
    assert np.array_equal(encoded.codes[64], runtime.encode(readable)[64])


def test_the_reason_does_not_repeat_the_path(runtime, pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    (pictures / "x.jpg").write_bytes(b"")
    _, unreadable = encode_files(runtime, ["./01.png", "./x.jpg"], max_error_rate=0.5)
    assert unreadable == [UnreadableImage("./x.jpg", "is empty")]


def test_the_error_rate_is_a_share_of_all_images(runtime, pictures):
    uris = list_images([pictures])
    for name in ("x.jpg", "y.jpg"):
        (pictures / name).write_bytes(b"")
    uris += [str(pictures / "x.jpg"), str(pictures / "y.jpg")]
    encode_files(runtime, uris, max_error_rate=2 / 27)
    with pytest.raises(
        TooManyUnreadableError, match=r"2 of 27 images cannot be read, more than --max-error-rate 0.05"
    ) as e:
        encode_files(runtime, uris, max_error_rate=0.05)
    assert len(e.value.unreadable) == 2
    with pytest.raises(TooManyUnreadableError, match="2 of 2 images cannot be read: there is nothing to encode"):
        encode_files(runtime, uris[-2:], max_error_rate=1.0)


def test_a_hopeless_run_stops_early(runtime, tmp_path):
    uris = []
    for number in range(300):
        (tmp_path / f"{number:03}.jpg").write_bytes(b"")
        uris.append(str(tmp_path / f"{number:03}.jpg"))
    with pytest.raises(TooManyUnreadableError, match="stopped after 21 of 300 images: 21 cannot be read"):
        encode_files(runtime, uris)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_rates_out_of_range(runtime, rate):
    with pytest.raises(InputError, match="not between 0 and 1"):
        encode_files(runtime, ["a.jpg"], max_error_rate=rate)


def test_no_images(runtime):
    with pytest.raises(InputError, match="no images"):
        encode_files(runtime, [])


def test_decoding_runs_ahead_by_a_bounded_window(runtime, monkeypatch):
    """A slow engine must not let decoded pictures pile up."""
    decoded, at_inference = [], []

    def fake_decode(uri, spec):
        decoded.append(uri)
        return np.zeros(spec.shape, np.uint8)

    run = runtime.engine.run

    def slow_run(batch):
        time.sleep(0.02)
        at_inference.append(len(decoded))
        return run(batch)

    monkeypatch.setattr(encoding, "_decode", fake_decode)
    monkeypatch.setattr(runtime.engine, "run", slow_run)
    encode_files(runtime, [str(number) for number in range(100)])
    for batch, count in enumerate(at_inference, start=1):
        assert count <= 4 * batch + 8  # what was consumed, and the window of two batches


def test_a_name_that_is_not_utf8(runtime, tmp_path):
    name = os.fsencode(tmp_path) + b"/bad-\xff.png"
    with open(name, "wb") as file:  # noqa: PTH123
        Image.new("RGB", (5, 5)).save(file, format="PNG")
    Image.new("RGB", (5, 5)).save(tmp_path / "good.png")
    encoded, unreadable = encode_files(runtime, list_images([tmp_path]), max_error_rate=0.5)
    assert len(encoded) == 1
    assert unreadable[0].path.endswith(r"bad-\udcff.png")
    assert "not UTF-8" in unreadable[0].reason
