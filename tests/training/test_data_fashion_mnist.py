"""Fashion-MNIST's IDX files: read right, and every broken one named."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest

from admth_runtime.errors import DataError, InputError
from admth_runtime.preprocessing import PreprocessingSpec
from admth_training.data import open_dataset
from admth_training.data.idx import read_idx, write_idx


def write_parts(folder, *, train=20, test=10, suffix=""):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        write_idx(folder / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels)
        arrays[part] = images, labels
    return arrays


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_images_labels_and_splits(tmp_path, suffix):
    arrays = write_parts(tmp_path, suffix=suffix)
    dataset = open_dataset(f"fashion-mnist:{tmp_path}")
    assert (dataset.name, len(dataset), dataset.labels.shape) == ("fashion-mnist", 30, (30, 10))
    assert dataset.single_label and dataset.class_names[9] == "Ankle boot"
    assert dataset.labels.argmax(axis=1).tolist() == [*arrays["train"][1], *arrays["t10k"][1]]
    assert dataset.describe(17) == "train-images[17]" and dataset.describe(20) == "t10k-images[0]"
    pixels = dataset.load(21, PreprocessingSpec(28, 28))
    np.testing.assert_array_equal(pixels, np.repeat(arrays["t10k"][0][1][:, :, None], 3, axis=2))
    splits = dataset.official_splits
    assert splits.query.tolist() == list(range(20, 30))
    assert splits.train.tolist() == splits.database.tolist() == list(range(20))
    assert splits.seed is None and "inside the database" in splits.describe()


def test_listing_digest_depends_on_the_listing_alone(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir(), (tmp_path / "c").mkdir()
    write_parts(tmp_path / "a"), write_parts(tmp_path / "b", suffix=".gz"), write_parts(tmp_path / "c", train=30)
    a, b, c = (open_dataset(f"fashion-mnist:{tmp_path / name}").listing_digest() for name in "abc")
    assert a == b != c


def test_read_idx_reads_bytes_written_by_hand(tmp_path):
    path = tmp_path / "x-idx3"
    path.write_bytes(b"\x00\x00\x08\x03" + struct.pack(">3I", 2, 1, 3) + bytes(range(6)))
    assert read_idx(path, dimensions=3).tolist() == [[[0, 1, 2]], [[3, 4, 5]]]


def test_write_idx_gives_the_same_bytes_each_time_and_refuses_floats(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    for name in ("a.gz", "b.gz", "plain"):
        write_idx(tmp_path / name, array)
        np.testing.assert_array_equal(read_idx(tmp_path / name, dimensions=3), array)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    with pytest.raises(InputError, match="float64"):
        write_idx(tmp_path / "c", np.zeros(3))


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
HEADER = b"\x00\x00\x08\x03" + struct.pack(">3I", 20, 28, 28)


def truncated_gzip(raw):
    return gzip.compress(raw)[:-200]


def flipped_gzip(raw):
    content = bytearray(gzip.compress(raw))
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "break_it", "message"),
    [
        (IMAGES, lambda raw: b"", "is empty"),
        (IMAGES, lambda raw: raw[:3], "is truncated"),
        (IMAGES, lambda raw: raw[:10], "truncated inside its header"),
        (IMAGES, lambda raw: raw[:-1], "fewer than the 15,680 values"),
        (IMAGES, lambda raw: raw + b"\0", "more than the 15,680 values"),
        (IMAGES, lambda raw: b"\x89PNG" + raw[4:], "starts with the bytes 89504e47, not 00000803"),
        (IMAGES, lambda raw: b"\0\0\x0d\x03" + raw[4:], "no IDX file of uint8"),
        (IMAGES, lambda raw: b"\0\0\x08\x01" + raw[4:], "not 00000803"),
        (IMAGES, lambda raw: raw[:4] + b"\xff" * 12, "fewer than"),
        (IMAGES, lambda raw: HEADER[:4] + struct.pack(">3I", 19, 28, 28) + raw[16 : 16 + 19 * 784], "19 images"),
        (IMAGES, lambda raw: HEADER[:4] + struct.pack(">3I", 20, 0, 28), "holds no images"),
        (LABELS, lambda raw: raw[:4] + struct.pack(">I", 19) + raw[9:], "20 images and .* has 19 labels"),
        (LABELS, lambda raw: raw[:-1] + b"\x0a", "label 19 is 10, beyond the classes 0 to 9"),
        (IMAGES + ".gz", lambda raw: b"", "is empty"),
        (IMAGES + ".gz", lambda raw: raw, "truncated or corrupt"),
        (IMAGES + ".gz", truncated_gzip, "truncated or corrupt"),
        (IMAGES + ".gz", flipped_gzip, "truncated or corrupt"),
        (IMAGES + ".gz", lambda raw: gzip.compress(raw)[:-8] + b"\0" * 8, "truncated or corrupt"),
    ],
)
def test_broken_files_are_named(tmp_path, name, break_it, message):
    write_parts(tmp_path)
    path = tmp_path / name
    plain = tmp_path / name.removesuffix(".gz")
    content = break_it(plain.read_bytes())
    plain.unlink()
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(f"fashion-mnist:{tmp_path}")
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    write_parts(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"holds neither t10k-labels-idx1-ubyte nor t10k-labels-idx1-ubyte\.gz"):
        open_dataset(f"fashion-mnist:{tmp_path}")
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(f"fashion-mnist:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match="is a file"):
        open_dataset(f"fashion-mnist:{tmp_path / IMAGES}")


def test_parts_of_different_sizes_are_refused(tmp_path):
    write_parts(tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((10, 32, 32), np.uint8))
    with pytest.raises(DataError, match="different data sets"):
        open_dataset(f"fashion-mnist:{tmp_path}")
