"""The options of ``admth-train``, one type each, so that a command's signature reads as a list.

An option that is part of a run's configuration is None when it was not given: a new run then takes the default of
:mod:`admth_training.config`, and a resumed run what its ``config.json`` says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "Alpha",
    "ApDefinition",
    "Attention",
    "Backbone",
    "BatchSize",
    "Beta",
    "CodeLengths",
    "Data",
    "DecayEvery",
    "DecayFactor",
    "Device",
    "Dropout",
    "EncodeBatch",
    "Epochs",
    "EvaluationOut",
    "Fit",
    "Flip",
    "FreezeTrunk",
    "Hidden",
    "InnerProductScale",
    "InputSize",
    "Interpolation",
    "Json",
    "LearningRate",
    "MapAt",
    "MapDirection",
    "MemoryLimit",
    "Optimizer",
    "OtherData",
    "Out",
    "Overwrite",
    "Precision",
    "Pretrained",
    "Qat",
    "QatDistill",
    "QatMargin",
    "QatObjective",
    "QatTarget",
    "QuerySize",
    "Resume",
    "Root",
    "Run",
    "SaveInterval",
    "Seed",
    "Split",
    "StripPrefix",
    "Threads",
    "TrainSize",
    "TrunkFactor",
    "WeightDecay",
    "Workers",
]


def _chosen(flags: str, text: str, default: str | None = None) -> Any:
    """Return an option that is part of a run's configuration, with the default that a new run takes."""
    return typer.Option(flags, help=text if default is None else f"{text} [default: {default}]", show_default=False)


Data = Annotated[
    str | None, _chosen("--data", "Images and labels: fashion-mnist:DIR, folder:DIR, list:FILE, list:DIR or emoji:DIR.")
]
Root = Annotated[
    Path | None, _chosen("--root", "Folder that the relative paths of list: data start from.", "the list's own folder")
]
StripPrefix = Annotated[str | None, _chosen("--strip-prefix", "Text cut from the start of each path of list: data.")]
QuerySize = Annotated[
    int | None, _chosen("--query-size", "Images drawn as queries.", "the data's own split, else a tenth, at most 1,000")
]
TrainSize = Annotated[
    int | None,
    _chosen("--train-size", "Images drawn for training.", "the data's own split, else all that are not queries"),
]
Fit = Annotated[str | None, _chosen("--fit", "How an image fills the square input: crop (centred) or stretch.", "crop")]
Interpolation = Annotated[
    str | None, _chosen("--interpolation", "Resize filter: bilinear, bicubic, lanczos or box.", "bilinear")
]
Backbone = Annotated[
    str | None,
    _chosen("--backbone", "Trunk: efficientnet_lite0 (for edge devices) or cnnf (the paper's).", "efficientnet_lite0"),
]
CodeLengths = Annotated[
    str | None, _chosen("--code-lengths", "Bits of each code: increasing multiples of 8.", "16,32,48,64")
]
InputSize = Annotated[int | None, _chosen("--input-size", "Side of the input in pixels.", "224")]
Hidden = Annotated[int | None, _chosen("--hidden", "Width of the fully connected layers.", "512; 4096 for cnnf")]
Split = Annotated[str | None, _chosen("--split", "Where the branches part: conv, or for cnnf fc6 or fc7.", "conv")]
Attention = Annotated[
    bool | None, _chosen("--attention/--no-attention", "Channel attention after the trunk.", "attention")
]
MapDirection = Annotated[
    str | None,
    _chosen("--map-direction", "Maps between neighbouring codes: short-to-long or long-to-short.", "short-to-long"),
]
Dropout = Annotated[float | None, _chosen("--dropout", "Probability after each hidden layer.", "0.2; 0.5 for cnnf")]
Pretrained = Annotated[
    bool | None,
    _chosen(
        "--pretrained/--no-pretrained", "Start the trunk from ImageNet weights.", "pretrained for efficientnet_lite0"
    ),
]
FreezeTrunk = Annotated[
    bool | None,
    _chosen(
        "--freeze-trunk/--train-trunk", "Keep the trunk as it is and train the rest on its features.", "train-trunk"
    ),
]
Epochs = Annotated[int | None, _chosen("--epochs", "Passes over the training images.", "30")]
BatchSize = Annotated[int | None, _chosen("--batch-size", "Images a step.", "128")]
Optimizer = Annotated[str | None, _chosen("--optimizer", "adamw, or sgd with momentum 0.9 (the paper's).", "adamw")]
LearningRate = Annotated[float | None, _chosen("--lr", "Learning rate.", "0.001 for adamw, 0.15 for sgd")]
TrunkFactor = Annotated[
    float | None,
    _chosen("--trunk-lr-factor", "The trunk's learning rate is this times --lr.", "0.1 for ImageNet weights, else 1"),
]
WeightDecay = Annotated[float | None, _chosen("--weight-decay", "Weight decay.", "0.0005")]
DecayEvery = Annotated[int | None, _chosen("--decay-every", "Epochs between two decays of the learning rate.", "24")]
DecayFactor = Annotated[float | None, _chosen("--decay-factor", "Factor of each decay.", "0.1")]
Alpha = Annotated[float | None, _chosen("--alpha", "Weight of the pairwise likelihood.", "20")]
Beta = Annotated[float | None, _chosen("--beta", "Weight of the consistency between lengths.", "1")]
InnerProductScale = Annotated[
    float | None, _chosen("--inner-product-scale", "Factor of the inner product in eq. 6.", "0.5")
]
Precision = Annotated[str | None, _chosen("--precision", "auto (bf16 on CUDA), fp32 or bf16.", "auto")]
Flip = Annotated[bool | None, _chosen("--flip/--no-flip", "Mirror images at random.", "flip")]
Seed = Annotated[int | None, _chosen("--seed", "Seed of splits, weights, order, dropout and mirroring.", "0")]

Qat = Annotated[
    Path | None,
    typer.Option("--qat", help="Finished FP32 run to fine-tune with INT8 arithmetic.", show_default=False),
]
QatTarget = Annotated[
    str | None, _chosen("--qat-target", "Engine whose INT8 arithmetic it is: cpu (ONNX Runtime) or trt.", "cpu")
]
QatMargin = Annotated[float | None, _chosen("--qat-margin", "Weight of a term that pushes logits away from zero.", "0")]
QatDistill = Annotated[
    float | None, _chosen("--qat-distill", "Weight of the squared difference from the FP32 run's logits.", "1")
]
QatObjective = Annotated[float | None, _chosen("--qat-objective", "Weight of the run's own objective.", "0")]

Out = Annotated[Path, typer.Option("--out", help="The run's folder.", show_default=False)]
OtherData = Annotated[str | None, _chosen("--data", "Other images than the run's, as in fit.", "the run's")]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Threads that decode images.", show_default="all processors, at most 8")
]
MemoryLimit = Annotated[
    float | None,
    typer.Option(
        "--memory-limit-gib", help="Memory for decoded images and features.", show_default="half of what is free"
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto (CUDA where there is one), cpu or cuda.")]
Threads = Annotated[
    int | None, typer.Option("--threads", help="PyTorch's threads on the CPU.", show_default="all processors")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in --out; options that are not given are as before.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")]
SaveInterval = Annotated[
    float, typer.Option("--save-interval", help="Least seconds between two savings of the resumable state.")
]
Run = Annotated[Path, typer.Argument(help="The run's folder.", show_default="this folder")]
MapAt = Annotated[str, typer.Option("--map-at", help="Cut-offs of mAP, such as all,100,5000.")]
ApDefinition = Annotated[
    str,
    typer.Option("--ap-definition", help="AP's denominator: relevant images found in the top K, or possible there."),
]
EvaluationOut = Annotated[
    Path | None, typer.Option("--out", help="Folder for evaluation.json and .png.", show_default="the run's")
]
EncodeBatch = Annotated[int, typer.Option("--batch-size", help="Images a pass.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
