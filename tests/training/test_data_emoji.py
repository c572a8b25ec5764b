"""The emoji data set: a small package of the same form, its labels, its splits, and what can be wrong with it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from admth_runtime.errors import DataError, InputError
from admth_runtime.preprocessing import PreprocessingSpec
from admth_training.data import ArraySource, ImageDataset, open_dataset
from admth_training.data.dataset import one_hot
from admth_training.leakage import check_leakage
from admth_training.splits import choose_splits, make_splits, read_splits, write_splits

SPEC = PreprocessingSpec(8, 8)


def entry(number, category, subcategory, **others):
    return {
        "name": f"NAME {number}",
        "unified": f"{number:04X}",
        "image": f"{number:04x}.png",
        "category": category,
        "subcategory": subcategory,
        "has_img_google": True,
        "has_img_apple": True,
        **others,
    }


def picture(number, mode="RGBA"):
    """Return a picture of its own for each number, transparent at the left."""
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[:, :32, 3] = 0
    image = Image.fromarray(pixels)
    if mode == "P":
        return image.quantize(16)
    return image.convert(mode)


@pytest.fixture
def package(tmp_path):
    """Return a function that writes a package: one entry a picture, with variants and the other files around it."""

    def write(entries, *, drawings=None, root=tmp_path / "package"):
        folder = root / "img" / "google" / "64"
        folder.mkdir(parents=True)
        (root / "img" / "google" / "sheets").mkdir()
        for position, item in enumerate(entries):
            drawn = (drawings or {}).get(position, position)
            (drawn if isinstance(drawn, Image.Image) else picture(drawn)).save(folder / item["image"])
            for variant in item.get("skin_variations", {}).values():
                picture(1000 + position).save(folder / variant["image"])
        (root / "emoji.json").write_text(json.dumps(entries), encoding="utf-8")
        return root

    return write


ENTRIES = [
    entry(0, "Food & Drink", "food-fruit"),
    entry(1, "People & Body", "hand", skin_variations={"1F3FB": {"unified": "1-1F3FB", "image": "0001-1f3fb.png"}}),
    entry(2, "Food & Drink", "drink"),
    entry(3, "People & Body", "hand", obsoleted_by="0005"),
    entry(4, "Food & Drink", "drink", has_img_google=False),
    entry(5, "People & Body", "person", obsoletes="0003"),
]


def test_labels_are_categories_and_subcategories(package):
    dataset = open_dataset(f"emoji:{package(ENTRIES)}")
    assert dataset.name == "emoji" and not dataset.single_label
    assert dataset.class_names == (
        *("Food & Drink", "People & Body"),
        *("Food & Drink/drink", "Food & Drink/food-fruit", "People & Body/hand", "People & Body/person"),
    )
    # Neither the variant in another skin tone, nor the obsolete entry, nor the one without a picture.
    keys = [dataset.sources.key(index) for index in range(len(dataset))]
    assert keys == [f"img/google/64/{number:04x}.png" for number in (0, 1, 2, 5)]
    assert dataset.labels.tolist() == [[1, 0, 0, 1, 0, 0], [0, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("kind", "names", "numbers"),
    [
        ("emoji-category", ("Food & Drink", "People & Body"), [0, 1, 0, 1]),
        (
            "emoji-subcategory",
            ("Food & Drink/drink", "Food & Drink/food-fruit", "People & Body/hand", "People & Body/person"),
            [1, 2, 0, 3],
        ),
    ],
)
def test_one_of_the_labels_alone(package, kind, names, numbers):
    dataset = open_dataset(f"{kind}:{package(ENTRIES)}")
    assert (dataset.name, dataset.class_names) == (kind, names)
    np.testing.assert_array_equal(dataset.labels, one_hot(np.asarray(numbers), len(names)))


def test_the_folder_that_the_package_was_unpacked_in_will_do(package, tmp_path):
    package(ENTRIES)
    outer, inner = open_dataset(f"emoji:{tmp_path}"), open_dataset(f"emoji:{tmp_path / 'package'}")
    assert outer.listing_digest() == inner.listing_digest()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_pictures_of_every_mode_stand_on_white(package, mode):
    dataset = open_dataset(f"emoji:{package(ENTRIES[:1] + ENTRIES[2:3], drawings={0: picture(7, mode)})}")
    pixels = dataset.load(0, SPEC)
    assert pixels.shape == (8, 8, 3) and pixels.dtype == np.uint8
    assert (pixels[:, :3] == 255).all() and (pixels[:, 5:] < 255).any()


def test_equal_pictures_become_one_with_the_labels_of_all(package):
    dataset = open_dataset(f"emoji:{package(ENTRIES, drawings={5: 1})}")
    assert [dataset.sources.key(index)[-8:] for index in range(len(dataset))] == ["0000.png", "0001.png", "0002.png"]
    assert {name for name, label in zip(dataset.class_names, dataset.labels[1], strict=True) if label} == {
        *("People & Body", "People & Body/hand", "People & Body/person")
    }
    # So no query can find itself.
    splits = make_splits(dataset, query_size=1, train_size=1, seed=0)
    assert check_leakage(dataset, splits).warnings() == []


def many(count=120):
    """Return entries of three subcategories, a half, a third and a sixth of them."""
    kinds = [("A", "half")] * 3 + [("A", "third")] * 2 + [("B", "sixth")]
    return [entry(number, *kinds[number % 6]) for number in range(count)]


def test_splits_keep_subcategories_in_proportion_whatever_the_labels(package, tmp_path):
    root = package(many())
    drawn = []
    for kind in ("emoji", "emoji-category", "emoji-subcategory"):
        dataset = open_dataset(f"{kind}:{root}")
        splits = choose_splits(dataset, query_size=24, train_size=48, seed=3, train_in_database=False)
        assert np.bincount(dataset.strata[splits.query]).tolist() == [12, 8, 4]
        assert np.bincount(dataset.strata[splits.train]).tolist() == [24, 16, 8]
        assert len(splits.database) == 48 and not np.intersect1d(splits.train, splits.database).size
        drawn.append(splits.query.tolist())
        write_splits(tmp_path / f"{kind}.json", splits, dataset)
        assert read_splits(tmp_path / f"{kind}.json", dataset).query.tolist() == splits.query.tolist()
    assert drawn[0] == drawn[1] == drawn[2]
    with pytest.raises(DataError, match=r"was made for emoji with 120 images"):
        read_splits(tmp_path / "emoji.json", dataset)
    assert choose_splits(dataset, query_size=24, seed=4).query.tolist() != drawn[0]


@settings(max_examples=100, deadline=None)
@given(
    counts=st.lists(st.integers(1, 15), min_size=1, max_size=6), share=st.floats(0.01, 0.99), seed=st.integers(0, 50)
)
def test_a_stratum_gives_its_share_rounded(counts, share, seed):
    strata = np.repeat(np.arange(len(counts)), counts).astype(np.int64)
    total = len(strata)
    if total < 2:
        return
    size = min(max(1, round(share * total)), total - 1)
    images = np.arange(total * 4, dtype=np.uint8).reshape(total, 2, 2)
    labels = np.ones((total, 2), dtype=np.uint8)
    dataset = ImageDataset("toy", labels, ("a", "b"), ArraySource(images, (("toy", total),)), strata=strata)
    query = make_splits(dataset, query_size=size, train_size=1, seed=seed).query
    assert len(np.unique(query)) == size
    given_ = np.bincount(strata[query], minlength=len(counts))
    assert (np.abs(given_ - np.asarray(counts) * size / total) < 1.0 + 1e-9).all()


def test_every_picture_can_be_drawn(package):
    dataset = open_dataset(f"emoji:{package(many(24))}")
    drawn = {int(index) for seed in range(60) for index in choose_splits(dataset, query_size=3, seed=seed).query}
    assert drawn == set(range(24))


def test_strata_of_another_length_are_refused():
    source = ArraySource(np.zeros((3, 2, 2), np.uint8), (("toy", 3),))
    with pytest.raises(DataError, match=r"strata of dtype int64 and shape \(2,\) are not int64 \[3\]"):
        ImageDataset("toy", np.ones((3, 1), np.uint8), ("a",), source, strata=np.zeros(2, np.int64))


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_is_no_package(package, tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist: unpack the npm package emoji-datasource-google"):
        open_dataset(f"emoji:{tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no emoji\.json: unpack the npm package"):
        open_dataset(f"emoji:{tmp_path / 'empty'}")
    root = package(ENTRIES)
    with pytest.raises(DataError, match=r"emoji\.json is a file: "):
        open_dataset(f"emoji:{root / 'emoji.json'}")
    with pytest.raises(InputError, match="--root and --strip-prefix mean nothing"):
        open_dataset(f"emoji:{root}", root=tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"image": "0000.png", "cat', r"emoji\.json is truncated or no JSON \("),
        (b"\xff\xfe\x00", r"emoji\.json is truncated or no JSON \("),
        ("{}", r"emoji\.json is no list of emoji: "),
        ("[]", r"emoji\.json is no list of emoji: "),
        ("[5]", r"entry 0 lacks one of the texts image, category, subcategory: "),
        ('[{"image": "a.png", "category": null, "subcategory": "b"}]', r"entry 0 lacks one of the texts "),
        (
            '[{"image": "../a.png", "category": "a", "subcategory": "b"}]',
            r"the image '../a\.png', which is no file name",
        ),
        ('[{"image": "a.png", "category": "a", "subcategory": "b", "has_img_google": false}]', "no pictures by google"),
    ],
)
def test_a_broken_listing(package, text, message):
    root = package(ENTRIES)
    (root / "emoji.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(f"emoji:{root}")
    assert "\n" not in str(caught.value)


def test_missing_pictures_are_counted_and_named(package):
    root = package(ENTRIES)
    for number in (2, 5):
        (root / f"img/google/64/{number:04x}.png").unlink()
    with pytest.raises(DataError, match=r"64 lacks 2 of the 4 pictures of emoji\.json, such as 0002\.png: unpack"):
        open_dataset(f"emoji:{root}")


def test_the_folder_of_pictures_must_be_one(package):
    root = package(ENTRIES)
    (root / "img" / "apple" / "64").mkdir(parents=True)
    with pytest.raises(DataError, match="holds 2 folders img/VENDOR/64, not one"):
        open_dataset(f"emoji:{root}")
    for vendor in ("apple", "google"):
        (root / "img" / vendor).rename(root / vendor)
    with pytest.raises(DataError, match="holds no folder img/VENDOR/64, not one"):
        open_dataset(f"emoji:{root}")


def test_the_command_line_trains_on_it(package, tmp_path):
    command = [sys.executable, "-m", "admth_training", "fit", "--data", f"emoji:{package(many(60))}", "--json"]
    command += [
        "--query-size",
        "12",
        "--input-size",
        "32",
        "--hidden",
        "8",
        "--code-lengths",
        "8",
        "--epochs",
        "1",
        "--batch-size",
        "16",
    ]
    command += ["--no-pretrained", "--freeze-trunk", "--threads", "1", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["train_images"] == 48
    splits = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert (splits["dataset"], splits["images"], splits["seed"], len(splits["query"])) == ("emoji", 60, 0, 12)
