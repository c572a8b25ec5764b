"""Encoding that is killed at random moments and gone on with: no image lost, none twice, no file unreadable.

``ADMTH_SOAK_KILLS=100 pytest tests/runtime/test_corpus_soak.py`` is the long form.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from _corpus import command, part_files, succeeds
from PIL import Image

from admth_runtime.corpus import read_corpus

KILLS = int(os.environ.get("ADMTH_SOAK_KILLS", "8"))
IMAGES, SHARD = 600, 10


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_path) -> Path:
    """A model, 600 pictures, no two alike and five bad, and the corpus of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("soak")
    (folder / "model.onnx").symlink_to(tiny_path)
    (folder / "pictures").mkdir()
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        path = folder / "pictures" / f"{number:04}.jpg"
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((700, 700), Image.Resampling.BILINEAR).save(path, quality=85)
        if number % 120 == 7:
            path.write_bytes(b"no picture")
    succeeds(*encode(folder / "undisturbed"), cwd=folder)
    return folder


def encode(out: Path) -> list[object]:
    return ["encode", "pictures", "--out", out, "--shard-size", SHARD, "--batch", 4, "--workers", 2]


def children_of(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def wait_a_random_while(choice: random.Random, process: subprocess.Popen, out: Path, whole: int) -> None:
    """Wait for any moment: from the start on, half of the times, else from the first new part on."""
    if choice.random() < 0.5:
        time.sleep(choice.uniform(0.1, 2.0))
        return
    while process.poll() is None and len(list(out.glob("part-*.parquet"))) <= whole:
        time.sleep(0.002)
    time.sleep(choice.uniform(0, 0.3))


def kill_something(choice: random.Random, process: subprocess.Popen) -> str:
    """Kill the command, one of its workers, or all at once as a power cut would, and then what is left."""
    victims = {"command": [process.pid], "workers": children_of(process.pid)}
    what = choice.choice(["command", "one worker", "all"])
    if what == "one worker":
        chosen = victims["workers"][:1]
    else:
        chosen = victims["command"] + (victims["workers"] if what == "all" else [])
    for victim in chosen:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    if what == "one worker":  # the command replaces it; give it a moment and then take the command
        time.sleep(choice.uniform(0, 1))
        process.kill()
    process.wait()
    return what


def check_whole(out: Path, before: dict[str, bytes]) -> dict[str, bytes]:
    """Whatever has its name is whole, readable, and what it was; return it."""
    found = {path.name: path.read_bytes() for path in out.glob("part-*.parquet")}
    assert {name: found.get(name) for name in before} == before
    for path in out.glob("[!.]*.parquet"):
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            assert file.read().num_rows == file.metadata.num_rows
    if (out / "corpus.json").exists():
        read_corpus(out, allow_incomplete=True)
    return found


@pytest.mark.timeout(60 + 10 * KILLS)
def test_killed_again_and_again(home, tmp_path):
    choice = random.Random(6)
    kills = corpora = 0
    happened: dict[str, int] = {}
    parts: list[int] = []
    while kills < KILLS:
        out, whole, corpora = tmp_path / f"corpus{corpora}", {}, corpora + 1
        while kills < KILLS:
            process = subprocess.Popen(
                command(*encode(out)), cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            wait_a_random_while(choice, process, out, len(whole))
            finished = process.poll() is not None
            if not finished:
                what = kill_something(choice, process)
                happened[what] = happened.get(what, 0) + 1
                kills += 1
            else:
                assert process.returncode == 0
            whole = check_whole(out, whole) if out.exists() else {}
            parts.append(len(whole))
            if finished:
                break
        succeeds(*encode(out), cwd=home)
        assert part_files(out) == part_files(home / "undisturbed")
        check_complete(out)
    print(f"{kills} kills {happened} over {corpora} corpora of {IMAGES // SHARD} parts, which had {parts} when killed")


def check_complete(out: Path) -> None:
    """Every image of the folder has one row, and the bad ones one error."""
    tables = [pq.read_table(path) for path in sorted(out.glob("part-*.parquet"))]
    uris = [uri for table in tables for uri in table["uri"].to_pylist()]
    assert uris == [f"pictures/{number:04}.jpg" for number in range(IMAGES)]
    ids = [number for table in tables for number in table["id"].to_pylist()]
    assert len(set(ids)) == IMAGES
    errors = pq.read_table(out / "errors.parquet")["uri"].to_pylist()
    assert errors == [f"pictures/{number:04}.jpg" for number in range(7, IMAGES, 120)]
    assert sorted(path.name for path in out.glob(".*")) == [".lock"]
