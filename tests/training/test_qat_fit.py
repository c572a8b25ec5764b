"""``admth-train fit --qat``: a quantised run from an FP32 one, through the command and as a function."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from admth_runtime.errors import CheckpointError, InputError, OutputError, TrainingError
from admth_runtime.files import sha256_of_file
from admth_training.checkpoint import load_run, load_run_config, read_metrics, save_network
from admth_training.config import QatConfig
from admth_training.evaluate import evaluate_run, open_run_data
from admth_training.fitting import fit
from admth_training.qat import freeze_quantization, quantizers
from admth_training.run_options import QAT_FIT, QatOptions, run_config

NOTHING: dict[str, dict[str, object]] = {"network": {}, "objective": {}, "fit": {}, "preprocessing": {}, "data": {}}


@pytest.fixture(autouse=True)
def one_thread():
    """Keep small matrices on one thread: two only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def base_config(folder):
    from admth_runtime.preprocessing import PreprocessingSpec
    from admth_training.checkpoint import RunConfig
    from admth_training.config import DataConfig, FitConfig, NetworkConfig, ObjectiveConfig

    return RunConfig(
        network=NetworkConfig(code_lengths=(8, 16), input_size=32, hidden=16),
        objective=ObjectiveConfig(),
        fit=FitConfig(epochs=25, batch_size=10, freeze_trunk=True, learning_rate=0.01),
        preprocessing=PreprocessingSpec(32, 32),
        data=DataConfig(f"folder:{folder}", query_size=6),
        pretrained=True,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_folder):
    """A finished FP32 run of a second or two, with ImageNet weights: others let every signal fade."""
    folder = tmp_path_factory.mktemp("base") / "fp32"
    fit(base_config(tiny_folder), folder, device="cpu")
    return folder


def quantised(base, target="cpu", **settings):
    given = {**NOTHING, "fit": {"epochs": 2, "batch_size": 10, **settings}}
    return run_config(Path("unused"), given, None, QatOptions(base, target), resume=False)


def command(*arguments, folder):
    line = [sys.executable, "-m", "admth_training", *map(str, arguments)]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_makes_a_run_that_is_evaluated_like_any_other(tmp_path, base):
    options = ["--epochs", 1, "--batch-size", 10, "--threads", 1, "--qat-margin", 0.5]
    done = command("fit", "--qat", base, "--out", "q", *options, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "difference from the FP32 logits" in done.stdout
    assert "admth-calibrate --target cpu" in done.stdout
    values = json.loads((tmp_path / "q" / "config.json").read_text())
    assert values["qat"] == {
        "base_run": str(base.resolve()),
        "base_sha256": sha256_of_file(base / "model.safetensors"),
        "target": "cpu",
        "objective_weight": 0.0,
        "distillation_weight": 1.0,
        "margin_weight": 0.5,
        "margin": 1.0,
        "observed_images": 512,
    }
    assert values["network"] == json.loads((base / "config.json").read_text())["network"]
    assert values["fit"]["learning_rate"] == QAT_FIT["learning_rate"]
    record = read_metrics(tmp_path / "q")[-1]
    assert record["loss"] == pytest.approx(record["distillation"] + 0.5 * record["margin"], rel=1e-5)
    # The same images are queries as for the FP32 run.
    assert (tmp_path / "q" / "splits.json").read_bytes() == (base / "splits.json").read_bytes()
    done = command("evaluate", "q", "--json", "--threads", 1, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checkpoint_sha256"] == sha256_of_file(tmp_path / "q" / "model.safetensors")


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, base):
    config = quantised(base, epochs=2)
    fit(config, tmp_path / "whole", device="cpu")
    fit(quantised(base, epochs=1), tmp_path / "parts", device="cpu")
    options = {**NOTHING, "fit": {"epochs": 2}}
    resumed = run_config(tmp_path / "parts", options, None, QatOptions(), resume=True)
    assert resumed == config
    result = fit(resumed, tmp_path / "parts", device="cpu", resume=True)
    assert result.trained_epochs == 1
    one, two = load_run(tmp_path / "whole").network.state_dict(), load_run(tmp_path / "parts").network.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("target", ["cpu", "trt"])
def test_what_is_saved_is_on_the_grid_and_near_the_fp32_network(tmp_path, base, target):
    fit(quantised(base, target, epochs=2), tmp_path / "q", device="cpu")
    run = load_run(tmp_path / "q")
    before = {name: value.clone() for name, value in run.network.state_dict().items()}
    freeze_quantization(run.network)
    assert all(torch.equal(value, before[name]) for name, value in run.network.state_dict().items())
    assert all(quantizer.factor.item() == 1.0 for quantizer in quantizers(run.network).values())
    dataset, splits = open_run_data(run)
    own = evaluate_run(run, dataset, splits).metrics[16].mean_average_precision[None]
    theirs = evaluate_run(load_run(base), dataset, splits).metrics[16].mean_average_precision[None]
    assert own == pytest.approx(theirs, abs=0.15)


def test_a_frozen_trunk_stays(tmp_path, base):
    states = []
    for epochs in (1, 2):
        fit(quantised(base, epochs=epochs, freeze_trunk=True), tmp_path / str(epochs), device="cpu")
        states.append(load_run(tmp_path / str(epochs)).network.state_dict())
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert any(name.startswith("branches.") for name in changed)
    assert not any(name.startswith("trunk.") for name in changed)


def test_the_fp32_run_must_be_there_and_the_same(tmp_path, base):
    moved = shutil.copytree(base, tmp_path / "fp32")
    fit(quantised(moved, epochs=1), tmp_path / "q", device="cpu")
    config = load_run_config(tmp_path / "q")
    longer = replace(config, fit=replace(config.fit, epochs=2))
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"the FP32 run .*fp32 is gone: say where it is with --qat RUN"):
        fit(longer, tmp_path / "q", device="cpu", resume=True)
    found = run_config(tmp_path / "q", NOTHING, None, QatOptions(tmp_path / "elsewhere"), resume=True)
    fit(replace(found, fit=longer.fit), tmp_path / "q", device="cpu", resume=True)
    assert load_run_config(tmp_path / "q").qat.base_run == str((tmp_path / "elsewhere").resolve())
    other = load_run(base)
    with torch.no_grad():
        other.network.branches[0][-1].bias.add_(1.0)
    save_network(tmp_path / "elsewhere" / "model.safetensors", other.network)
    fresh = replace(found, qat=replace(found.qat, base_sha256=config.qat.base_sha256))
    with pytest.raises(CheckpointError, match=r"has other weights \([0-9a-f]{12}\) than those"):
        fit(fresh, tmp_path / "again", device="cpu")


def test_a_broken_fp32_run_is_named(tmp_path, base):
    broken = shutil.copytree(base, tmp_path / "fp32")
    run = load_run(broken)
    with torch.no_grad():
        run.network.trunk.stem.conv.weight[0] = float("nan")
    save_network(broken / "model.safetensors", run.network)
    with pytest.raises(TrainingError, match=r"is not finite on the training images: train the FP32 run again"):
        fit(quantised(broken), tmp_path / "q", device="cpu")
    assert not (tmp_path / "q" / "model.safetensors").exists()


def test_options_that_make_no_sense_are_refused(tmp_path, base, tiny_folder, capsys):
    def configure(qat, pretrained=None, out=tmp_path / "new", resume=False, **given):
        return run_config(out, {**NOTHING, **given}, pretrained, qat, resume=resume)

    start = QatOptions(base)
    with pytest.raises(InputError, match=r"--input-size, --fit cannot be given with --qat"):
        configure(start, network={"input_size": 64}, preprocessing={"fit": "crop"})
    with pytest.raises(InputError, match=r"--pretrained cannot be given with --qat"):
        configure(start, pretrained=False)
    with pytest.raises(InputError, match=r"--qat-target 'gpu' is unknown: use one of cpu, trt"):
        configure(QatOptions(base, "gpu"))
    with pytest.raises(InputError, match=r"belong to --qat RUN"):
        configure(QatOptions(margin=1.0), data={"spec": f"folder:{tiny_folder}"})
    with pytest.raises(InputError, match=r"margin_weight nan is not a number"):
        configure(QatOptions(base, margin=float("nan")))
    with pytest.raises(InputError, match=r"both have weight 0"):
        configure(QatOptions(base, distillation=0.0))
    with pytest.raises(InputError, match=r"precision 'bf16' has too few bits"):
        configure(start, fit={"precision": "bf16"})
    with pytest.raises(InputError, match=r"options of the data belong to --data"):
        configure(start, data={"query_size": 3})
    with pytest.raises(CheckpointError, match=r"is not a run's folder"):
        configure(QatOptions(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"holds an FP32 run, which --resume continues as one"):
        configure(start, out=base, resume=True)
    with pytest.raises(OutputError, match=r"holds the FP32 run that the quantised one starts from"):
        fit(configure(start), base, device="cpu", overwrite=True)
    assert capsys.readouterr().err == ""
    other = configure(start, data={"spec": "folder:/elsewhere"})
    assert other.data.spec == "folder:/elsewhere"
    assert "was trained on folder:" in capsys.readouterr().err
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(base / "config.json", unfinished)
    with pytest.raises(CheckpointError, match=r"holds no model.safetensors: finish training"):
        configure(QatOptions(unfinished))
    twice = tmp_path / "twice"
    twice.mkdir()
    values = {**json.loads((base / "config.json").read_text()), "qat": {"base_run": str(base), "base_sha256": "0" * 64}}
    (twice / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"is a quantised run already; name the FP32 run it came from"):
        configure(QatOptions(twice))


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("yes", "the part 'qat' is not a JSON object"),
        ({"base_run": "/x", "base_sha256": "short"}, "names no run"),
        ({"base_run": "/x", "base_sha256": "0" * 64, "target": "tpu"}, "qat target 'tpu' is unknown"),
        ({"base_run": "/x", "base_sha256": "0" * 64, "shape": 1}, r"fields \['shape'\] are unknown"),
    ],
)
def test_a_broken_configuration_is_named(tmp_path, base, part, line):
    values = {**json.loads((base / "config.json").read_text()), "qat": part}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=line):
        load_run_config(tmp_path)


def test_a_configuration_of_parts_that_exclude_each_other_is_named(tmp_path, base):
    values = json.loads((base / "config.json").read_text())
    values["fit"]["precision"] = "bf16"
    values["qat"] = {"base_run": "/x", "base_sha256": "0" * 64}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config.json: precision 'bf16' has too few bits"):
        load_run_config(tmp_path)


def test_a_configuration_comes_back(base):
    config = quantised(base)
    assert type(config).from_dict(json.loads(json.dumps(config.to_dict())), source="test") == config
    assert isinstance(config.qat, QatConfig)
    assert "qat" not in load_run_config(base).to_dict()
