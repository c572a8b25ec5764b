"""Training on a small folder of pictures: what is written, what is frozen, and what does not change the result."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from admth_runtime.errors import CheckpointError, DataError, DeviceError, OutputError, TrainingError
from admth_runtime.preprocessing import PreprocessingSpec
from admth_training.checkpoint import load_run, read_metrics
from admth_training.config import FitConfig, NetworkConfig, ObjectiveConfig
from admth_training.data import open_dataset
from admth_training.encode import encode_split, reference_logits
from admth_training.evaluate import evaluate_run, open_run_data
from admth_training.features import CachedFeatures, FeatureStream, PixelStream, make_source
from admth_training.fitting import fit, select_device
from admth_training.loader import PixelLoader
from admth_training.network import build_network
from admth_training.optim import learning_rate, make_optimizer
from admth_training.seeds import dropout_seed, epoch_order, mirrored_images
from admth_training.splits import read_splits

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Keep small matrices on one thread: two only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(folder):
    return load_run(folder).network.state_dict()


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_writes_its_files_and_learns(tmp_path, tiny_config):
    config = tiny_config(epochs=20, batch_size=15, pretrained=True, network={"hidden": 256})
    result = fit(config, tmp_path / "run", device="cpu")
    names = {path.name for path in (tmp_path / "run").iterdir()} - {".lock"}
    assert names == set(result.files)
    assert names == {"model.safetensors", "config.json", "metrics.jsonl", "splits.json", "state.safetensors"}
    records = read_metrics(tmp_path / "run")
    assert [record["epoch"] for record in records] == list(range(1, 21))
    assert set(records[0]) == {
        "epoch",
        "loss",
        "likelihood",
        "consistency",
        "learning_rate",
        "images_per_second",
        "seconds",
    }
    for record in records:
        expected = 20 * record["likelihood"] + record["consistency"]
        assert record["loss"] == pytest.approx(expected, rel=1e-5)
    assert records[-1]["likelihood"] < 0.8 * records[0]["likelihood"]
    assert result.final == records[-1]
    assert (result.train_images, result.broken_images, result.trained_epochs) == (30, 0, 20)
    loaded = load_run(tmp_path / "run")
    dataset, splits = open_run_data(loaded)
    assert np.array_equal(splits.train, read_splits(tmp_path / "run" / "splits.json", dataset).train)
    evaluation = evaluate_run(loaded, dataset, splits)
    assert evaluation.metrics[16].mean_average_precision[None] > 0.6


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_frozen_trunk_does_not_change(tmp_path, tiny_config, pretrained):
    config = tiny_config(pretrained=pretrained)
    fit(config, tmp_path / "run", device="cpu")
    before = build_network(config.network, pretrained=pretrained, seed=0).state_dict()
    after = weights(tmp_path / "run")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("trunk.") for name in changed)
    assert {name for name in before if not name.startswith("trunk.")} == changed


def test_a_fresh_trunk_is_trained_with_batch_statistics(tmp_path, tiny_config):
    config = tiny_config(freeze_trunk=False, epochs=1)
    fit(config, tmp_path / "run", device="cpu")
    before, after = build_network(config.network, seed=0).state_dict(), weights(tmp_path / "run")
    assert not torch.equal(before["trunk.stem.conv.weight"], after["trunk.stem.conv.weight"])
    assert not torch.equal(before["trunk.stem.norm.running_mean"], after["trunk.stem.norm.running_mean"])


def test_a_pretrained_trunk_keeps_its_running_statistics(tmp_path, tiny_config):
    config = tiny_config(freeze_trunk=False, epochs=1, pretrained=True)
    fit(config, tmp_path / "run", device="cpu")
    before, after = build_network(config.network, pretrained=True).state_dict(), weights(tmp_path / "run")
    for name in before:
        if name.startswith("trunk."):
            statistic = "running" in name or "tracked" in name
            assert torch.equal(before[name], after[name]) == statistic, name


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        ({"backbone": "cnnf", "input_size": 67, "split": "fc6"}, {"optimizer": "sgd", "freeze_trunk": False}),
        ({"code_lengths": (24,)}, {"optimizer": "sgd"}),
        ({"code_lengths": (16, 32, 48, 64), "map_direction": "long-to-short"}, {"precision": "bf16"}),
        ({"attention": False}, {"flip": False, "clip_norm": 0.0}),
        ({}, {"freeze_trunk": False, "precision": "bf16"}),
    ],
)
def test_every_kind_of_run_trains(tmp_path, tiny_config, network, settings):
    result = fit(tiny_config(network=network, epochs=1, **settings), tmp_path / "run", device="cpu")
    assert math.isfinite(result.final["loss"])
    logits = encode_logits(tmp_path / "run")
    assert all(bool(np.isfinite(values).all()) for values in logits.values())


def encode_logits(folder):
    run = load_run(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (5, *run.config.preprocessing.shape), dtype=np.uint8)
    return reference_logits(run.network, pixels)


def test_seeds_workers_and_memory_do_not_change_the_result(tmp_path, tiny_config):
    config = tiny_config(freeze_trunk=False, epochs=1, batch_size=16)
    fit(config, tmp_path / "a", device="cpu", workers=1)
    fit(config, tmp_path / "b", device="cpu", workers=4, memory_limit_bytes=0)
    fit(dataclasses.replace(config, fit=dataclasses.replace(config.fit, seed=1)), tmp_path / "c", device="cpu")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_training_leaves_the_global_generator_alone(tmp_path, tiny_config):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    fit(tiny_config(epochs=1), tmp_path / "run", device="cpu")
    assert torch.equal(before, torch.random.get_rng_state())


def sources(tiny_folder, *, workers=2):
    dataset = open_dataset(f"folder:{tiny_folder}")
    network = build_network(NetworkConfig(input_size=32, hidden=16, code_lengths=(8, 16)), seed=0)
    indices = np.arange(3, 30)
    loader = PixelLoader(dataset, indices, PreprocessingSpec(32, 32), workers=workers)
    return dataset, network, loader


def test_cached_features_are_the_streamed_ones(tiny_folder):
    dataset, network, loader = sources(tiny_folder)
    order = epoch_order(0, 1, len(loader))
    mirrored = mirrored_images(0, 1, len(dataset))
    assert 0 < mirrored[3:30].sum() < 27
    cached = list(CachedFeatures(network, loader, CPU, mirror=True).batches(order, mirrored, 10))
    streamed = list(FeatureStream(network, loader, CPU).batches(order, mirrored, 10))
    assert [len(batch) for batch in cached] == [10, 10, 7]
    for one, two in zip(cached, streamed, strict=True):
        assert np.array_equal(one.indices, two.indices)
        assert torch.equal(one.labels, two.labels)
        torch.testing.assert_close(one.inputs, two.inputs, rtol=1e-4, atol=1e-5)
        assert not one.inputs.is_inference()
        assert not two.inputs.is_inference()


def test_mirrored_pixels_are_mirrored_left_to_right(tiny_folder):
    dataset, _, loader = sources(tiny_folder)
    mirrored = np.zeros(len(dataset), dtype=bool)
    mirrored[4] = True
    batch = next(PixelStream(loader, CPU).batches(np.array([0, 1, 2]), mirrored, 3))
    for row, index in enumerate([3, 4, 5]):
        expected = dataset.load(index, PreprocessingSpec(32, 32))
        expected = expected[:, ::-1] if index == 4 else expected
        assert np.array_equal(batch.inputs[row].numpy(), expected)


def test_features_that_do_not_fit_are_computed_anew_and_said_so(tiny_folder, capsys):
    _, network, loader = sources(tiny_folder)
    needed = 27 * 2 * 1280 * 4
    source = make_source(network, loader, CPU, frozen=True, mirror=True, memory_limit_bytes=needed)
    assert isinstance(source, CachedFeatures)
    assert capsys.readouterr().err == ""
    source = make_source(network, loader, CPU, frozen=True, mirror=True, memory_limit_bytes=needed - 1)
    assert isinstance(source, FeatureStream)
    assert "computing them in every epoch" in capsys.readouterr().err


def test_a_run_without_memory_trains_the_same_to_rounding(tmp_path, tiny_config):
    # Without dropout and with one batch an epoch, since rounding is all that may differ.
    config = tiny_config(epochs=1, network={"dropout": 0.0}, batch_size=30)
    fit(config, tmp_path / "cached", device="cpu")
    fit(config, tmp_path / "streamed", device="cpu", memory_limit_bytes=0)
    one, two = read_metrics(tmp_path / "cached")[0], read_metrics(tmp_path / "streamed")[0]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


def test_broken_images_are_left_out_of_cached_features(tmp_path, tiny_folder):
    import shutil

    root = tmp_path / "data"
    shutil.copytree(tiny_folder, root)
    (root / "red" / "03.png").write_bytes(b"not an image")
    dataset = open_dataset(f"folder:{root}")
    broken = next(i for i in range(len(dataset)) if dataset.describe(i).endswith("red/03.png"))
    loader = PixelLoader(dataset, np.arange(len(dataset)), PreprocessingSpec(32, 32), max_broken_rate=0.1)
    network = build_network(NetworkConfig(input_size=32, hidden=16), seed=0)
    cached = CachedFeatures(network, loader, CPU, mirror=False)
    batches = list(cached.batches(np.arange(len(dataset)), None, 1))
    assert len(batches) == len(dataset) - 1
    assert broken not in np.concatenate([batch.indices for batch in batches])


def test_epochs_draw_anew_and_repeat_by_seed():
    assert np.array_equal(epoch_order(3, 5, 100), epoch_order(3, 5, 100))
    assert not np.array_equal(epoch_order(3, 5, 100), epoch_order(3, 6, 100))
    assert not np.array_equal(epoch_order(3, 5, 100), epoch_order(4, 5, 100))
    assert sorted(epoch_order(0, 1, 50)) == list(range(50))
    assert 400 < mirrored_images(0, 1, 1000).sum() < 600
    assert dropout_seed(0, 1) != dropout_seed(0, 2)
    # The draws of an image do not depend on how many others there are before it is reached.
    assert np.array_equal(mirrored_images(0, 1, 1000)[:10], mirrored_images(0, 1, 10))


def test_the_learning_rate_decays_in_steps():
    config = FitConfig(optimizer="sgd", decay_every=30, decay_factor=0.1)
    rates = [learning_rate(config, epoch) for epoch in (1, 30, 31, 60, 61)]
    assert rates == pytest.approx([0.15, 0.15, 0.015, 0.015, 0.0015])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_parameter_groups(optimizer):
    network = build_network(NetworkConfig(input_size=32, hidden=16), seed=0)
    made = make_optimizer(network, FitConfig(optimizer=optimizer, weight_decay=0.01), trunk_factor=0.1)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    seen = {}
    for group in made.param_groups:
        for parameter in group["params"]:
            seen[names[id(parameter)]] = (group["weight_decay"], group["rate_factor"])
    assert set(seen) == set(names.values())
    assert seen["trunk.stem.conv.weight"] == (0.01, 0.1)
    assert seen["trunk.stem.norm.weight"] == (0.0, 0.1)
    assert seen["branches.0.0.weight"] == (0.01, 1.0)
    assert seen["branches.0.0.bias"] == (0.0, 1.0)
    assert seen["maps.0"] == (0.0, 1.0)
    network.trunk.requires_grad_(False)
    made = make_optimizer(network, FitConfig(optimizer=optimizer), trunk_factor=0.1)
    assert not any("trunk" in names[id(p)] for group in made.param_groups for p in group["params"])


@pytest.mark.parametrize(
    ("settings", "objective", "message"),
    [
        ({"learning_rate": 100.0, "optimizer": "sgd", "clip_norm": 0.0}, {}, "learning rate of 100 is too high.*--lr"),
        ({"learning_rate": 100.0, "optimizer": "sgd", "clip_norm": 0.0, "precision": "bf16"}, {}, "--precision fp32"),
    ],
)
def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path, tiny_config, settings, objective, message):
    config = tiny_config(epochs=60, **settings)
    config = dataclasses.replace(config, objective=ObjectiveConfig(alpha=1e6, beta=1e6, **objective))
    with pytest.raises(TrainingError, match=r"no longer finite at step \d+ of epoch \d+: most likely") as caught:
        fit(config, tmp_path / "run", device="cpu")
    assert "\n" not in str(caught.value)
    import re

    assert re.search(message, str(caught.value))
    assert not (tmp_path / "run" / "model.safetensors").exists()
    for record in read_metrics(tmp_path / "run") if (tmp_path / "run" / "metrics.jsonl").exists() else []:
        assert math.isfinite(record["loss"])


def test_batches_of_one_pair_train(tmp_path, tiny_config):
    """With two images a batch, most batches are all similar or all dissimilar."""
    result = fit(tiny_config(batch_size=2, epochs=1), tmp_path / "run", device="cpu")
    assert math.isfinite(result.final["loss"])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(tmp_path / "run").values())


def test_data_that_is_too_small_is_refused_before_anything_is_written(tmp_path, tiny_config):
    with pytest.raises(DataError, match="batch size 31 exceeds the 30 training images: use --batch-size 30 or less"):
        fit(tiny_config(batch_size=31), tmp_path / "run", device="cpu")
    with pytest.raises(DataError):
        fit(tiny_config(data=tmp_path / "nowhere"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_last_batch_of_one_image_is_left_out(tmp_path, tiny_config):
    result = fit(tiny_config(batch_size=29, epochs=1), tmp_path / "run", device="cpu")
    assert math.isfinite(result.final["loss"])


def test_devices(monkeypatch):
    assert select_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto") == CPU
    with pytest.raises(DeviceError, match=r"device cuda cannot be had.*--device cpu"):
        select_device("cuda")
    with pytest.raises(DeviceError, match="device 'tpu' is unknown"):
        select_device("tpu")


def test_a_folder_with_a_run_is_left_alone(tmp_path, tiny_config):
    config = tiny_config(epochs=1)
    fit(config, tmp_path / "run", device="cpu")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(OutputError, match="already holds a finished run: continue it with --resume"):
        fit(config, tmp_path / "run", device="cpu")
    other = tiny_config(epochs=1, learning_rate=0.5, batch_size=10)
    with pytest.raises(CheckpointError) as caught:
        fit(other, tmp_path / "run", device="cpu", resume=True)
    assert "fit.batch_size is 8 there and 10 here; " in str(caught.value)
    assert "fit.learning_rate is 0.001 there and 0.5 here: leave" in str(caught.value)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    fit(other, tmp_path / "run", device="cpu", overwrite=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["fit"]["batch_size"] == 10


def test_reference_logits_do_not_depend_on_training_mode_or_autocast(tiny_config):
    network = build_network(tiny_config().network, seed=0).train()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    pixels.flags.writeable = False
    expected = reference_logits(network, pixels, batch_size=3)
    assert network.training
    assert network.trunk.stem.norm.training
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = reference_logits(network, pixels, batch_size=3)
    assert {length: values.shape for length, values in expected.items()} == {8: (7, 8), 16: (7, 16)}
    for length, values in expected.items():
        assert values.dtype == np.float32
        assert np.array_equal(values, again[length])
        np.testing.assert_allclose(values, reference_logits(network, pixels, batch_size=7)[length], atol=1e-5)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((2, 32, 32, 3), dtype=np.float32), r"float32 \[2, 32, 32, 3\] are not uint8 \[n, 32, 32, 3\]"),
        (np.zeros((2, 3, 32, 32), dtype=np.uint8), "are not uint8"),
        (np.zeros((32, 32, 3), dtype=np.uint8), "are not uint8"),
        (np.zeros((0, 32, 32, 3), dtype=np.uint8), "no images to encode"),
        ([1, 2], "list are not uint8"),
    ],
)
def test_wrong_pixels_are_refused(tiny_config, pixels, message):
    from admth_runtime.errors import InputError

    network = build_network(tiny_config().network, seed=0)
    with pytest.raises(InputError, match=message):
        reference_logits(network, pixels)


def test_an_encoded_split_is_the_reference(tiny_folder, tiny_config):
    dataset, _, loader = sources(tiny_folder)
    network = build_network(tiny_config().network, seed=0)
    encoded = encode_split(network, loader, batch_size=9)
    pixels = np.stack([dataset.load(index, PreprocessingSpec(32, 32)) for index in range(3, 30)])
    expected = reference_logits(network, pixels, batch_size=9)
    for length in (8, 16):
        assert np.array_equal(encoded.logits[length], expected[length])
        assert np.array_equal(encoded.codes[length], np.packbits(expected[length] > 0, axis=1))
    assert np.array_equal(encoded.labels, dataset.labels[3:30])
    assert encoded.indices.tolist() == list(range(3, 30))


def test_logits_that_are_not_finite_are_refused(tiny_config):
    network = build_network(tiny_config().network, seed=0)
    with torch.no_grad():
        network.branches[1][-1].bias[2] = float("nan")
    with pytest.raises(TrainingError, match="16-bit logits of image 0 are not finite"):
        reference_logits(network, np.zeros((1, 32, 32, 3), dtype=np.uint8))
