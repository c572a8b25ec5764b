"""JPEG files through simplejpeg: the pixels, and the refusals, are Pillow's."""

from __future__ import annotations

import io
import logging
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageFile, ImageOps

from admth_runtime import decoding
from admth_runtime.decoding import decode, jpeg_decoder, pixels_agree
from admth_runtime.errors import ImageError
from admth_runtime.preprocessing import PreprocessingSpec, load_image, preprocess, to_rgb

simplejpeg = pytest.importorskip("simplejpeg", reason="simplejpeg is not installed: pip install 'admth[jpeg]'")

SIDES = [(1, 1), (7, 5), (8, 8), (16, 16), (17, 33), (200, 3), (3, 200), (231, 155)]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng([width, height])
    coarse = generator.integers(0, 256, (max(2, height // 30), max(2, width // 30), 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = smooth + generator.integers(-15, 16, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


def jpeg(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    """What every version of this project before simplejpeg did."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def outcome(function, data: bytes):
    """The pixels, or that the file is refused."""
    try:
        return function(data)
    except (OSError, SyntaxError, ValueError, ImageError):
        return None


def by_us(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(to_rgb(image))


def same(a, b) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and np.array_equal(a, b))


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The colour spaces that simplejpeg was asked for, call by call."""
    seen: list[str] = []
    decoding._simplejpeg()  # the comparison of samples is not of interest
    real = simplejpeg.decode_jpeg

    def spy(data, colorspace, **options):
        seen.append(colorspace)
        return real(data, colorspace, **options)

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spy)
    return seen


@pytest.mark.parametrize("size", SIDES)
@pytest.mark.parametrize("progressive", [False, True])
def test_every_sampling_and_quality_has_pillows_pixels(size, progressive, calls):
    count = 0
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        for quality in (1, 40, 75, 95):
            data = jpeg(picture(*size), subsampling=subsampling, quality=quality, progressive=progressive)
            assert np.array_equal(by_us(data), by_pillow(data))
            count += 1
    assert calls == ["RGBX"] * count


@pytest.mark.parametrize("sampling", ["440", "411", "444", "422", "420"])
def test_files_of_another_encoder(sampling, calls):
    for width, height in SIDES:
        data = simplejpeg.encode_jpeg(np.asarray(picture(width, height)), quality=80, colorsubsampling=sampling)
        assert np.array_equal(by_us(data), by_pillow(data))
    assert len(calls) == len(SIDES)


@pytest.mark.parametrize(
    ("data", "asked"),
    [
        (jpeg(picture(50, 37, "L")), ["GRAY"]),
        (jpeg(picture(50, 37, "L"), progressive=True), ["GRAY"]),
        (jpeg(picture(50, 37), optimize=True), ["RGBX"]),
        (jpeg(picture(50, 37), restart_marker_blocks=2), ["RGBX"]),
        (jpeg(picture(50, 37), comment=b"\xff\xc0 a comment with a marker in it"), ["RGBX"]),
        (jpeg(picture(50, 37)) + b"what some cameras append", ["RGBX"]),
        (jpeg(picture(50, 37), "MPO", save_all=True, append_images=[picture(40, 20)]), ["RGBX"]),
        (jpeg(picture(50, 37), dpi=(72, 72), icc_profile=b"\0" * 3000), ["RGBX"]),
        (jpeg(picture(50, 37), keep_rgb=True), ["RGBX"]),
        (jpeg(picture(50, 37, "CMYK")), []),
        (jpeg(picture(50, 37), "PNG"), []),
        (jpeg(picture(50, 37), "TIFF", compression="jpeg"), []),
    ],
    ids=["gray", "gray progressive", "optimised", "restarts", "comment", "appended", "mpo", "profile", "rgb", "cmyk",
         "png", "jpeg in tiff"],
)  # fmt: skip
def test_what_simplejpeg_is_asked_for(data, asked, calls):
    assert np.array_equal(by_us(data), by_pillow(data))
    assert calls == asked


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_orientation_is_applied_once(orientation, mode, tmp_path, calls):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = jpeg(picture(40, 21, mode), exif=exif)
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    loaded = load_image(path)
    assert np.array_equal(np.asarray(loaded), by_pillow(data))
    assert np.array_equal(np.asarray(to_rgb(loaded)), by_pillow(data))
    assert len(calls) == 1


@pytest.mark.parametrize("orientation", [1, 6])
def test_an_upright_picture_stays_so_whatever_the_format(orientation, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for name in ("a.png", "a.tif", "a.webp"):
        picture(40, 21).save(tmp_path / name, exif=exif)
        loaded = load_image(tmp_path / name)
        assert np.array_equal(np.asarray(loaded), by_pillow((tmp_path / name).read_bytes()))
        assert np.array_equal(np.asarray(to_rgb(loaded)), np.asarray(loaded))


def test_truncated_files_are_refused_or_read_as_pillow_does(monkeypatch):
    data = jpeg(picture(60, 44), progressive=True)
    for tolerant in (False, True):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
        for end in (*range(0, len(data), 97), len(data) - 2, len(data) - 1):
            assert same(outcome(by_us, data[:end]), outcome(by_pillow, data[:end])), (tolerant, end)


DAMAGED = [jpeg(picture(60, 44)), jpeg(picture(60, 44), progressive=True), jpeg(picture(33, 20, "L"))]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(DAMAGED), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_files_are_refused_or_read_as_pillow_does(data, changes):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * len(data))] = value
    damaged = bytes(damaged)
    assert same(outcome(by_us, damaged), outcome(by_pillow, damaged))


def test_a_picture_that_was_drafted_or_decoded_before(calls):
    data = jpeg(picture(320, 240))
    drafted = Image.open(io.BytesIO(data))
    drafted.draft("RGB", (80, 60))
    assert to_rgb(drafted).size == (80, 60)
    gray = Image.open(io.BytesIO(data))
    gray.draft("L", None)
    expected = Image.open(io.BytesIO(data))
    expected.draft("L", None)
    assert np.array_equal(np.asarray(to_rgb(gray)), np.asarray(expected.convert("RGB")))
    decoded = Image.open(io.BytesIO(data))
    decoded.load()
    calls.clear()
    assert np.array_equal(np.asarray(to_rgb(decoded)), by_pillow(data))
    assert calls == []


def test_the_same_open_picture_gives_the_same_pixels_again():
    data = jpeg(picture(50, 37))
    with Image.open(io.BytesIO(data)) as image:
        first, second = np.asarray(to_rgb(image)), np.asarray(to_rgb(image))
        image.load()
        assert np.array_equal(np.asarray(image), first)
    assert np.array_equal(first, second)


def test_very_large_pictures_are_left_to_pillow(monkeypatch, calls):
    monkeypatch.setattr(decoding, "_LARGEST", 49 * 37)
    by_us(jpeg(picture(50, 37)))
    assert calls == []
    by_us(jpeg(picture(49, 37)))
    assert len(calls) == 1


def test_threads_decode_the_same_pixels(tmp_path):
    spec = PreprocessingSpec(32, 32)
    paths = [tmp_path / f"{number}.jpg" for number in range(8)]
    for number, path in enumerate(paths):
        path.write_bytes(jpeg(picture(60 + number, 50)))
    expected = [preprocess(path, spec) for path in paths]
    wrong = []

    def work() -> None:
        for _ in range(20):
            for path, pixels in zip(paths, expected, strict=True):
                if not np.array_equal(preprocess(path, spec), pixels):
                    wrong.append(path)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class TestTheComparison:
    @pytest.fixture(autouse=True)
    def fresh(self):
        decoding._simplejpeg.cache_clear()
        yield
        decoding._simplejpeg.cache_clear()

    def test_the_real_one_agrees(self):
        assert pixels_agree(simplejpeg)
        assert jpeg_decoder() == f"simplejpeg {simplejpeg.__version__}"

    @pytest.mark.parametrize("options", [{"fastupsample": True}, {"fastdct": True}])
    def test_another_transform_or_upsampling_is_noticed(self, options):
        def decode_jpeg(data, colorspace, **_):
            return simplejpeg.decode_jpeg(data, colorspace, **options)

        assert not pixels_agree(SimpleNamespace(decode_jpeg=decode_jpeg))

    def test_one_that_differs_is_not_used_and_that_is_said_once(self, monkeypatch, caplog):
        def decode_jpeg(data, colorspace, **options):
            pixels = simplejpeg.decode_jpeg(data, colorspace, **options).copy()
            pixels[-1, -1, 0] ^= 1
            return pixels

        monkeypatch.setitem(sys.modules, "simplejpeg", SimpleNamespace(decode_jpeg=decode_jpeg, __version__="0.0"))
        data = jpeg(picture(50, 37))
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                assert np.array_equal(by_us(data), by_pillow(data))
        assert [record.getMessage()[:36] for record in caplog.records] == ["simplejpeg 0.0 decodes other pixels "]
        assert jpeg_decoder().startswith("Pillow ")

    def test_without_simplejpeg_pillow_decodes(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "simplejpeg", None)
        data = jpeg(picture(50, 37))
        with Image.open(io.BytesIO(data)) as image:
            assert decode(image) is image
        assert jpeg_decoder().startswith("Pillow ")
