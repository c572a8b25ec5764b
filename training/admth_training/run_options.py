"""What the options of ``admth-train fit`` mean together: the configuration of a new, a resumed or a quantised run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from admth_runtime.console import note
from admth_runtime.errors import CheckpointError, InputError
from admth_runtime.files import sha256_of_file
from admth_runtime.preprocessing import PreprocessingSpec
from admth_training.checkpoint import CONFIG_FILE, WEIGHTS_FILE, RunConfig, load_run_config
from admth_training.config import DataConfig, FitConfig, NetworkConfig, ObjectiveConfig, QatConfig

__all__ = ["QAT_FIT", "QatOptions", "run_config"]

QAT_FIT: dict[str, Any] = {
    "epochs": 5,
    "batch_size": 32,
    "optimizer": "adamw",
    "learning_rate": 0.003,
    "trunk_learning_rate_factor": 1.0,
    "weight_decay": 0.0,
    "decay_every": 1,
    "decay_factor": 0.5,
    "precision": "fp32",
}
"""How a quantised network is trained where nothing else is asked for.

The learning rate counts in steps of the integers (:mod:`admth_training.optim`), and halves every epoch.
"""

_QAT_TARGETS = {"cpu": "cpu", "trt": "tensorrt"}

Given = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class QatOptions:
    """The options of quantisation-aware training; None is one that was not given.

    Attributes:
        run: the FP32 run to start from.
        target: ``"cpu"`` or ``"trt"``.
        margin: weight of the margin term.
        distillation: weight of the difference from the FP32 network's logits.
        objective: weight of the run's own objective.

    """

    run: Path | None = None
    target: str | None = None
    margin: float | None = None
    distillation: float | None = None
    objective: float | None = None

    def fields(self) -> dict[str, Any]:
        """Return the values of :class:`QatConfig` that were given.

        Raises:
            InputError: the target is unknown.

        """
        if self.target is not None and self.target not in _QAT_TARGETS:
            raise InputError(f"--qat-target {self.target!r} is unknown: use one of {', '.join(_QAT_TARGETS)}")
        values = {
            "target": None if self.target is None else _QAT_TARGETS[self.target],
            "margin_weight": self.margin,
            "distillation_weight": self.distillation,
            "objective_weight": self.objective,
        }
        return {name: value for name, value in values.items() if value is not None}


def run_config(out: Path, given: Given, pretrained: bool | None, qat: QatOptions, *, resume: bool) -> RunConfig:
    """Make a run's configuration of the options given, over those of the run to resume or to quantise.

    Args:
        out: the run's folder.
        given: by part of the configuration and by field; None is an option that was not given.
        pretrained: whether the trunk starts from ImageNet weights.
        qat: the options of quantisation-aware training.
        resume: whether the run in the folder goes on, where there is one.

    Raises:
        InputError: an option is out of range, missing, or excludes another one.
        CheckpointError: the run to resume or to quantise is missing or broken.

    """
    chosen = {part: {k: v for k, v in values.items() if v is not None} for part, values in given.items()}
    if resume and (out / CONFIG_FILE).exists():
        old = load_run_config(out)
        if old.qat is not None or qat != QatOptions():
            return _resumed_qat(out, old, chosen, pretrained, qat)
        pretrained = old.pretrained if pretrained is None else pretrained
        return _merged(chosen, old.to_dict(), pretrained)
    if qat.run is not None:
        return _quantised(qat.run, chosen, pretrained, qat)
    if qat.fields():
        raise InputError("--qat-target, --qat-margin, --qat-distill and --qat-objective belong to --qat RUN: name it")
    if "spec" not in chosen["data"]:
        raise InputError("no data was named: pass --data, such as --data fashion-mnist:DIR or --data folder:DIR")
    return _merged(chosen, {}, pretrained)


def _merged(chosen: Given, before: dict[str, Any], pretrained: bool | None) -> RunConfig:
    def merged(part: str) -> dict[str, Any]:
        values = {**before.get(part, {}), **chosen[part]}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    network = NetworkConfig(**merged("network"))
    size = {"height": network.size, "width": network.size}
    return RunConfig(
        network=network,
        objective=ObjectiveConfig(**merged("objective")),
        fit=FitConfig(**merged("fit")),
        preprocessing=PreprocessingSpec(**{**merged("preprocessing"), **size}),
        data=DataConfig(**merged("data")),
        pretrained=network.backbone == "efficientnet_lite0" if pretrained is None else pretrained,
    )


def _quantised(folder: Path, chosen: Given, pretrained: bool | None, qat: QatOptions) -> RunConfig:
    """Configure quantisation-aware training: network, preprocessing and objective are the FP32 run's."""
    _refuse_network(chosen, pretrained)
    base, digest = _base(folder)
    data = base.data
    if "spec" in chosen["data"]:
        data = DataConfig(**chosen["data"])
        if data.spec != base.data.spec:
            note(f"{folder} was trained on {base.data.spec}: now ranges, weights and splits are those of {data.spec}")
        elif replace(data, seed=base.data.seed) == DataConfig(base.data.spec, seed=base.data.seed):
            data = base.data
    elif set(chosen["data"]) - {"seed"}:
        raise InputError("options of the data belong to --data: without it the FP32 run's own data is taken")
    return RunConfig(
        network=base.network,
        objective=replace(base.objective, **chosen["objective"]),
        fit=FitConfig(**{**QAT_FIT, "flip": base.fit.flip, **chosen["fit"]}),
        preprocessing=base.preprocessing,
        data=data,
        pretrained=base.pretrained,
        qat=QatConfig(str(folder.expanduser().resolve()), digest, **qat.fields()),
    )


def _resumed_qat(out: Path, old: RunConfig, chosen: Given, pretrained: bool | None, qat: QatOptions) -> RunConfig:
    if old.qat is None:
        raise CheckpointError(
            f"{out} holds an FP32 run, which --resume continues as one: name another --out for the quantised run"
        )
    _refuse_network(chosen, pretrained)
    settings = replace(old.qat, **qat.fields())
    if qat.run is not None:
        _, digest = _base(qat.run)
        settings = replace(settings, base_run=str(qat.run.expanduser().resolve()), base_sha256=digest)
    merged = _merged(chosen, old.to_dict(), old.pretrained)
    return replace(merged, preprocessing=old.preprocessing, qat=settings)


def _base(folder: Path) -> tuple[RunConfig, str]:
    """Read the configuration of an FP32 run, and the digest of its weights."""
    base = load_run_config(folder)
    if base.qat is not None:
        raise InputError(
            f"--qat {folder}: is a quantised run already; name the FP32 run it came from, {base.qat.base_run}"
        )
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise CheckpointError(
            f"{folder} holds no {WEIGHTS_FILE}: finish training with  admth-train fit --out {folder} --resume"
        )
    return base, sha256_of_file(weights)


def _refuse_network(chosen: Given, pretrained: bool | None) -> None:
    names = [*chosen["network"], *chosen["preprocessing"], *(["pretrained"] if pretrained is not None else [])]
    if names:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise InputError(f"{flags} cannot be given with --qat: network and preprocessing are those of the FP32 run")
