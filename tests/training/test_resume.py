"""Killed, interrupted and concurrent runs: the same weights to the bit, and never a half-written or shared folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from admth_runtime.errors import CheckpointError, DataError, OutputError
from admth_training.checkpoint import load_run, read_metrics
from admth_training.fitting import fit
from admth_training.network import build_network
from admth_training.optim import make_optimizer
from admth_training.state import load_state, run_lock, save_state, saved_epoch

EPOCHS = 10


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def arguments(tiny_folder):
    """Return the options of a run whose trunk is trained, with dropout, mirroring and batch statistics."""
    text = (
        f"--data folder:{tiny_folder} --query-size 6 --no-pretrained --input-size 32 --hidden 16 --code-lengths 8,16 "
        f"--batch-size 8 --epochs {EPOCHS} --decay-every 4 --dropout 0.5"
    )
    return text.split()


def start(*options):
    command = [sys.executable, "-m", "admth_training", "fit", "--threads", "1", "--save-interval", "0", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # A shell starts its background jobs, which the tests may be, with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def finish(process):
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def wait_for_epochs(process, folder, count):
    """Wait until so many epochs are in the metrics, the run still going."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.005)
    pytest.fail(f"no {count} epochs: {finish(process)}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, arguments):
    """Return the folder of a run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert finish(start("--out", str(folder), *arguments))[0] == 0
    return folder


def without_speed(folder):
    return [
        {name: value for name, value in record.items() if name not in ("seconds", "images_per_second")}
        for record in read_metrics(folder)
    ]


def assert_same_run(one, two):
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert without_speed(one) == without_speed(two)
    state_one, state_two = load_file(one / "state.safetensors"), load_file(two / "state.safetensors")
    assert set(state_one) == set(state_two)
    assert all(torch.equal(state_one[name], state_two[name]) for name in state_one)


def test_a_run_killed_twice_gives_the_same_weights(tmp_path, arguments, whole):
    folder = tmp_path / "run"
    process = start("--out", str(folder), *arguments)
    wait_for_epochs(process, folder, 2)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    assert not (folder / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="--resume"):
        load_run(folder)
    first = saved_epoch(folder)
    assert 1 <= first < EPOCHS

    process = start("--out", str(folder), "--resume")
    wait_for_epochs(process, folder, first + 2)
    process.send_signal(signal.SIGKILL)
    finish(process)
    second = saved_epoch(folder)
    assert first < second < EPOCHS

    code, out, err = finish(start("--out", str(folder), "--resume"))
    assert code == 0, err
    assert f"resuming after epoch {second} of {EPOCHS}" in err
    assert "next:" in out
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    ("number", "option", "refusal"),
    [
        (signal.SIGINT, "--resume", "is in use: another training run writes into it"),
        (signal.SIGTERM, "--json", "already holds an unfinished run: continue it with --resume"),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(tmp_path, arguments, whole, number, option, refusal):
    folder = tmp_path / "run"
    process = start("--out", str(folder), *arguments)
    wait_for_epochs(process, folder, 2)
    # It stands still while another one tries the same folder.
    process.send_signal(signal.SIGSTOP)
    refused = finish(start("--out", str(folder), *arguments, option))
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    code, _, err = finish(process)
    assert code == 130, err
    assert f"of {EPOCHS} is saved: continue with  admth-train fit --out {folder} --resume" in err
    assert "Traceback" not in err
    assert not [path.name for path in folder.iterdir() if ".tmp" in path.name]
    assert refused[0] == 1
    assert refused[2].count("\n") == 1
    assert refusal in refused[2]
    assert finish(start("--out", str(folder), "--resume"))[0] == 0
    assert_same_run(folder, whole)


def test_a_folder_in_use_is_refused(tmp_path, tiny_config):
    folder = tmp_path / "run"
    folder.mkdir()
    with run_lock(folder), pytest.raises(OutputError, match="is in use: another training run"):
        fit(tiny_config(), folder, device="cpu")
    assert [path.name for path in folder.iterdir()] == [".lock"]
    fit(tiny_config(), folder, device="cpu")


def test_a_run_that_was_killed_before_its_first_epoch_starts_again(tmp_path, tiny_config):
    config = tiny_config()
    fit(config, tmp_path / "whole", device="cpu")
    fit(config, tmp_path / "cut", device="cpu")
    for name in ("model.safetensors", "state.safetensors"):
        (tmp_path / "cut" / name).unlink()
    result = fit(config, tmp_path / "cut", device="cpu", resume=True)
    assert result.trained_epochs == 2
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_more_epochs_continue_a_finished_run(tmp_path, tiny_config, more_epochs):
    short = tiny_config(epochs=2)
    long = more_epochs(short, 4)
    fit(long, tmp_path / "whole", device="cpu", save_interval=0)
    fit(short, tmp_path / "run", device="cpu", save_interval=1000)
    result = fit(long, tmp_path / "run", device="cpu", resume=True)
    assert (result.epochs, result.trained_epochs) == (4, 2)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    again = fit(long, tmp_path / "run", device="cpu", resume=True)
    assert again.trained_epochs == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"fit\.epochs is 4 there and 3 here"):
        fit(more_epochs(short, 3), tmp_path / "run", device="cpu", resume=True)


def test_metrics_beyond_the_state_are_cut(tmp_path, tiny_config, more_epochs):
    config = tiny_config(epochs=3)
    fit(config, tmp_path / "whole", device="cpu")
    fit(more_epochs(config, 1), tmp_path / "run", device="cpu")
    extra = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)[1]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(extra.replace('"loss": ', '"loss": 9') + '{"epoch": 3, "lo')
    fit(config, tmp_path / "run", device="cpu", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_state_comes_back_to_the_bit(tmp_path, tiny_config, optimizer):
    config = tiny_config(optimizer=optimizer)
    network = build_network(config.network, seed=0)
    made = make_optimizer(network, config.fit, trunk_factor=1.0)
    pixels = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    for _ in range(2):
        made.zero_grad()
        sum(z.square().sum() for z in network(pixels)).backward()
        made.step()
    save_state(tmp_path, network, made, epoch=7)
    other = build_network(config.network, seed=1)
    restored = make_optimizer(other, config.fit, trunk_factor=1.0)
    assert load_state(tmp_path, other, restored) == 7
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    for one, two in zip(network.parameters(), other.parameters(), strict=True):
        assert set(made.state[one]) == set(restored.state[two])
        for key, value in made.state[one].items():
            expected = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            assert torch.equal(expected, torch.as_tensor(restored.state[two][key]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: shutil.copy(path.parent / "model.safetensors", path), "is no state"),
    ],
)
def test_a_broken_state_is_one_line(tmp_path, tiny_config, more_epochs, damage, message):
    config = tiny_config(epochs=1)
    fit(config, tmp_path / "run", device="cpu")
    damage(tmp_path / "run" / "state.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        fit(more_epochs(config, 2), tmp_path / "run", device="cpu", resume=True)
    assert "--overwrite" in str(caught.value)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["fit"]["epochs"] == 1


def test_other_images_than_those_it_began_with_are_refused(tmp_path, tiny_config, tiny_folder, more_epochs):
    shutil.copytree(tiny_folder, tmp_path / "data")
    config = tiny_config(data=tmp_path / "data", epochs=1)
    fit(config, tmp_path / "run", device="cpu")
    shutil.copy(tmp_path / "data" / "red" / "00.png", tmp_path / "data" / "red" / "99.png")
    with pytest.raises(DataError, match=r"cannot go on with other images.*--overwrite"):
        fit(more_epochs(config, 2), tmp_path / "run", device="cpu", resume=True)


def test_metrics_that_end_before_the_state_are_refused(tmp_path, tiny_config, more_epochs):
    config = tiny_config(epochs=2)
    fit(config, tmp_path / "run", device="cpu")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"does not hold the 2 epochs of state\.safetensors"):
        fit(more_epochs(config, 3), tmp_path / "run", device="cpu", resume=True)


def test_a_finished_run_without_its_state_is_not_trained_again(tmp_path, tiny_config, more_epochs):
    config = tiny_config(epochs=1)
    fit(config, tmp_path / "run", device="cpu")
    (tmp_path / "run" / "state.safetensors").unlink()
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match=r"finished run without its state\.safetensors"):
        fit(more_epochs(config, 2), tmp_path / "run", device="cpu", resume=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_an_image_that_is_query_and_training_image_stops_before_training(tmp_path, tiny_config, tiny_folder):
    shutil.copytree(tiny_folder, tmp_path / "data")
    for number in range(12):
        (tmp_path / "data" / "red" / f"copy{number:02}.png").hardlink_to(tmp_path / "data" / "red" / f"{number:02}.png")
    with pytest.raises(DataError, match="are the same file"):
        fit(tiny_config(data=tmp_path / "data"), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
