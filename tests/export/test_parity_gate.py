"""The gate around the export and the verification: what passes, what fails, and what each leaves behind."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
import torch
from PIL import Image

from admth_export import (
    ExportResult,
    Gate,
    ImageChoice,
    OnnxOptions,
    ParityReport,
    export_onnx,
    exporting,
    verify,
    worker_process,
)
from admth_export.candidate_process import run_candidate
from admth_export.gate_images import load_gate_images
from admth_export.onnx_export import build_graph, set_manifest
from admth_export.parity_plot import parity_figure
from admth_runtime import read_model
from admth_runtime.errors import (
    CheckpointError,
    DataError,
    DeviceError,
    InputError,
    ManifestError,
    ModelError,
    OutputError,
    ParityError,
)
from admth_runtime.files import sha256_of_file
from admth_training.checkpoint import load_run
from admth_training.config import NetworkConfig
from admth_training.data import open_dataset
from admth_training.splits import Splits, choose_splits, write_splits

RUN_FILES = ["config.json", "model.safetensors"]
MODEL_FILES = ["model.onnx", "model.parity.json", "model.parity.png"]
FAILED_FILES = ["model.parity.failed.json", "model.parity.failed.png"]
QUICK = ImageChoice(database_images=0)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def tampered(change):
    """Build the graph of a network that was changed behind the reference's back."""

    def build(network, shape, options):
        network = copy.deepcopy(network)
        with torch.no_grad():
            change(network)
        return build_graph(network, shape, options)

    return build


@pytest.fixture
def old_model(exported, tiny_run):
    """A run with a good model in place, as (run, contents by name)."""
    for name in MODEL_FILES:
        shutil.copy(exported / name, tiny_run / name)
    return tiny_run, {name: (tiny_run / name).read_bytes() for name in MODEL_FILES}


def test_an_export_leaves_the_model_with_its_report(exported):
    assert names(exported) == sorted(RUN_FILES + MODEL_FILES)
    model = read_model(exported / "model.onnx")
    report = json.loads((exported / "model.parity.json").read_text())
    assert report["passed"] is True
    assert report["failures"] == []
    assert report["gate"] == {"noise_threshold": 1e-3, "minimum_bit_parity": 0.9999}
    assert report["model"]["sha256"] == model.sha256
    assert report["model"]["bytes"] == (exported / "model.onnx").stat().st_size
    assert report["checkpoint_sha256"] == sha256_of_file(exported / "model.safetensors")
    assert report["engine"]["name"] == "onnxruntime"
    assert report["images"] == {
        "dataset": report["images"]["dataset"],
        "split": "query",
        "images": 24,
        "split_size": 24,
        "broken": 0,
        "database_images": 48,
        "database_size": 48,
        "seed": 0,
    }
    assert [run["batch_size"] for run in report["runs"]] == [32, 1, 3]
    for run in report["runs"]:
        assert run["images"] == 24
        assert list(run["lengths"]) == ["8", "16"]
        for length, parity in run["lengths"].items():
            assert parity["bits"] == 24 * int(length) == sum(parity["margins"]["bits"])
            assert parity["bit_parity"] >= 1 - 1 / parity["bits"]
            assert 0 < parity["max_logit_error"] < 1e-3
    for effect in report["retrieval"].values():
        assert 1 / 3 < effect["reference_map"] <= 1
        assert effect["difference"] == effect["candidate_map"] - effect["reference_map"]
    with Image.open(exported / "model.parity.png") as picture:
        assert picture.width > 800


def test_the_manifest_holds_the_summary(exported):
    manifest = read_model(exported / "model.onnx").manifest
    assert manifest.checkpoint_sha256 == sha256_of_file(exported / "model.safetensors")
    assert manifest.network["backbone"] == "efficientnet_lite0"
    assert manifest.parity is not None
    assert manifest.parity["passed"] is True
    assert manifest.parity["images"] == 24
    assert manifest.parity["batch_sizes"] == [32, 1, 3]
    assert manifest.parity["bit_parity"].keys() == {"8", "16"}
    assert manifest.parity["max_logit_error"] < 1e-3


def test_without_the_gate_the_manifest_says_so_and_an_old_report_goes(old_model):
    run, _ = old_model
    result = export_onnx(run, verify=False)
    assert isinstance(result, ExportResult)
    assert (result.parity, result.report, result.picture) == (None, None, None)
    assert read_model(result.model).manifest.parity is None
    assert result.sha256 == sha256_of_file(result.model)
    assert names(run) == sorted([*RUN_FILES, "model.onnx"])


def test_a_flip_above_the_threshold_leaves_no_model_and_keeps_the_old_one(old_model, monkeypatch):
    run, before = old_model
    monkeypatch.setattr(exporting, "build_graph", tampered(lambda network: network.branches[1][-1].weight[5].neg_()))
    with pytest.raises(
        ParityError, match=r"model\.onnx fails the parity gate.*16 bits: bit 5 of image .*\.png flipped"
    ):
        export_onnx(run, images=QUICK)
    assert names(run) == sorted(RUN_FILES + MODEL_FILES + FAILED_FILES)
    assert {name: (run / name).read_bytes() for name in MODEL_FILES} == before
    report = json.loads((run / "model.parity.failed.json").read_text())
    assert report["passed"] is False
    assert report["model"]["sha256"] is None
    assert any("bit parity" in line for line in report["failures"])
    flips = report["runs"][0]["lengths"]["16"]["flips"]
    assert {flip["bit"] for flip in flips} == {5}
    assert report["runs"][0]["lengths"]["8"]["flip_count"] == 0
    # Mended, the next export takes the failure's report away.
    monkeypatch.undo()
    export_onnx(run, images=QUICK)
    assert names(run) == sorted(RUN_FILES + MODEL_FILES)


def test_logits_that_are_not_finite_fail_by_name(tiny_run, monkeypatch):
    monkeypatch.setattr(
        exporting, "build_graph", tampered(lambda network: network.branches[0][-1].bias[2].fill_(torch.nan))
    )
    with pytest.raises(ParityError, match=r"24 of 192 values of logits_8 are not finite, first bit 2 of image .*png"):
        export_onnx(tiny_run, images=QUICK)
    assert names(tiny_run) == sorted(RUN_FILES + FAILED_FILES)


def test_noise_is_counted_and_a_stricter_gate_fails_it(tiny_run, monkeypatch):
    def shift_by_noise(network):
        for branch in network.branches:
            branch[-1].bias.add_(0.02)

    monkeypatch.setattr(exporting, "build_graph", tampered(shift_by_noise))
    result = export_onnx(tiny_run, images=QUICK, gate=Gate(0.05, 0.5))
    assert result.parity is not None
    assert result.parity.flip_count > 0
    assert result.manifest.parity is not None
    assert result.manifest.parity["flips"] == result.parity.flip_count
    assert 0 < result.manifest.parity["max_flip_margin"] <= 0.02
    figure = parity_figure(result.parity)
    assert len(figure.axes) == 2
    assert any("flip" in axes.get_title(loc="left") for axes in figure.axes)
    assert "noise threshold 0.05" in result.parity.table()
    strict = verify(result.model, images=QUICK)
    assert not strict.passed
    assert any("noise threshold 0.001" in line for line in strict.failures)
    assert "FAILED" in parity_figure(strict).get_suptitle()


def test_a_crash_while_the_model_is_built_leaves_nothing(tiny_run, monkeypatch):
    def broken(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "check_file", broken)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(tiny_run, images=QUICK)
    assert names(tiny_run) == RUN_FILES


def test_verify_agrees_with_the_export(exported):
    report = verify(exported / "model.onnx", images=ImageChoice(images=10, database_images=5), threads=1)
    assert isinstance(report, ParityReport)
    assert report.passed
    assert report.engine.threads == 1
    assert (report.images.images, report.images.split_size, report.images.database_images) == (10, 24, 5)
    assert [run.image_count for run in report.runs] == [10, 10, 10]
    assert report.model.sha256 == sha256_of_file(exported / "model.onnx")


def test_verify_finds_codes_that_are_not_packed_signs(exported, tmp_path):
    model = onnx.load(exported / "model.onnx")
    values = next(item for item in model.graph.initializer if item.name == "bit_values")
    backwards = onnx.numpy_helper.to_array(values)[::-1].copy()
    values.CopyFrom(onnx.numpy_helper.from_array(backwards, "bit_values"))
    onnx.save(model, tmp_path / "lsb.onnx")
    report = verify(tmp_path / "lsb.onnx", exported, images=QUICK)
    assert not report.passed
    assert "codes of code_8 are not the packed signs of logits_8, first that of image" in report.failures[0]


def test_verify_takes_the_gate_of_the_manifests_precision(exported, tmp_path):
    float16 = pytest.importorskip("onnxruntime.transformers.float16")
    manifest = read_model(exported / "model.onnx").manifest
    half = float16.convert_float_to_float16(onnx.load(exported / "model.onnx"), keep_io_types=True)
    set_manifest(half, type(manifest)(**{**vars(manifest), "precision": "fp16", "parity": None}))
    onnx.save(half, tmp_path / "half.onnx")
    report = verify(tmp_path / "half.onnx", exported, images=QUICK)
    assert report.gate == Gate.of_precision("fp16")
    assert report.model.precision == "fp16"
    assert max(parity.max_logit_error for parity in report.runs[0].lengths.values()) > 1e-5


def test_verify_refuses_other_weights_unless_told(exported, tmp_path, make_network, make_run, pictures):
    other = make_run(
        tmp_path / "other",
        make_network(NetworkConfig(input_size=32, hidden=16, code_lengths=(8, 16)), seed=1),
        f"folder:{pictures}",
    )
    with pytest.raises(CheckpointError, match=r"came from other weights .* --any-checkpoint"):
        verify(exported / "model.onnx", other, images=QUICK)
    report = verify(exported / "model.onnx", other, images=QUICK, any_checkpoint=True)
    assert not report.passed
    assert report.model.checkpoint_sha256 != report.checkpoint_sha256
    lengths = make_run(
        tmp_path / "lengths",
        make_network(NetworkConfig(input_size=32, hidden=16, code_lengths=(8,))),
        f"folder:{pictures}",
    )
    with pytest.raises(ManifestError, match=r"code lengths \[8, 16\] and the run .* has \[8\]"):
        verify(exported / "model.onnx", lengths, any_checkpoint=True)


def test_verify_refuses_other_preprocessing(exported, tiny_run):
    config = json.loads((tiny_run / "config.json").read_text())
    config["preprocessing"]["interpolation"] = "box"
    (tiny_run / "config.json").write_text(json.dumps(config))
    with pytest.raises(ManifestError, match="preprocess images differently"):
        verify(exported / "model.onnx", tiny_run)


def test_export_refuses_a_config_whose_parts_disagree(tiny_run):
    config = json.loads((tiny_run / "config.json").read_text())
    config["preprocessing"]["height"] = 64
    (tiny_run / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="64x32 pixels and the network takes 32x32"):
        export_onnx(tiny_run)
    assert names(tiny_run) == RUN_FILES


def test_the_first_of_two_exports_wins(tiny_run):
    started = threading.Event()
    outcome: list[object] = []

    def first() -> None:
        started.set()
        outcome.append(export_onnx(tiny_run, images=QUICK))

    thread = threading.Thread(target=first)
    thread.start()
    started.wait()
    lock = tiny_run / ".model.onnx.lock"
    while thread.is_alive() and not lock.exists():
        time.sleep(0.001)
    with pytest.raises(OutputError, match="is being written by another export"):
        export_onnx(tiny_run, images=QUICK)
    thread.join()
    assert isinstance(outcome[0], ExportResult)
    assert names(tiny_run) == sorted(RUN_FILES + MODEL_FILES)


def test_a_killed_engine_is_one_line(exported, monkeypatch, make_pixels):
    started: list[subprocess.Popen] = []

    class Watched(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)
            threading.Timer(0.3, self.kill).start()

    monkeypatch.setattr(worker_process.subprocess, "Popen", Watched)
    with pytest.raises(DeviceError, match=r"the process that ran m\.onnx was ended by SIGKILL"):
        run_candidate(exported / "model.onnx", make_pixels(3, 32), [(1, 3)] * 50_000, name="m.onnx")
    assert started[0].returncode == -9


def test_an_engine_that_cannot_start_is_one_line(exported, monkeypatch, make_pixels, tmp_path):
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))
    with pytest.raises(DeviceError, match=r"the process that ran m\.onnx failed with exit code 1 \(.+\)") as caught:
        run_candidate(exported / "model.onnx", make_pixels(3, 32), [(1, 3)], name="m.onnx")
    assert "\n" not in str(caught.value)


def test_what_the_runtime_says_there_is_raised_here(exported, make_pixels, tmp_path):
    (tmp_path / "m.onnx").write_bytes((exported / "model.onnx").read_bytes()[:-40_000])
    with pytest.raises(ModelError, match=r"^good\.onnx"):
        run_candidate(tmp_path / "m.onnx", make_pixels(3, 32), [(1, 3)], name="good.onnx")
    with pytest.raises(InputError, match=r"\[3, 40, 40, 3\]|\[1, 40, 40, 3\]|uint8"):
        run_candidate(exported / "model.onnx", make_pixels(3, 40), [(1, 3)])


def test_the_engine_runs_without_pytorch(exported):
    program = (
        "import sys; from admth_export import candidate; import admth_export; "
        "print(sorted({'torch', 'onnx', 'admth_training'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_images_are_the_runs_own_queries_in_a_seeded_order(tiny_run, pictures):
    trained = load_run(tiny_run)
    dataset = open_dataset(f"folder:{pictures}")
    queries = choose_splits(dataset, query_size=24).query
    images = load_gate_images(trained, ImageChoice(images=10, database_images=0))
    again = load_gate_images(trained, ImageChoice(images=10, database_images=7))
    other = load_gate_images(trained, ImageChoice(images=10, database_images=0, seed=1))
    assert set(images.indices) <= set(queries)
    np.testing.assert_array_equal(images.indices, again.indices)
    np.testing.assert_array_equal(images.pixels, again.pixels)
    assert again.database is not None
    assert len(again.database) == 7
    assert set(again.database.indices).isdisjoint(queries)
    assert list(other.indices) != list(images.indices)
    assert images.names[0] == dataset.describe(int(images.indices[0]))
    np.testing.assert_array_equal(images.labels, dataset.labels[images.indices])
    # Splits that the run kept come first.
    splits = choose_splits(dataset, query_size=9, train_size=20, seed=5)
    write_splits(tiny_run / "splits.json", splits, dataset)
    kept = load_gate_images(load_run(tiny_run), ImageChoice())
    assert sorted(kept.indices) == list(splits.query)
    named = load_gate_images(load_run(tiny_run), ImageChoice(data=f"folder:{pictures}"))
    assert sorted(named.indices) == list(splits.query)


def test_data_that_is_gone_asks_for_other_data(tmp_path, tiny_network, make_run, pictures):
    run = make_run(tmp_path / "run", tiny_network, f"folder:{tmp_path / 'gone'}")
    with pytest.raises(DataError, match=r"trained on cannot be used .*gone does not exist.*: name it with --data"):
        export_onnx(run)
    assert names(run) == RUN_FILES
    images = load_gate_images(load_run(run), ImageChoice(data=f"folder:{pictures}"))
    assert images.facts.images == 7  # the default tenth of 72


def test_broken_images_are_left_out_and_counted_and_many_are_refused(tmp_path, tiny_network, make_run, make_pixels):
    folder = tmp_path / "many"
    for name in ("left", "right"):
        (folder / name).mkdir(parents=True)
        for index, pixels in enumerate(make_pixels(55, 8)):
            Image.fromarray(pixels).save(folder / name / f"{index:02}.png")
    run = make_run(tmp_path / "run", tiny_network, f"folder:{folder}", query_size=None)
    dataset = open_dataset(f"folder:{folder}")
    splits = Splits(query=np.arange(105), train=np.arange(105, 110), database=np.arange(105, 110))
    write_splits(run / "splits.json", splits, dataset)
    (folder / "left" / "07.png").write_bytes(b"no picture")
    images = load_gate_images(load_run(run), ImageChoice())
    assert (images.facts.images, images.facts.broken) == (104, 1)
    assert len(images.pixels) == len(images.names) == len(images.labels) == 104
    assert 7 not in images.indices
    (folder / "right" / "00.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 105 images are broken, more than 1.0%.*\.png"):
        load_gate_images(load_run(run), ImageChoice())


@pytest.mark.parametrize("values", [{"images": 0}, {"images": 1.5}, {"database_images": -1}, {"seed": -1}])
def test_choices_out_of_range_are_refused(values):
    with pytest.raises(InputError, match="is not an integer from"):
        ImageChoice(**values)


def test_an_exporter_that_fails_is_one_line(tiny_network, monkeypatch):
    def refuse(*arguments, **options):
        raise torch.onnx.OnnxExporterError("no\nsuch operator")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ModelError, match=r"cannot export this network with opset 20 \(no such operator\)"):
        build_graph(tiny_network, (32, 32, 3), OnnxOptions())
