"""The commands that make a run again, from its configuration."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from admth_training.checkpoint import RunConfig
from admth_training.config import FitConfig, NetworkConfig, ObjectiveConfig

__all__ = ["commands_of", "fit_command"]

# Options by field; a pair is the option for True and the option for False.
_NETWORK: dict[str, str | tuple[str, str]] = {
    "code_lengths": "--code-lengths",
    "split": "--split",
    "hidden": "--hidden",
    "attention": ("--attention", "--no-attention"),
    "dropout": "--dropout",
    "map_direction": "--map-direction",
}
_OBJECTIVE: dict[str, str | tuple[str, str]] = {
    "alpha": "--alpha",
    "beta": "--beta",
    "inner_product_scale": "--inner-product-scale",
}
_FIT: dict[str, str | tuple[str, str]] = {
    "freeze_trunk": ("--freeze-trunk", "--train-trunk"),
    "batch_size": "--batch-size",
    "learning_rate": "--lr",
    "trunk_learning_rate_factor": "--trunk-lr-factor",
    "weight_decay": "--weight-decay",
    "decay_every": "--decay-every",
    "decay_factor": "--decay-factor",
    "precision": "--precision",
    "flip": ("--flip", "--no-flip"),
}


def fit_command(config: RunConfig, out: str) -> list[str]:
    """Return the words of the ``admth-train fit`` command that gives a run with this configuration.

    Backbone, input size, epochs and seed are always named; of the rest, what differs from the defaults.

    Args:
        config: the run's configuration.
        out: the folder to name.
    """
    network, fit, data = config.network, config.fit, config.data
    words = ["admth-train", "fit", "--data", _short_spec(data.spec)]
    for option, value in (
        ("--root", None if data.root is None else _short_path(data.root)),
        ("--strip-prefix", data.strip_prefix),
        ("--query-size", data.query_size),
        ("--train-size", data.train_size),
    ):
        words += [] if value is None else [option, str(value)]
    words += ["--backbone", network.backbone, "--input-size", str(network.size)]
    if config.pretrained != (network.backbone == "efficientnet_lite0"):
        words.append("--pretrained" if config.pretrained else "--no-pretrained")
    words += _differences(network, NetworkConfig(backbone=network.backbone), _NETWORK)
    if config.preprocessing.fit != "crop":
        words += ["--fit", config.preprocessing.fit]
    if config.preprocessing.interpolation != "bilinear":
        words += ["--interpolation", config.preprocessing.interpolation]
    words += _differences(config.objective, ObjectiveConfig(), _OBJECTIVE)
    words += [] if fit.optimizer == FitConfig().optimizer else ["--optimizer", fit.optimizer]
    words += _differences(fit, FitConfig(optimizer=fit.optimizer), _FIT)
    return [*words, "--epochs", str(fit.epochs), "--seed", str(fit.seed), "--out", out]


def commands_of(config: RunConfig, run: Path) -> list[str]:
    """Return the lines that a user types to train, evaluate, export and report a run again."""
    out = _short_path(str(run.resolve()))
    lines = [shlex.join(fit_command(config, out))]
    lines += [f"admth-train evaluate {shlex.quote(out)}", f"admth-export onnx {shlex.quote(out)}"]
    return [*lines, f"admth-export report {shlex.quote(out)}"]


def _differences(config: Any, default: Any, options: dict[str, str | tuple[str, str]]) -> list[str]:
    words: list[str] = []
    for field in fields(config):
        option, value = options.get(field.name), getattr(config, field.name)
        if option is None or value == getattr(default, field.name):
            continue
        if isinstance(option, tuple):
            words.append(option[0] if value else option[1])
        else:
            text = (
                ",".join(map(str, value))
                if isinstance(value, tuple)
                else f"{value:g}"
                if isinstance(value, float)
                else value
            )
            words += [option, str(text)]
    return words


def _short_spec(spec: str) -> str:
    kind, _, path = spec.partition(":")
    return f"{kind}:{_short_path(path)}"


def _short_path(path: str) -> str:
    """Write a path as seen from here, so that a report that is sent away does not tell where a home folder is.

    A path outside the working folder keeps its last part only.
    """
    place = Path(path)
    try:
        return place.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return place.name or path
