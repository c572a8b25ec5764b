"""The kinds of calibration images: lists, Fashion-MNIST, emoji and folders, with the labels that they have."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from admth_calibration.images import PixelBatches, open_images
from admth_runtime.errors import DataError, InputError
from admth_runtime.preprocessing import PreprocessingSpec, preprocess


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "package" / "img" / "google" / "64"
    folder.mkdir(parents=True)
    entries = []
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 4), dtype=np.uint8)
        pixels[:32, :, 3] = 0
        Image.fromarray(pixels).save(folder / f"{number}.png")
        entries.append({"image": f"{number}.png", "category": "a", "subcategory": "b", "has_img_google": number != 2})
    entries[3]["obsoleted_by"] = "0"
    (tmp_path / "package" / "emoji.json").write_text(json.dumps(entries))
    return tmp_path / "package"


@pytest.mark.parametrize("kind", ["emoji", "emoji-category", "emoji-subcategory"])
def test_emoji_are_read_without_their_labels(package, kind):
    """The kinds of the training data set differ in labels alone, so that a run's specification can be used again."""
    spec = PreprocessingSpec(16, 16)
    for place in (package, package.parent):
        images = open_images(f"{kind}:{place}")
        assert (images.name, len(images)) == ("emoji", 2)
        pixels = images.load(1, spec)
        np.testing.assert_array_equal(pixels, preprocess(package / "img/google/64/1.png", spec))
        assert (pixels[:6] == 255).all() and (pixels[10:] < 255).any()


def test_what_is_no_package(package, tmp_path):
    with pytest.raises(DataError, match=r"nowhere holds no emoji\.json: unpack the npm package"):
        open_images(f"emoji:{tmp_path / 'nowhere'}")
    with pytest.raises(InputError, match="--root and --strip-prefix mean nothing"):
        open_images(f"emoji:{package}", root=tmp_path)
    (package / "img" / "apple" / "64").mkdir(parents=True)
    with pytest.raises(DataError, match="holds 2 folders img/VENDOR/64, not one"):
        open_images(f"emoji:{package}")


@pytest.mark.parametrize("text", ["[{", "{}x", "5", "[5]", '[{"image": 5}]', "[{}]"])
def test_a_broken_listing(package, text):
    (package / "emoji.json").write_text(text)
    with pytest.raises(DataError, match=r"emoji\.json is truncated or no list of emoji \(.*\): unpack") as caught:
        open_images(f"emoji:{package}")
    assert "\n" not in str(caught.value)


def test_an_empty_listing(package):
    (package / "emoji.json").write_text("[]")
    assert len(open_images(f"emoji:{package}")) == 0


def test_lists(pictures, tmp_path):
    listing = tmp_path / "train.txt"
    names = [path.name for path in sorted(pictures.iterdir())[:3]]
    listing.write_text(f"/data/{names[0]} 0 1\n\n/data/{names[1]}\t1 0\n/data/{names[2]}\n")
    images = open_images(f"list:{listing}", root=pictures, strip_prefix="/data/")
    assert list(images.sources) == [pictures / name for name in names]
    assert len(open_images(f"list:{tmp_path}", root=pictures, strip_prefix="/data/")) == 3
    spec = PreprocessingSpec(32, 32)
    assert images.load(1, spec).shape == (32, 32, 3)
    listing.write_text("\n")
    with pytest.raises(DataError, match="is empty: write the path"):
        open_images(f"list:{listing}")


def test_fashion_mnist(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    content = struct.pack(">HBB3I", 0, 8, 3, *values.shape) + values.tobytes()
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(content))
    images = open_images(f"fashion-mnist:{tmp_path}")
    assert len(images) == 5
    pixels = images.load(2, PreprocessingSpec(28, 28))
    np.testing.assert_array_equal(pixels, np.repeat(values[2][:, :, None], 3, axis=2))
    file.write_bytes(gzip.compress(content[:-3]))
    with pytest.raises(DataError, match="does not hold the 5 images of its header"):
        open_images(f"fashion-mnist:{tmp_path}")
    file.write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(DataError, match="is truncated or corrupt"):
        open_images(f"fashion-mnist:{tmp_path}")
    file.write_bytes(gzip.compress(b"hello"))
    with pytest.raises(DataError, match="is no IDX file of images"):
        open_images(f"fashion-mnist:{tmp_path}")
    file.unlink()
    with pytest.raises(DataError, match="holds neither train-images"):
        open_images(f"fashion-mnist:{tmp_path}")


def test_the_same_pixels_as_in_training(tmp_path):
    """Two readers of one format must not drift apart."""
    from admth_training.data import open_dataset

    folder = Path(__file__).parents[2] / "examples" / "fashion-mnist-mini"
    ours, theirs = open_images(f"fashion-mnist:{folder}"), open_dataset(f"fashion-mnist:{folder}")
    spec = PreprocessingSpec(32, 32)
    assert len(ours) == len(theirs.official_splits.train)
    for index in (0, 17, len(ours) - 1):
        np.testing.assert_array_equal(ours.load(index, spec), theirs.load(index, spec))


@pytest.mark.parametrize("spec", ["pictures", "zip:pictures", "folder:", "folder: "])
def test_specifications_that_name_nothing(spec):
    with pytest.raises(InputError, match="names no images: write kind:path, one of folder:DIR, list:FILE"):
        open_images(spec)


def test_paths_that_are_nothing(tmp_path):
    with pytest.raises(DataError, match="does not exist: pass a folder of images"):
        open_images(f"folder:{tmp_path / 'no'}")
    with pytest.raises(InputError, match="no images in"):
        open_images(f"folder:{tmp_path}")
    with pytest.raises(DataError, match="cannot be read"):
        open_images(f"list:{tmp_path / 'no.txt'}")
    with pytest.raises(InputError, match="--root and --strip-prefix mean nothing"):
        open_images(f"folder:{tmp_path}", root=tmp_path)


def test_labels(pictures, tmp_path):
    spec = PreprocessingSpec(16, 16)
    assert open_images(f"folder:{pictures}").labels is None  # files stand in the folder itself
    files = sorted(pictures.iterdir())[:4]
    for file, name in zip(files, ("bag", "bag", "coat", "boot"), strict=True):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / file.name).write_bytes(file.read_bytes())
    images = open_images(f"folder:{tmp_path}")
    names = {path.name: label for path, label in zip(images.sources, images.labels, strict=True)}
    assert [names[file.name] for file in files] == [{"bag"}, {"bag"}, {"coat"}, {"boot"}]
    (tmp_path / "stray.png").write_bytes(files[0].read_bytes())
    assert open_images(f"folder:{tmp_path}").labels is None
    listing = tmp_path / "train.txt"
    listing.write_text("stray.png 0 1 1\nbag/" + files[0].name + "\t1 0 0\n")
    images = open_images(f"list:{listing}")
    assert images.labels == [{"1", "2"}, {"0"}]
    batches = PixelBatches(images, np.array([1, 0]), spec)
    assert [len(batch) for batch in batches] == [2]
    assert batches.read == [1, 0]


def test_fashion_mnist_has_labels_where_their_file_is(tmp_path):
    folder = Path(__file__).parents[2] / "examples" / "fashion-mnist-mini"
    images = open_images(f"fashion-mnist:{folder}")
    assert {name for label in images.labels for name in label} == set("0123456789")
    for file in folder.glob("train-images*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert open_images(f"fashion-mnist:{tmp_path}").labels is None
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, 5000) + bytes(4999))
    with pytest.raises(DataError, match="does not hold one label for each of the 5,000 images"):
        open_images(f"fashion-mnist:{tmp_path}")


def test_what_cannot_be_read_is_left_out_and_digests_say_so(pictures, tmp_path):
    for path in sorted(pictures.iterdir())[:10]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    images, spec = open_images(f"folder:{tmp_path}"), PreprocessingSpec(16, 16)

    def read():
        batches = PixelBatches(images, np.arange(10), spec, batch_size=4)
        return batches, [len(batch) for batch in batches]

    whole, sizes = read()
    assert (sizes, whole.done, whole.read, whole.broken) == ([4, 4, 2], 10, list(range(10)), [])
    assert read()[0].digest == whole.digest
    for index in (2, 5, 7):
        images.sources[index].write_bytes(b"no picture")
    fewer, sizes = read()
    assert (sizes, fewer.done, fewer.read) == ([4, 3], 7, [0, 1, 3, 4, 6, 8, 9])
    assert len(fewer.broken) == 3
    assert fewer.digest != whole.digest
    images.sources[9].write_bytes(b"")
    with pytest.raises(
        DataError, match=r"4 images of folder:.* cannot be read, the first: .*002\.png.*: mend or remove"
    ):
        read()
