"""What a run is made of: frozen dataclasses, validated when they are made, written to ``config.json``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from typing import Any, TypeVar

from admth_runtime.errors import CheckpointError, InputError
from admth_runtime.packing import check_code_lengths

__all__ = [
    "BACKBONES",
    "MAP_DIRECTIONS",
    "QAT_TARGETS",
    "SPLITS",
    "DataConfig",
    "FitConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "QatConfig",
    "from_dict",
    "to_dict",
]

Config = TypeVar("Config")

BACKBONES = ("efficientnet_lite0", "cnnf")
SPLITS = ("conv", "fc6", "fc7")
MAP_DIRECTIONS = ("short-to-long", "long-to-short")
OPTIMIZERS = ("sgd", "adamw")
PRECISIONS = ("auto", "fp32", "bf16")
QAT_TARGETS = ("cpu", "tensorrt")

_DEFAULT_HIDDEN = {"efficientnet_lite0": 512, "cnnf": 4096}
_DEFAULT_DROPOUT = {"efficientnet_lite0": 0.2, "cnnf": 0.5}
_DEFAULT_SIZE = {"efficientnet_lite0": 224, "cnnf": 224}
_MINIMUM_SIZE = {"efficientnet_lite0": 32, "cnnf": 67}


@dataclass(frozen=True)
class NetworkConfig:
    """The network's shape.

    Attributes:
        backbone: ``"efficientnet_lite0"`` (edge default) or ``"cnnf"`` (the paper's).
        code_lengths: bits of each branch, increasing multiples of 8.
        input_size: side of the square input in pixels; None is the backbone's own, 224.
        split: where the branches part: after the last convolution (``"conv"``), or, for CNN-F only, after the shared
            ``"fc6"`` or ``"fc7"``.
        hidden: width of the fully connected layers; None is the backbone's own (512, and 4096 for CNN-F).
        attention: whether channel attention (eq. 2-4) follows the trunk.
        attention_reduction: the channel reduction of eq. 3, 16 in the paper.
        dropout: probability after each hidden layer of a branch, in [0, 1); None is the backbone's own (0.2, and 0.5
            for CNN-F).
        map_direction: which neighbour the maps Q_k of eq. 8 predict from which. Both printed objectives map the
            shorter code to the longer one, ``"short-to-long"``; the sentence above them says the opposite.

    """

    backbone: str = "efficientnet_lite0"
    code_lengths: tuple[int, ...] = (16, 32, 48, 64)
    input_size: int | None = None
    split: str = "conv"
    hidden: int | None = None
    attention: bool = True
    attention_reduction: int = 16
    dropout: float | None = None
    map_direction: str = "short-to-long"

    def __post_init__(self) -> None:
        _choice("backbone", self.backbone, BACKBONES)
        _choice("split", self.split, SPLITS)
        _choice("map_direction", self.map_direction, MAP_DIRECTIONS)
        object.__setattr__(self, "code_lengths", check_code_lengths(self.code_lengths))
        if self.input_size is None:
            object.__setattr__(self, "input_size", _DEFAULT_SIZE[self.backbone])
        if self.hidden is None:
            object.__setattr__(self, "hidden", _DEFAULT_HIDDEN[self.backbone])
        if self.dropout is None:
            object.__setattr__(self, "dropout", _DEFAULT_DROPOUT[self.backbone])
        _integer("input_size", self.size, _MINIMUM_SIZE[self.backbone], 1024)
        _integer("hidden", self.width, 8, 16384)
        _integer("attention_reduction", self.attention_reduction, 1, 256)
        _number("dropout", self.dropout_rate, 0.0, 0.99)
        if self.split != "conv" and self.backbone != "cnnf":
            raise InputError(f"split {self.split!r} needs the layers fc6 and fc7 of backbone 'cnnf': use split 'conv'")

    @property
    def size(self) -> int:
        """Side of the square input in pixels."""
        assert self.input_size is not None
        return self.input_size

    @property
    def width(self) -> int:
        """Width of the fully connected layers."""
        assert self.hidden is not None
        return self.hidden

    @property
    def dropout_rate(self) -> float:
        """Probability after each hidden layer of a branch."""
        assert self.dropout is not None
        return self.dropout


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and readings of the paper's eq. 9; see :mod:`admth_training.objective`.

    Attributes:
        alpha: weight of the pairwise likelihood, 20 in the paper.
        beta: weight of the consistency between neighbouring lengths, 1 in the paper.
        inner_product_scale: the factor of eq. 6, 1/2; eq. 7 and 9 omit it, which is 1.

    """

    alpha: float = 20.0
    beta: float = 1.0
    inner_product_scale: float = 0.5

    def __post_init__(self) -> None:
        _number("alpha", self.alpha, 0.0, 1e6)
        _number("beta", self.beta, 0.0, 1e6)
        _number("inner_product_scale", self.inner_product_scale, 1e-6, 1e3)


@dataclass(frozen=True)
class FitConfig:
    """How the network is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step, at least 2 since the likelihood is over pairs.
        optimizer: ``"sgd"`` (the paper's, momentum 0.9) or ``"adamw"``.
        learning_rate: of the branches, attention and maps; None is 0.15 for SGD and 1e-3 for AdamW. That of a
            quantised network counts in steps of its integers, see :func:`admth_training.optim.make_optimizer`.
        trunk_learning_rate_factor: the trunk's learning rate is this times ``learning_rate``; None is 0.1 for a trunk
            that starts from ImageNet weights and 1 for a fresh one.
        weight_decay: L2 penalty (SGD) or decoupled decay (AdamW).
        decay_every: epochs between two decays of the learning rate; 30 in the paper, of 150 epochs.
        decay_factor: the factor of each decay. The paper's words give 0.01; the field's usual idiom is 0.1.
        freeze_trunk: keep the trunk's weights and cache its features.
        precision: ``"fp32"``, ``"bf16"`` (autocast; weights and losses stay in FP32), or ``"auto"``, which is bf16 on
            CUDA and FP32 on the CPU, where bf16 is fast on few processors. Features of a frozen trunk are always FP32.
        flip: mirror images at random, the cached features included.
        clip_norm: largest gradient norm, 0 for no clipping, with which the paper's SGD rate and alpha diverge in the
            first steps.
        seed: of initial weights, batch order, dropout and augmentation.

    """

    epochs: int = 30
    batch_size: int = 128
    optimizer: str = "adamw"
    learning_rate: float | None = None
    trunk_learning_rate_factor: float | None = None
    weight_decay: float = 5e-4
    decay_every: int = 24
    decay_factor: float = 0.1
    freeze_trunk: bool = False
    precision: str = "auto"
    flip: bool = True
    clip_norm: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        _choice("precision", self.precision, PRECISIONS)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", 0.15 if self.optimizer == "sgd" else 1e-3)
        _integer("epochs", self.epochs, 1, 100_000)
        _integer("batch_size", self.batch_size, 2, 65_536)
        _integer("decay_every", self.decay_every, 1, 100_000)
        _integer("seed", self.seed, 0, 2**31 - 1)
        _number("learning_rate", self.base_rate, 1e-9, 100.0)
        if self.trunk_learning_rate_factor is not None:
            _number("trunk_learning_rate_factor", self.trunk_learning_rate_factor, 0.0, 10.0)
        _number("weight_decay", self.weight_decay, 0.0, 1.0)
        _number("decay_factor", self.decay_factor, 1e-6, 1.0)
        _number("clip_norm", self.clip_norm, 0.0, 1e6)

    @property
    def base_rate(self) -> float:
        """The learning rate before any decay."""
        assert self.learning_rate is not None
        return self.learning_rate


@dataclass(frozen=True)
class DataConfig:
    """Which images a run was trained and is evaluated on.

    Attributes:
        spec: the data set, such as ``"fashion-mnist:/data/fashion"``, its path absolute.
        root: folder that the relative paths of a list file start from; None is the list's own folder.
        strip_prefix: prefix that is removed from the paths of a list file.
        query_size: images drawn as queries where the data set has no split of its own.
        train_size: images drawn for training there; None is all that are not queries.
        seed: of that draw.

    """

    spec: str
    root: str | None = None
    strip_prefix: str | None = None
    query_size: int | None = None
    train_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("spec", "root", "strip_prefix"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name == "spec" or value is not None):
                raise InputError(f"data {name} {value!r} is not text: write a path, and kind:path for the data itself")
        for name in ("query_size", "train_size"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1, 2**31 - 1)
        _integer("seed", self.seed, 0, 2**31 - 1)


@dataclass(frozen=True)
class QatConfig:
    """Quantisation-aware training: which network it starts from, and for which engine.

    Attributes:
        base_run: folder of the FP32 run, absolute.
        base_sha256: SHA-256 of that run's ``model.safetensors``.
        target: ``"cpu"`` (uint8 activations, ONNX Runtime) or ``"tensorrt"`` (symmetric int8).
        objective_weight: weight of the run's own objective, eq. 9.
        distillation_weight: weight of the difference from the FP32 network's logits, squared, most near zero.
        margin_weight: weight of the term that pushes logits away from zero.
        margin: |logit| from which that term is zero.
        observed_images: training images whose activations the ranges start from.

    """

    base_run: str
    base_sha256: str
    target: str = "cpu"
    objective_weight: float = 0.0
    distillation_weight: float = 1.0
    margin_weight: float = 0.0
    margin: float = 1.0
    observed_images: int = 512

    def __post_init__(self) -> None:
        _choice("qat target", self.target, QAT_TARGETS)
        if not isinstance(self.base_run, str) or not re.fullmatch("[0-9a-f]{64}", str(self.base_sha256)):
            raise InputError(f"base run {self.base_run!r} with SHA-256 {self.base_sha256!r} names no run")
        for name in ("objective_weight", "distillation_weight", "margin_weight"):
            _number(name, getattr(self, name), 0.0, 1e6)
        _number("margin", self.margin, 1e-6, 1e6)
        _integer("observed_images", self.observed_images, 1, 1_000_000)
        if not self.objective_weight and not self.distillation_weight:
            raise InputError("the objective and the distillation both have weight 0: give one of them a weight")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


def from_dict(kind: type[Config], values: Mapping[str, Any], *, source: str) -> Config:
    """Read a configuration that :func:`to_dict` wrote.

    Args:
        kind: the dataclass to make.
        values: its fields.
        source: the file, for the message.

    Raises:
        CheckpointError: a field is unknown or out of range.

    """
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - known):
        raise CheckpointError(f"{source}: fields {unknown} are unknown to this version: pip install -U admth")
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except (InputError, TypeError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = get_close_matches(value, known, n=1) if isinstance(value, str) else []
        hint = f"did you mean {near[0]!r}? Use one of" if near else "use one of"
        raise InputError(f"{name} {value!r} is unknown: {hint} {', '.join(known)}")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{name} {value!r} is not an integer from {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(f"{name} {value!r} is not a number from {low:g} to {high:g}")
