from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from _codes import encoded_images, trained_codes
from _tiny_model import save_tiny_model
from PIL import Image

from admth_runtime import HashIndex, HashRuntime, read_codes, write_codes


def run(*arguments, cwd):
    command = [sys.executable, "-m", "admth_runtime", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=120)


def succeeds(*arguments, cwd):
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def fails(*arguments, cwd):
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, pictures, their codes in two files, and an index."""
    folder = tmp_path_factory.mktemp("home")
    save_tiny_model(folder / "model.onnx")
    generator = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number in range(12):
        pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number:02}.png")
    succeeds("encode", "pictures", "--out", "codes.npz", "--logits", cwd=folder)
    done = succeeds("index", "build", "codes.npz", "--out", "photos.index", "--multi-index", cwd=folder)
    assert done.stdout.startswith("wrote photos.index: 12 images, ")
    assert "next:  admth-run index search photos.index" in done.stdout
    return folder


def test_search_gives_what_the_index_gives(home):
    index = HashIndex.load(home / "codes.npz")
    pictures = ["pictures/03.png", "pictures/07.png"]
    with HashRuntime(home / "model.onnx", threads=1) as runtime:
        codes = runtime.encode([home / picture for picture in pictures])
    for options, how in (([], {}), (["--mode", "coarse", "--rerank", "asymmetric"],
                                    {"mode": "coarse", "rerank": "asymmetric"}),
                         (["--length", 16], {"length": 16}), (["--mode", "multi-index"], {})):  # fmt: skip
        done = succeeds("index", "search", "photos.index", *pictures, *options, "-k", 4, "--json", cwd=home)
        found = json.loads(done.stdout)
        hits = index.search(codes, 4, **how)
        assert found["images"] == 12
        assert found["length"] == how.get("length", 64)
        assert [answer["query"] for answer in found["queries"]] == pictures
        for number, answer in enumerate(found["queries"]):
            assert [hit["id"] for hit in answer["hits"]] == hits.ids[number].tolist()
            assert [hit["distance"] for hit in answer["hits"]] == hits.distances[number].tolist()
            assert [hit["uri"] for hit in answer["hits"]] == index.uris_of(hits.ids[number])
            assert ("score" in answer["hits"][0]) == ("rerank" in how)
            assert answer["code"] == codes[found["length"]][number].tobytes().hex()


def test_search_prints_a_table_and_takes_codes(home, tmp_path):
    done = succeeds("index", "search", "photos.index", "pictures/03.png", "--rerank", "weighted", "-k", 2, cwd=home)
    title, head, first, _ = done.stdout.splitlines()
    assert title == "pictures/03.png: nearest of 12 images at 64 bits"
    assert head.split() == ["rank", "distance", "score", "uri"]
    assert first.split() == ["1", "0", "0.00", "pictures/03.png"]
    codes = read_codes(home / "codes.npz").codes.hex(32)[:2]
    done = succeeds("index", "search", home / "photos.index", *codes, "-k", 1, cwd=tmp_path)
    assert [line.split()[-1] for line in done.stdout.splitlines()[2::3]] == ["pictures/00.png", "pictures/01.png"]
    done = succeeds("search", codes[0], "--index", home / "photos.index", "-k", 99, "--json", cwd=tmp_path)
    assert "holds 12 images, fewer than -k 99" in done.stderr
    assert len(json.loads(done.stdout)["hits"]) == 12


def test_changing_an_index(home, tmp_path):
    succeeds("index", "build", home / "codes.npz", "--out", "an.index", cwd=tmp_path)
    message = fails("index", "add", "an.index", home / "codes.npz", cwd=tmp_path)
    assert "12 ids are in the index already, 0 first: replace them, give the new images other ids" in message
    done = succeeds("index", "add", "an.index", home / "codes.npz", "--renumber", cwd=tmp_path)
    assert done.stdout.startswith("wrote an.index: 24 images (+12), ")
    done = succeeds("index", "add", "an.index", home / "codes.npz", "--replace", "--json", cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert (facts["before"], facts["added"], facts["images"]) == (24, 12, 24)
    (tmp_path / "ids.txt").write_text("5\n6\n")
    done = succeeds("index", "delete", "an.index", "--ids", "0,1", "--ids-from", "ids.txt", cwd=tmp_path)
    assert done.stdout.startswith("wrote an.index: 20 images (-4), ")
    assert HashIndex.load(tmp_path / "an.index").ids.tolist() == [2, 3, 4, *range(7, 24)]
    assert "the ids [0] are not in this index" in fails("index", "delete", "an.index", "--ids", "0,2", cwd=tmp_path)
    facts = json.loads(succeeds("index", "info", "an.index", "--verify", "--json", cwd=tmp_path).stdout)
    assert (facts["images"], facts["bit_order"], facts["code_lengths"]) == (20, "msb", [16, 32, 48, 64])
    assert facts["verified_files"] >= 3
    assert "code lengths" in succeeds("info", "an.index", cwd=tmp_path).stdout


def test_what_goes_wrong_is_one_line(home, tmp_path):
    index = home / "photos.index"
    assert "holds an index already: choose another --out" in fails(
        "index", "build", "codes.npz", "--out", "photos.index", cwd=home
    )
    assert "no such file" in fails("index", "build", "absent.npz", "--out", "x.index", cwd=home)
    assert not (home / "x.index").exists()
    assert "holds no index: make one with" in fails("index", "add", "codes.npz", "codes.npz", cwd=home)
    assert "no ids were given" in fails("index", "delete", index, cwd=home)
    (tmp_path / "ids.txt").write_text("5 x")
    assert "write an id a line" in fails("index", "delete", index, "--ids-from", tmp_path / "ids.txt", cwd=home)
    assert "no such image file" in fails("index", "search", index, "absent.jpg", cwd=home)
    assert "ask for one kind at a time" in fails("index", "search", index, "00ff", "pictures/03.png", cwd=home)
    assert "mode 'coarse' needs the query's 16-bit code" in fails(
        "index", "search", index, "00" * 8, "--mode", "coarse", cwd=home
    )
    assert "-k 0 is less than 1" in fails("index", "search", index, "00" * 8, "-k", 0, cwd=home)
    write_codes(tmp_path / "none.npz", encoded_images({n: t[:0] for n, t in trained_codes(5).items()}))
    succeeds("index", "build", "none.npz", "--out", "none.index", cwd=tmp_path)
    assert "holds no images: add some first" in fails("index", "search", "none.index", "00" * 8, cwd=tmp_path)
    save_tiny_model(tmp_path / "another.onnx", seed=9)
    message = fails("index", "search", index, "pictures/03.png", "--model", tmp_path / "another.onnx", cwd=home)
    assert "the query's model" in message
