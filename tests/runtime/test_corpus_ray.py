"""Encoding a corpus on Ray: a real cluster of 4 logical CPUs on this machine, one for all of these tests."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from _corpus import make_pictures, make_tar, part_files, picture, succeeds
from PIL import Image

from admth_runtime import DeviceError, InputError
from admth_runtime.corpus import CorpusOptions, encode_corpus, read_corpus
from admth_runtime.corpus.ray_workers import RayWorkers, _room
from admth_runtime.corpus.shard_encoder import WorkerConfig

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'admth[ray]'")

COPIES = 60


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster that this process is connected to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            object_store_memory=80_000_000,
        )
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_path) -> Path:
    """A model, pictures of which two are bad, and sixty names of a picture that takes 50 ms to decode."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "model.onnx").symlink_to(tiny_path)
    make_pictures(folder / "pictures", 90, bad=(3, 50))
    (folder / "large").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (1100, 1100, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "large" / "00.png", compress_level=1)
    for copy in range(1, COPIES):
        (folder / "large" / f"{copy:02}.png").hardlink_to(folder / "large" / "00.png")
    return folder


def options(**changes) -> CorpusOptions:
    return CorpusOptions(**{"shard_size": 8, "batch": 4, "logits": True, "max_error_rate": 0.1, **changes})


def test_the_command_gives_the_bytes_of_local_processes(home, cluster, tmp_path, tiny_path):
    done = succeeds(
        "encode", "pictures", "--out", tmp_path / "ray", "--shard-size", 8, "--batch", 4, "--logits",
        "--max-error-rate", 0.1, "--ray", cluster, "--json", cwd=home,
    )  # fmt: skip
    summary = json.loads(done.stdout)
    assert (summary["runner"], summary["workers"], summary["images"], summary["errors"]) == ("ray", 4, 90, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        encode_corpus(["pictures"], tiny_path, tmp_path / "local", options(workers=1))
    assert part_files(tmp_path / "ray") == part_files(tmp_path / "local")


def test_a_worker_killed_in_the_middle_is_replaced(home, cluster, tmp_path, tiny_path, monkeypatch):
    out = tmp_path / "ray"
    killed: list[int] = []

    def kill_the_first_to_finish_a_shard() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for path in out.glob("part-*_stats.json"):
                killed.append(int(json.loads(path.read_text())["worker"].split()[1]))
                os.kill(killed[0], signal.SIGKILL)
                return
            time.sleep(0.005)

    started: list[int] = []
    start = RayWorkers.start
    monkeypatch.setattr(RayWorkers, "start", lambda pool: started.append(start(pool)) or started[-1])
    killer = threading.Thread(target=kill_the_first_to_finish_a_shard)
    killer.start()
    summary = encode_corpus([home / "large"], tiny_path, out, options(shard_size=4, ray="auto"))
    killer.join()
    assert killed
    assert summary.images_encoded == COPIES
    assert started == [1, 2, 3, 4, 5]
    encode_corpus([home / "large"], tiny_path, tmp_path / "local", options(shard_size=4, workers=2))
    assert part_files(out) == part_files(tmp_path / "local")
    assert len(read_corpus(out)) == COPIES


def test_what_a_worker_finds_wrong_is_said_as_on_one_machine(cluster, tmp_path, tiny_path):
    tar = make_tar(tmp_path / "a.tar", {f"{n}.png": picture(n) for n in range(3)})
    encode_corpus([tar], tiny_path, tmp_path / "c", options(ray="auto", workers=1, shard_size=1))
    (tmp_path / "c" / "part-00001.parquet").unlink()
    make_tar(tmp_path / "a.tar", {f"{n}.png": picture(n) for n in (2, 1, 0)})
    with pytest.raises(InputError, match=r"a\.tar was changed since it was listed"):
        encode_corpus([tar], tiny_path, tmp_path / "c", options(ray="auto", shard_size=1))


def test_a_cluster_without_room(cluster):
    config = WorkerConfig("c", "m.onnx", "cpu", None, 16, 16, False)
    with pytest.raises(
        DeviceError, match="the Ray cluster has 4 CPUs and 0 GPUs and a worker needs 16 CPUs: pass fewer"
    ):
        RayWorkers(config, address="auto", gpu=False)
    assert _room({"CPU": 16.0, "GPU": 2.0}, 3, gpu=False) == 5
    assert _room({"CPU": 16.0, "GPU": 2.0}, 3, gpu=True) == 2
