"""Folders of classes, HashNet's lists, and the specification of a data set."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from admth_runtime.errors import DataError, ImageError, InputError
from admth_runtime.preprocessing import PreprocessingSpec, preprocess
from admth_training.data import DATASETS, ArraySource, ImageDataset, PathSource, open_dataset

SPEC = PreprocessingSpec(8, 8)


def picture(path, seed=0, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def pictures(tmp_path):
    for number in range(6):
        picture(tmp_path / "images" / f"{number}.png", number)
    return tmp_path


# --- folder -----------------------------------------------------------------------------------------------------------


def test_folder_takes_its_folders_as_classes(tmp_path):
    root = tmp_path / "pets"
    for name, seed in (("dog/b.png", 1), ("dog/deep/a.jpg", 2), ("cat/x.PNG", 3), (".cache/no.png", 4)):
        picture(root / name, seed)
    write(root / "dog" / "notes.txt", "no image")
    picture(root / "dog" / ".hidden.png")
    dataset = open_dataset(f"folder:{root}")
    assert dataset.name == "folder:pets" and dataset.class_names == ("cat", "dog")
    assert [dataset.sources.key(i) for i in range(3)] == ["cat/x.PNG", "dog/b.png", "dog/deep/a.jpg"]
    assert dataset.labels.tolist() == [[1, 0], [0, 1], [0, 1]]
    assert dataset.official_splits is None and dataset.describe(1) == str(root / "dog" / "b.png")
    np.testing.assert_array_equal(dataset.load(1, SPEC), preprocess(root / "dog" / "b.png", SPEC))


def test_folder_is_the_same_wherever_it_lies(tmp_path):
    for place in ("one/pets", "two/pets"):
        picture(tmp_path / place / "a" / "1.png"), picture(tmp_path / place / "b" / "1.png")
    one, two = (open_dataset(f"folder:{tmp_path / place}/pets") for place in ("one", "two"))
    assert one.listing_digest() == two.listing_digest()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no folders of classes"),
        (["a.png"], "no folders of classes"),
        (["cat/a.png"], "only the class cat"),
        (["cat/a.png", "dog/readme.txt"], "dog holds no images"),
        (["train/cat/a.png", "test/cat/b.png"], "holds the splits test, train, not classes"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path, files, message):
    root = tmp_path / "data"
    root.mkdir()
    for name in files:
        if name.endswith(".txt"):
            (root / name).parent.mkdir()
            write(root / name, "x")
        else:
            picture(root / name)
    with pytest.raises(DataError, match=message):
        open_dataset(f"folder:{root}")


def test_a_class_may_be_called_train(tmp_path):
    picture(tmp_path / "train" / "a.png"), picture(tmp_path / "car" / "a.png")
    assert open_dataset(f"folder:{tmp_path}").class_names == ("car", "train")


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(f"folder:{tmp_path / 'nowhere'}")


# --- list -------------------------------------------------------------------------------------------------------------


def test_list_is_multi_label_and_relative_to_its_folder(pictures):
    file = write(pictures / "all.txt", "images/0.png 1 0 1\nimages/1.png 0 1 0\r\nimages/2.png  1 1 1 \n\n")
    dataset = open_dataset(f"list:{file}")
    assert dataset.name == "list:all" and dataset.official_splits is None and not dataset.single_label
    assert dataset.labels.tolist() == [[1, 0, 1], [0, 1, 0], [1, 1, 1]]
    np.testing.assert_array_equal(dataset.load(2, SPEC), preprocess(pictures / "images" / "2.png", SPEC))
    assert dataset.describe(0) == str(pictures / "images" / "0.png")


def test_root_and_prefix_rewrite_the_paths_of_another_machine(pictures):
    file = write(pictures / "nus.txt", "/home/who/nus/0.png 1 0\n/home/who/nus/1.png 0 1\n")
    options = {"root": pictures / "images", "strip_prefix": "/home/who/nus"}
    dataset = open_dataset(f"list:{file}", **options)
    assert dataset.sources.path(1) == pictures / "images" / "1.png" and dataset.sources.key(1) == "1.png"
    np.testing.assert_array_equal(dataset.load(1, SPEC), preprocess(pictures / "images" / "1.png", SPEC))
    with pytest.raises(
        DataError, match=r"no path starts with --strip-prefix '/mnt'; the first is /home/who/nus/0\.png"
    ):
        open_dataset(f"list:{file}", root=pictures, strip_prefix="/mnt")
    with pytest.raises(DataError, match=r"none of 2 probed images exists.*--root"):
        open_dataset(f"list:{file}")


def test_a_tab_ends_a_path_with_spaces(pictures):
    picture(pictures / "images" / "my cat.png")
    file = write(pictures / "tab.txt", "images/my cat.png\t0 1\nimages/1.png\t1\t0\n")
    dataset = open_dataset(f"list:{file}")
    assert dataset.labels.tolist() == [[0, 1], [1, 0]]
    assert dataset.load(0, SPEC).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (" \n\n", "is empty"),
        ("images/0.png 1 0\nimages/1.png 1\n", "line 2: 1 labels, but line 1 has 2"),
        ("images/0.png 1 0\nimages/1.png 1 0 0\n", "line 2: 3 labels, but line 1 has 2"),
        ("images/0.png 1 0\n\nimages/1.png 1 0\n", "line 2: the line is empty"),
        ("\nimages/1.png 1 0\n", "line 1: the line is empty"),
        ("images/0.png 1 0\nimages/1.png\n", "line 2: no labels follow the path images/1.png"),
        ("images/0.png 1 2\n", "line 1: label '2' is neither 0 nor 1"),
        ("images/0.png 1 0\nimages/my cat.png 1 0\n", "line 2: label 'cat.png' is neither 0 nor 1.*tab"),
        ("images/0.png 1 0\nimages/1.png 0 0\n", "line 2: all 2 labels are 0"),
        ("images/0.png 1 0\nimages/1.png 0 1\nimages/0.png 1 0\n", "line 3: repeats the image of line 1"),
        ("nowhere/0.png 1 0\n", "none of 1 probed images exists"),
    ],
)
def test_broken_lists_name_the_line(pictures, text, message):
    file = write(pictures / "bad.txt", text)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(f"list:{file}")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_a_list_that_is_no_text(pictures):
    with pytest.raises(DataError, match="is not UTF-8 text"):
        open_dataset(f"list:{pictures / 'images' / '0.png'}")
    with pytest.raises(DataError, match="no such file"):
        open_dataset(f"list:{pictures / 'nowhere.txt'}")


def lists(folder, test="0.png 1 0\n", train="1.png 0 1\n2.png 1 0\n", database="1.png 0 1\n3.png 1 1\n2.png 1 0\n"):
    for name, text in (("test", test), ("train", train), ("database", database)):
        write(folder / f"{name}.txt", text)


def test_a_folder_of_lists_brings_its_splits(pictures):
    lists(pictures)
    dataset = open_dataset(f"list:{pictures}", root=pictures / "images")
    assert len(dataset) == 4 and [dataset.sources.key(i) for i in range(4)] == ["0.png", "1.png", "2.png", "3.png"]
    splits = dataset.official_splits
    assert (splits.query.tolist(), splits.train.tolist(), splits.database.tolist()) == ([0], [1, 2], [1, 3, 2])
    assert dataset.labels.tolist() == [[1, 0], [0, 1], [1, 0], [1, 1]]


def test_folders_of_lists_that_disagree(pictures):
    lists(pictures, database="1.png 1 0\n")
    with pytest.raises(DataError, match=r"database\.txt, line 1: the labels of 1\.png differ .*train\.txt, line 1"):
        open_dataset(f"list:{pictures}", root=pictures / "images")
    lists(pictures, database="3.png 1 0 0\n")
    with pytest.raises(DataError, match=r"database\.txt, line 1: 3 labels, but .*test\.txt, line 1 has 2"):
        open_dataset(f"list:{pictures}", root=pictures / "images")
    (pictures / "test.txt").unlink()
    with pytest.raises(DataError, match=r"lacks test\.txt"):
        open_dataset(f"list:{pictures}")


# --- specification ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fashion", "names no kind: write kind:path"),
        ("cifar:data", "'cifar' is unknown: use one of fashion-mnist:DIR, folder:DIR, list:FILE or list:DIR"),
        ("folder:", "names no path: write folder:DIR"),
        ("list: ", "names no path"),
        ("", "names no kind"),
    ],
)
def test_specifications_that_mean_nothing(spec, message):
    with pytest.raises(InputError, match=message):
        open_dataset(spec)


def test_root_is_for_lists_and_must_exist(tmp_path):
    with pytest.raises(InputError, match="mean nothing for 'folder:x'"):
        open_dataset("folder:x", root=tmp_path)
    with pytest.raises(InputError, match=r"--root .* is not a folder"):
        open_dataset("list:x", root=tmp_path / "nowhere")
    assert set(DATASETS) == {"fashion-mnist", "folder", "list", "emoji", "emoji-category", "emoji-subcategory"}


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    picture(tmp_path / "pets" / "a" / "1.png"), picture(tmp_path / "pets" / "b" / "1.png")
    assert len(open_dataset("folder:~/pets")) == 2


# --- the data set itself ----------------------------------------------------------------------------------------------


def test_a_broken_image_is_an_image_error_with_its_path(tmp_path):
    picture(tmp_path / "a" / "1.png")
    (tmp_path / "b").mkdir()
    broken = tmp_path / "b" / "broken.png"
    broken.write_bytes((tmp_path / "a" / "1.png").read_bytes()[:60])
    dataset = open_dataset(f"folder:{tmp_path}")
    with pytest.raises(ImageError, match=r"broken\.png"):
        dataset.load(1, SPEC)


def test_data_sets_are_checked_when_they_are_made(tmp_path):
    source = ArraySource(np.zeros((2, 4, 4), np.uint8), (("a", 2),))
    good = np.eye(2, dtype=np.uint8)
    for labels, names, message in (
        (good.astype(np.int64), ("a", "b"), "not uint8"),
        (good * 2, ("a", "b"), "not multi-hot"),
        (np.zeros_like(good), ("a", "b"), "not multi-hot"),
        (good, ("a",), "1 class names"),
        (np.eye(3, dtype=np.uint8)[:, :2] | 1, ("a", "b"), "2 images and labels for 3"),
    ):
        with pytest.raises(DataError, match=message):
            ImageDataset("x", labels, names, source)
    with pytest.raises(InputError, match="not uint8"):
        ArraySource(np.zeros((2, 4, 4)), (("a", 2),))
    with pytest.raises(InputError, match="do not add up"):
        ArraySource(np.zeros((2, 4, 4), np.uint8), (("a", 3),))
    with pytest.raises(InputError, match="one key a path"):
        PathSource((tmp_path,), ())
