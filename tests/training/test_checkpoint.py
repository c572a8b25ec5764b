"""A run's folder: weights and configuration come back exactly, and what does not fit together is named."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from admth_runtime.errors import CheckpointError, OutputError
from admth_training.checkpoint import (
    load_run,
    load_run_config,
    read_metrics,
    save_network,
    save_run_config,
    save_tensors,
)
from admth_training.network import build_network


@pytest.fixture
def run(tmp_path, tiny_config):
    config = tiny_config()
    network = build_network(config.network, seed=3)
    network.trunk.stem.norm.running_mean.normal_()
    save_run_config(tmp_path, config)
    save_network(tmp_path / "model.safetensors", network)
    return tmp_path, config, network


def edit_config(folder, change):
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


def test_a_run_comes_back_to_the_bit(run):
    folder, config, network = run
    loaded = load_run(folder)
    assert loaded.config == config
    assert not loaded.network.training
    state = network.state_dict()
    found = loaded.network.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert len(loaded.checkpoint_sha256) == 64


def test_the_weights_are_safetensors_that_others_read(run):
    folder, _, network = run
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert set(file.keys()) == set(network.state_dict())
        assert file.metadata()["format"] == "pt"
    # The format starts with the length of its JSON header: no pickle.
    content = (folder / "model.safetensors").read_bytes()
    json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])


def test_equal_weights_give_equal_files(run, tmp_path):
    folder, _, network = run
    save_network(tmp_path / "again.safetensors", network)
    assert (tmp_path / "again.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v["network"].update(hidden=24),
            r"branches\.0\.0\.weight is .*\[16, 1280\] instead of .*\[24, 1280\]",
        ),
        (lambda v: v["network"].update(code_lengths=[8, 24]), "instead of"),
        (lambda v: v["network"].update(code_lengths=[8, 16, 24]), "is missing"),
        (lambda v: v["network"].update(attention=False), "attention.squeeze.weight is unknown"),
        (lambda v: v["network"].update(backbone="cnnf", input_size=67), "and .* more: restore the config.json"),
    ],
)
def test_weights_of_another_configuration_are_refused(run, change, message):
    folder = run[0]
    edit_config(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)


def test_weights_of_another_type_are_refused(run):
    folder = run[0]
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"float16 .* instead of float32"):
        load_run(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format_version=2), "format version 2 is not 1: pip install -U admth"),
        (lambda v: v.pop("network"), "the part 'network' is missing"),
        (lambda v: v["network"].update(code_lengths=[12]), "code length 12"),
        (lambda v: v["fit"].update(schedule="cosine"), r"\['schedule'\] are unknown"),
        (lambda v: v["preprocessing"].update(fit="pad"), "fit 'pad' is unknown"),
        (lambda v: v["data"].pop("spec"), "spec"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(run, change, message):
    folder = run[0]
    edit_config(folder, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_run(folder)
    assert str(folder / "config.json") in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_a_broken_configuration_is_one_line(run, content):
    folder = run[0]
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_run_config(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_refused(run, keep):
    path = run[0] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        load_run(run[0])


def test_missing_files_say_which_command_makes_them(tmp_path, run):
    with pytest.raises(CheckpointError, match=r"is not a run's folder.*admth-train fit --out"):
        load_run(tmp_path / "nowhere")
    (run[0] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors.*--resume"):
        load_run(run[0])


def test_metrics_leave_an_unfinished_last_line_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert [record["epoch"] for record in read_metrics(tmp_path)] == [1, 2]
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo\n{"epoch": 3}\n')
    with pytest.raises(CheckpointError, match="line 2 is not JSON"):
        read_metrics(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no metrics\.jsonl"):
        read_metrics(tmp_path / "nowhere")


def test_weights_that_cannot_be_written_leave_nothing(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        save_tensors(tmp_path / "file" / "model.safetensors", {"a": torch.zeros(2)}, metadata={})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
