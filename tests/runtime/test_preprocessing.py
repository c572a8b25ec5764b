"""Golden images: each odd kind of file against pixels that the test works out itself, in NumPy."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from admth_runtime.errors import ImageError, InputError, ManifestError
from admth_runtime.preprocessing import MAX_PIXELS, PreprocessingSpec, load_image, preprocess

HEIGHT, WIDTH = 9, 14
SPEC = PreprocessingSpec(HEIGHT, WIDTH)
generator = np.random.default_rng(3)
RGB = generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
GRAY = generator.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)
ALPHA = generator.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """Write a PNG chunk by chunk, for kinds that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in parts)


def save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def over(colour: np.ndarray, alpha: np.ndarray, background: float = 255.0) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return colour * share + background * (1 - share)


def repeat(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray[..., None], 3, axis=2)


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 0.0) -> None:
    assert actual.shape == (HEIGHT, WIDTH, 3)
    assert actual.dtype == np.uint8
    assert actual.flags.c_contiguous
    assert np.abs(actual.astype(float) - expected).max() <= tolerance


def test_rgb_png_is_unchanged(tmp_path):
    close(preprocess(save(tmp_path / "a.png", Image.fromarray(RGB)), SPEC), RGB)


def test_jpeg_is_decoded_in_full(tmp_path):
    smooth = np.add.outer(np.arange(HEIGHT) * 9, np.arange(WIDTH) * 7).astype(np.uint8)
    close(preprocess(save(tmp_path / "a.jpg", Image.fromarray(smooth), quality=100), SPEC), repeat(smooth), 3)


def test_grayscale(tmp_path):
    close(preprocess(save(tmp_path / "a.png", Image.fromarray(GRAY)), SPEC), repeat(GRAY))


def test_one_bit(tmp_path):
    bits = GRAY > 127
    close(preprocess(save(tmp_path / "a.png", Image.fromarray(bits)), SPEC), repeat(bits * 255))


def test_sixteen_bit_gray_keeps_its_high_byte(tmp_path):
    deep = generator.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    path = tmp_path / "a.png"
    path.write_bytes(png(WIDTH, HEIGHT, 16, 0, rows))
    close(preprocess(path, SPEC), repeat(deep >> 8))
    close(preprocess(save(tmp_path / "a.tif", Image.fromarray(deep)), SPEC), repeat(deep >> 8))


def test_sixteen_bit_rgb_keeps_its_high_byte(tmp_path):
    deep = generator.integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    path = tmp_path / "a.png"
    path.write_bytes(png(WIDTH, HEIGHT, 16, 2, b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)))
    close(preprocess(path, SPEC), deep >> 8)


def test_mode_i_within_sixteen_bits_and_beyond(tmp_path):
    values = generator.integers(0, 65536, (HEIGHT, WIDTH), dtype=np.int32)
    close(preprocess(save(tmp_path / "a.tif", Image.fromarray(values)), SPEC), repeat(values >> 8))
    values[0, 0] = 70_000
    with pytest.raises(ImageError, match=r"b\.tif: a 32-bit integer picture"):
        preprocess(save(tmp_path / "b.tif", Image.fromarray(values)), SPEC)


def test_floating_point_is_refused(tmp_path):
    with pytest.raises(ImageError, match=r"a\.tif: a floating-point picture"):
        preprocess(save(tmp_path / "a.tif", Image.fromarray(GRAY.astype(np.float32))), SPEC)


def test_cmyk(tmp_path):
    inks = generator.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
    path = save(tmp_path / "a.tif", Image.fromarray(inks, mode="CMYK"))
    expected = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255.0
    close(preprocess(path, SPEC), expected, 1.01)


def test_palette_with_and_without_transparency(tmp_path):
    palette = generator.integers(0, 256, (16, 3), dtype=np.uint8)
    alphas = generator.integers(0, 256, 16, dtype=np.uint8)
    image = Image.fromarray(GRAY >> 4)
    image.putpalette(palette.tobytes())
    close(preprocess(save(tmp_path / "a.png", image), SPEC), palette[GRAY >> 4])
    path = save(tmp_path / "b.png", image, transparency=alphas.tobytes())
    close(preprocess(path, SPEC), over(palette[GRAY >> 4], alphas[GRAY >> 4]), 1)


def test_transparent_colour_of_an_rgb_png(tmp_path):
    picture = RGB.copy()
    picture[2:5, 3:9] = (10, 20, 30)
    rows = b"".join(b"\0" + row.tobytes() for row in picture)
    path = tmp_path / "a.png"
    path.write_bytes(png(WIDTH, HEIGHT, 8, 2, rows, (b"tRNS", struct.pack(">HHH", 10, 20, 30))))
    picture[2:5, 3:9] = 255
    close(preprocess(path, SPEC), picture)


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (200, 100, 50)])
def test_alpha_lies_over_the_background(tmp_path, background):
    spec = PreprocessingSpec(HEIGHT, WIDTH, background=background)
    rgba = save(tmp_path / "rgba.png", Image.fromarray(np.dstack([RGB, ALPHA])))
    close(preprocess(rgba, spec), over(RGB, ALPHA, np.array(background, float)), 1)
    la = save(tmp_path / "la.png", Image.fromarray(np.dstack([GRAY, ALPHA])))
    close(preprocess(la, spec), over(repeat(GRAY), ALPHA, np.array(background, float)), 1)


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation(tmp_path, kind):
    palette = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    first, second = palette[GRAY >> 6], palette[(GRAY + 64).astype(np.uint8) >> 6]
    frames = [Image.fromarray(frame) for frame in (first, second)]
    options = {"lossless": True} if kind == "webp" else {}
    path = save(tmp_path / f"a.{kind}", frames[0], save_all=True, append_images=frames[1:], duration=50, **options)
    close(preprocess(path, SPEC), first)
    with Image.open(path) as opened:
        opened.seek(1)
        close(preprocess(opened, SPEC), first)


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", Image.fromarray(RGB), exif=exif)
    expected = TURNS[orientation](RGB)
    height, width, _ = expected.shape
    assert np.array_equal(preprocess(path, PreprocessingSpec(height, width)), expected)


def test_one_pixel_fills_the_input(tmp_path):
    path = save(tmp_path / "a.png", Image.new("RGB", (1, 1), (12, 200, 99)))
    close(preprocess(path, SPEC), np.broadcast_to([12, 200, 99], (HEIGHT, WIDTH, 3)))


def test_twenty_thousand_pixels_wide(tmp_path):
    picture = np.zeros((10, 20_000, 3), np.uint8)
    picture[:, 9_980:10_020] = (1, 2, 3)
    path = save(tmp_path / "a.png", Image.fromarray(picture))
    close(preprocess(path, SPEC), np.broadcast_to([1, 2, 3], (HEIGHT, WIDTH, 3)))  # the centred crop is 16 wide
    stretched = preprocess(path, PreprocessingSpec(HEIGHT, WIDTH, fit="stretch"))
    assert stretched[:, :5].max() == 0


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 60_000])  # between Pillow's warning and its error, and beyond both
def test_decompression_bombs_are_refused_unread(tmp_path, side):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(side, side, 1, 0, b""))
    with pytest.raises(ImageError, match=r"bomb\.png: .*decompression bomb"):
        preprocess(path, SPEC)
    assert side * side > MAX_PIXELS


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"no image at all", "not an image"), (None, "no such file")]
)
def test_unreadable_files_are_named(tmp_path, content, message):
    path = tmp_path / "odd.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"odd\.jpg: .*{message}") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".tif", ".bmp"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_truncated_files_are_refused(tmp_path, suffix, share):
    noise = Image.fromarray(generator.integers(0, 256, (60, 60, 3), dtype=np.uint8))
    whole = save(tmp_path / f"whole{suffix}", noise).read_bytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ImageError, match="cut"):
        preprocess(path, SPEC)


def test_a_truncated_picture_that_is_already_open(tmp_path):
    noise = Image.fromarray(generator.integers(0, 256, (60, 60, 3), dtype=np.uint8))
    path = save(tmp_path / "a.png", noise)
    path.write_bytes(path.read_bytes()[:5000])
    with Image.open(path) as opened, pytest.raises(ImageError, match="cannot be decoded"):
        preprocess(opened, SPEC)


def test_path_picture_and_array_agree(tmp_path):
    picture = generator.integers(0, 256, (50, 31, 3), dtype=np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(picture))
    spec = PreprocessingSpec(16, 24, crop_fraction=0.875, interpolation="bicubic")
    from_path = preprocess(path, spec)
    assert np.array_equal(preprocess(str(path), spec), from_path)
    assert np.array_equal(preprocess(Image.fromarray(picture), spec), from_path)
    assert np.array_equal(preprocess(picture, spec), from_path)


def test_box_resize_is_the_mean_of_blocks():
    picture = generator.integers(0, 256, (4 * HEIGHT, 4 * WIDTH, 3), dtype=np.uint8)
    blocks = picture.reshape(HEIGHT, 4, WIDTH, 4, 3).mean(axis=(1, 3))
    close(preprocess(picture, PreprocessingSpec(HEIGHT, WIDTH, interpolation="box")), blocks, 1)


def test_bilinear_resize_is_the_antialiased_triangle():
    """Down by two, the triangle has radius 2: weights 1, 3, 3, 1 over 8, renormalised at the borders."""
    line = generator.integers(0, 256, 2 * WIDTH).astype(float)
    picture = np.broadcast_to(line[None, :, None], (2 * HEIGHT, 2 * WIDTH, 3)).astype(np.uint8)
    expected = []
    for column in range(WIDTH):
        near = [(2 * column + offset, weight) for offset, weight in zip((-1, 0, 1, 2), (1, 3, 3, 1), strict=True)]
        near = [(at, weight) for at, weight in near if 0 <= at < 2 * WIDTH]
        expected.append(sum(line[at] * weight for at, weight in near) / sum(weight for _, weight in near))
    close(preprocess(picture, SPEC), np.broadcast_to(np.array(expected)[None, :, None], (HEIGHT, WIDTH, 3)), 1)


def test_centre_crop_keeps_the_aspect_ratio():
    picture = np.zeros((30, 90, 3), np.uint8)
    picture[:, 30:60] = 255
    assert preprocess(picture, PreprocessingSpec(10, 10, interpolation="box")).min() == 255
    assert preprocess(picture, PreprocessingSpec(10, 30, interpolation="box"))[:, :9].max() == 0
    half = preprocess(np.pad(np.full((20, 20, 3), 9, np.uint8), ((10, 10), (10, 10), (0, 0))),
                      PreprocessingSpec(10, 10, crop_fraction=0.5, interpolation="box"))  # fmt: skip
    assert half.min() == half.max() == 9


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 300), st.integers(1, 300), st.integers(1, 40), st.integers(1, 40),
    st.sampled_from(["crop", "stretch"]), st.floats(0.01, 1.0),
    st.sampled_from(["bilinear", "bicubic", "lanczos", "box"]),
)  # fmt: skip
def test_any_size_becomes_the_input_and_a_flat_picture_stays_flat(h, w, to_h, to_w, fit, fraction, interpolation):
    spec = PreprocessingSpec(to_h, to_w, fit=fit, crop_fraction=fraction, interpolation=interpolation)
    out = preprocess(np.full((h, w, 3), 77, np.uint8), spec)
    assert out.shape == spec.shape
    assert (out == 77).all()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((9, 14, 3), np.float32), "float32 is not uint8: scale"),
        (np.zeros((9, 14, 3), np.int64), "cast to np.uint8"),
        (np.zeros((9, 14), np.uint8), "is gray"),
        (np.zeros((3, 9, 14), np.uint8), "channels first"),
        (np.zeros((9, 14, 4), np.uint8), "alpha channel"),
        (np.zeros((9, 14, 5), np.uint8), "3 channels"),
        (np.zeros((0, 14, 3), np.uint8), "is empty"),
        (np.zeros((1, 9, 14, 3), np.uint8), r"not \[height, width, 3\]"),
        (7, "type int is unknown"),
        (None, "type NoneType is unknown"),
    ],
)
def test_wrong_arrays_are_answered_with_the_mend(image, message):
    with pytest.raises(InputError, match=message):
        preprocess(image, SPEC)


@pytest.mark.parametrize(
    "fields",
    [
        {"height": 0}, {"width": 5000}, {"height": True}, {"height": 8.0}, {"fit": "pad"}, {"fit": []},
        {"interpolation": "nearest"}, {"interpolation": []}, {"crop_fraction": 0}, {"crop_fraction": float("nan")},
        {"crop_fraction": "1"}, {"background": [0, 0]}, {"background": [0, 0, 256]}, {"background": None},
        {"mirror": True},
    ],
)  # fmt: skip
def test_bad_fields_are_refused(fields):
    with pytest.raises(ManifestError):
        PreprocessingSpec.from_dict({"height": 8, "width": 8, **fields})


def test_missing_fields_are_refused():
    with pytest.raises(ManifestError, match=r"lacks the fields \['width'\]"):
        PreprocessingSpec.from_dict({"height": 8})


def test_dictionary_there_and_back_and_digest():
    spec = PreprocessingSpec(8, 9, "stretch", 0.5, "lanczos", (1, 2, 3))
    assert PreprocessingSpec.from_dict(spec.to_dict()) == spec
    assert spec.digest() == PreprocessingSpec.from_dict(spec.to_dict()).digest()
    assert spec.digest() != PreprocessingSpec(8, 9).digest()
