"""What the benchmark compares, and where its files are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from _harness import ROOT

__all__ = ["CASES", "Case", "Settings"]


@dataclass(frozen=True)
class Case:
    """One network on one data set.

    Attributes:
        name: its name on the command line.
        backbone: ``"efficientnet_lite0"`` or ``"cnnf"``.
        data: ``"fashion"`` or ``"emoji"``.
        fit: options of ``admth-train fit`` beside the data.
        minutes: how long training took on two shared cores, for the message before it.
        qat: whether quantisation-aware training is measured here too.
    """

    name: str
    backbone: str
    data: str
    fit: tuple[str, ...]
    minutes: int
    qat: bool = False

    @property
    def title(self) -> str:
        """Name for people."""
        backbone = {"efficientnet_lite0": "EfficientNet-Lite0, 96x96", "cnnf": "CNN-F, 224x224"}[self.backbone]
        narrow = " (a quarter of the width)" if "--hidden" in self.fit else ""
        return f"{backbone}{narrow}, {'Fashion-MNIST' if self.data == 'fashion' else 'emoji'}"


_LITE0 = ("--backbone", "efficientnet_lite0", "--input-size", "96", "--freeze-trunk")
# Random convolutions, since ImageNet weights of CNN-F cannot be downloaded and training them from nothing takes a day
# on a CPU; the fully connected layers, 99 % of the weights, are trained until their logits mean something.
_CNNF = ("--backbone", "cnnf", "--freeze-trunk", "--no-flip", "--dropout", "0", "--batch-size", "64")
_CNNF_FASHION = (*_CNNF, "--lr", "0.00005", "--epochs", "3", "--decay-every", "2", "--precision", "bf16")
# A quarter of the paper's width, since 1,362 images do not train 221 million weights.
_CNNF_EMOJI = (*_CNNF, "--hidden", "1024", "--lr", "0.0001", "--epochs", "30", "--decay-every", "24")

CASES = {
    case.name: case
    for case in (
        Case("efficientnet-fashion", "efficientnet_lite0", "fashion", _LITE0, 3, qat=True),
        Case(
            "efficientnet-emoji",
            "efficientnet_lite0",
            "emoji",
            (*_LITE0, "--query-size", "500", "--train-size", "1062"),
            1,
        ),
        Case("cnnf-fashion", "cnnf", "fashion", _CNNF_FASHION, 20),
        Case("cnnf-emoji", "cnnf", "emoji", (*_CNNF_EMOJI, "--precision", "bf16", "--query-size", "500"), 15),
    )
}
"""Every network that is measured, in the order of the page."""


@dataclass(frozen=True)
class Settings:
    """What the command line chose.

    Attributes:
        cache: folder of networks, models and downloads; it is made once and used again.
        fashion: folder of Fashion-MNIST's IDX files.
        full_fashion: folder of the full data set, where there is one: its other images are unseen ones to gate on.
        emoji: folder of the unpacked npm package, or None for a download into the cache.
        nncf_python: interpreter that has NNCF, or None for an environment in the cache.
        calibration_images: images that everyone calibrates on.
        test_images: queries that bits are compared on, at most.
        threads: of every engine.
        fresh: make INT8 models that exist already anew.
        qat: train with fake quantisation where that is measured.
    """

    cache: Path = ROOT / "runs" / "bench-int8"
    fashion: Path = ROOT / "examples" / "fashion-mnist-mini"
    full_fashion: Path = Path("/usr/share/datasets/fashion-mnist")
    emoji: Path | None = None
    nncf_python: Path | None = None
    calibration_images: int = 512
    test_images: int = 1000
    threads: int = 2
    fresh: bool = False
    qat: bool = True
