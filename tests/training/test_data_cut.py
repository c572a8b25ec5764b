"""The cut of Fashion-MNIST that the repository ships."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from admth_training.data import open_dataset
from admth_training.data.fashion_mnist import read_part
from admth_training.leakage import check_leakage

ROOT = Path(__file__).parents[2]
MINI = ROOT / "examples" / "fashion-mnist-mini"
FULL = Path("/usr/share/datasets/fashion-mnist")


def run(*arguments):
    command = [sys.executable, str(ROOT / "examples" / "cut_fashion_mnist.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_counts_balance_and_licence():
    dataset = open_dataset(f"fashion-mnist:{MINI}")
    splits = dataset.official_splits
    assert (len(splits.query), len(splits.train), len(splits.database)) == (1000, 5000, 5000)
    assert dataset.labels[splits.query].sum(axis=0).tolist() == [100] * 10
    assert dataset.labels[splits.train].sum(axis=0).tolist() == [500] * 10
    assert "Copyright (c) 2017 Zalando SE, https://tech.zalando.com" in (MINI / "LICENSE").read_text()
    assert sum(path.stat().st_size for path in MINI.iterdir()) < 3_500_000


def test_no_query_is_identical_to_a_database_image():
    dataset = open_dataset(f"fashion-mnist:{MINI}")
    report = check_leakage(dataset, dataset.official_splits)
    assert report.content_checked and report.identical_queries == 0


@pytest.mark.skipif(not FULL.is_dir(), reason="the full Fashion-MNIST (package dataset-fashion-mnist) is not installed")
def test_the_script_makes_what_is_shipped(tmp_path):
    done = run(FULL, tmp_path / "cut", "--train", 5000, "--test", 1000, "--seed", 0)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in MINI.iterdir()) == sorted(path.name for path in (tmp_path / "cut").iterdir())
    for part in ("train", "t10k"):
        for shipped, made in zip(read_part(MINI, part), read_part(tmp_path / "cut", part), strict=True):
            np.testing.assert_array_equal(shipped, made)
    # zlib-ng compresses otherwise; the values are compared above in any case.
    if "ng" not in zlib.ZLIB_RUNTIME_VERSION:
        for path in MINI.iterdir():
            assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name


def test_cutting_the_cut_is_repeatable_and_depends_on_the_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(MINI, tmp_path / name, "--train", 100, "--test", 50, "--seed", seed).returncode == 0
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "abc"]
    assert files[0] == files[1] != files[2]
    assert open_dataset(f"fashion-mnist:{tmp_path / 'a'}").labels.sum(axis=0).tolist() == [15] * 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((MINI, "out", "--train", "5001"), "5001 train images are no multiple of 10"),
        ((MINI, "out", "--test", "2000"), "from 10 to 1000"),
        ((MINI, "out", "--test", "0"), "0 t10k images"),
        ((MINI, "out", "--seed", "-1"), "--seed -1 is negative"),
        (("nowhere", "out"), "holds neither train-images-idx3-ubyte"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, arguments, message):
    source, target, *rest = arguments
    done = run(source, tmp_path / target, *rest)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / target).exists()
