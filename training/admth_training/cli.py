"""``admth-train``: train a multi-length hashing network and evaluate it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from admth_runtime.console import new_app, parse_integers, print_json, run_app, say
from admth_runtime.errors import InputError, MissingExtraError, require
from admth_training import options as o
from admth_training.torch_start import start_torch

__all__ = ["app", "main"]

app = new_app("Train a network that gives an image's hash codes of several lengths, and evaluate them.")


def main() -> None:
    """Run ``admth-train``."""
    run_app(app)


@app.command()
def fit(
    out: o.Out,
    data: o.Data = None,
    root: o.Root = None,
    strip_prefix: o.StripPrefix = None,
    query_size: o.QuerySize = None,
    train_size: o.TrainSize = None,
    fit_: o.Fit = None,
    interpolation: o.Interpolation = None,
    backbone: o.Backbone = None,
    code_lengths: o.CodeLengths = None,
    input_size: o.InputSize = None,
    hidden: o.Hidden = None,
    split: o.Split = None,
    attention: o.Attention = None,
    map_direction: o.MapDirection = None,
    dropout: o.Dropout = None,
    pretrained: o.Pretrained = None,
    freeze_trunk: o.FreezeTrunk = None,
    epochs: o.Epochs = None,
    batch_size: o.BatchSize = None,
    optimizer: o.Optimizer = None,
    learning_rate: o.LearningRate = None,
    trunk_factor: o.TrunkFactor = None,
    weight_decay: o.WeightDecay = None,
    decay_every: o.DecayEvery = None,
    decay_factor: o.DecayFactor = None,
    alpha: o.Alpha = None,
    beta: o.Beta = None,
    inner_product_scale: o.InnerProductScale = None,
    precision: o.Precision = None,
    flip: o.Flip = None,
    seed: o.Seed = None,
    workers: o.Workers = None,
    memory_limit_gib: o.MemoryLimit = None,
    qat: o.Qat = None,
    qat_target: o.QatTarget = None,
    qat_margin: o.QatMargin = None,
    qat_distill: o.QatDistill = None,
    qat_objective: o.QatObjective = None,
    device: o.Device = "auto",
    threads: o.Threads = None,
    resume: o.Resume = False,
    overwrite: o.Overwrite = False,
    save_interval: o.SaveInterval = 10.0,
    json_: o.Json = False,
) -> None:
    """Train a network: model.safetensors, config.json and metrics.jsonl in a folder.

    An interrupted run goes on with --out DIR --resume, to the same weights. With --qat RUN a finished run is
    fine-tuned for INT8.
    """
    given: dict[str, dict[str, Any]] = {
        "network": {
            "backbone": backbone,
            "code_lengths": parse_integers(code_lengths, name="--code-lengths") if code_lengths is not None else None,
            "input_size": input_size,
            "split": split,
            "hidden": hidden,
            "attention": attention,
            "dropout": dropout,
            "map_direction": map_direction,
        },
        "objective": {"alpha": alpha, "beta": beta, "inner_product_scale": inner_product_scale},
        "fit": {
            "epochs": epochs,
            "batch_size": batch_size,
            "optimizer": optimizer,
            "learning_rate": learning_rate,
            "trunk_learning_rate_factor": trunk_factor,
            "weight_decay": weight_decay,
            "decay_every": decay_every,
            "decay_factor": decay_factor,
            "freeze_trunk": freeze_trunk,
            "precision": precision,
            "flip": flip,
            "seed": seed,
        },
        "preprocessing": {"fit": fit_, "interpolation": interpolation},
        "data": {
            "spec": _absolute_spec(data),
            "root": str(root.expanduser().resolve()) if root is not None else None,
            "strip_prefix": strip_prefix,
            "query_size": query_size,
            "train_size": train_size,
            "seed": seed,
        },
    }
    start_torch(extra="train", purpose="training", threads=threads)
    from admth_training.fitting import fit as train
    from admth_training.run_options import QatOptions, run_config

    quantised = QatOptions(qat, qat_target, qat_margin, qat_distill, qat_objective)
    config = run_config(out, given, pretrained, quantised, resume=resume)
    limit = _gibibytes(memory_limit_gib)
    try:
        result = train(
            config,
            out,
            resume=resume,
            overwrite=overwrite,
            memory_limit_bytes=limit,
            workers=workers,
            device=device,
            save_interval=save_interval,
        )
    except MissingExtraError as error:
        mend = ", or pass --no-pretrained" if pretrained is None and "ImageNet" in str(error) else ""
        raise MissingExtraError(f"{error}{mend}") from error
    commands = [f"admth-train evaluate {out}", f"cd {out} && admth-export onnx"]
    if config.qat is not None:
        commands.append(f"admth-calibrate --target {'trt' if config.qat.target == 'tensorrt' else 'cpu'}")
    if json_:
        print_json({**asdict(result), "folder": str(result.folder), "next": commands})
        return
    final = result.final
    say(f"wrote {out}: {', '.join(result.files)}")
    say(
        f"epoch {result.epochs}: loss {final['loss']:.4f} (likelihood {final['likelihood']:.4f}, "
        f"consistency {final['consistency']:.4f}); {result.train_images:,} images in {result.seconds:.0f} s"
    )
    if "distillation" in final:
        say(f"difference from the FP32 logits {final['distillation']:.4f}, margin term {final['margin']:.4f}")
    say(f"next:  {commands[0]}")
    for command in commands[1:]:
        say(f"       {command}")


@app.command()
def evaluate(
    run: o.Run = Path(),
    data: o.OtherData = None,
    root: o.Root = None,
    strip_prefix: o.StripPrefix = None,
    map_at: o.MapAt = "all",
    ap_definition: o.ApDefinition = "found",
    out: o.EvaluationOut = None,
    batch_size: o.EncodeBatch = 32,
    workers: o.Workers = None,
    device: o.Device = "auto",
    threads: o.Threads = None,
    json_: o.Json = False,
) -> None:
    """Measure the codes of a run on its queries and database: evaluation.json, evaluation.png and a table."""
    cutoffs = _cutoffs(map_at)
    if data is None and (root is not None or strip_prefix is not None):
        raise InputError("--root and --strip-prefix belong to --data: the run's own data keeps the recorded ones")
    start_torch(extra="train", purpose="training", threads=threads)
    require("matplotlib", extra="train", purpose="the picture of an evaluation")
    from admth_runtime.files import make_folder, write_json
    from admth_training.checkpoint import load_run
    from admth_training.evaluate import evaluate_run, open_run_data
    from admth_training.fitting import select_device
    from admth_training.plots import retrieval_figure, save_figure

    loaded = load_run(run)
    loaded.network.to(select_device(device))
    dataset, splits = open_run_data(loaded, spec=_absolute_spec(data), root=root, strip_prefix=strip_prefix)
    folder = make_folder(run if out is None else out)
    evaluation = evaluate_run(
        loaded,
        dataset,
        splits,
        map_cutoffs=cutoffs,
        ap_definition=ap_definition,
        batch_size=batch_size,
        workers=workers,
    )
    facts = {"checkpoint_sha256": loaded.checkpoint_sha256, **evaluation.to_dict()}
    write_json(folder / "evaluation.json", facts)
    save_figure(retrieval_figure(evaluation), folder / "evaluation.png")
    if json_:
        print_json(facts)
        return
    say(evaluation.table())
    say(f"wrote {folder / 'evaluation.json'} and {folder / 'evaluation.png'}")


def _cutoffs(text: str) -> tuple[int | None, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise InputError(f"--map-at {text!r} is empty: write all, or cut-offs such as all,100,5000")
    numbers = [None if part == "all" else parse_integers(part, name="--map-at")[0] for part in parts]
    return tuple(numbers)


def _absolute_spec(spec: str | None) -> str | None:
    """Make the path in ``kind:path`` absolute, so that the run can be evaluated from any folder."""
    if spec is None:
        return None
    kind, colon, path = spec.partition(":")
    return f"{kind}:{Path(path).expanduser().resolve()}" if colon and path.strip() else spec


def _gibibytes(value: float | None) -> int | None:
    if value is None:
        return None
    if not 0.0 <= value <= 1e6:
        raise InputError(f"--memory-limit-gib {value} is not a number from 0 to 1,000,000")
    return int(value * 2**30)
