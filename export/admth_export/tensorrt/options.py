"""What a user may ask of an engine, checked before anything heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from admth_runtime.errors import InputError, OutputError
from admth_runtime.files import check_target
from admth_runtime.sidecar import BatchProfile

__all__ = ["EngineOptions", "EnginePrecision", "parse_gpus", "parse_layers"]


@dataclass(frozen=True)
class EnginePrecision:
    """The precision of an engine.

    Attributes:
        name: ``"fp32"``, ``"fp16"`` or ``"int8"``, as a manifest says it.
        half_rest: for INT8, whether the layers without Q/DQ are FP16 and not FP32.
    """

    name: str
    half_rest: bool = False

    @classmethod
    def of_flags(cls, *, fp32: bool, fp16: bool, int8: bool) -> EnginePrecision:
        """Return what the switches of the command line mean.

        Raises:
            InputError: none is given, or they contradict each other.
        """
        if fp32 and (fp16 or int8):
            raise InputError(f"--fp32 and --{'fp16' if fp16 else 'int8'} contradict each other: pass one of them")
        if not (fp32 or fp16 or int8):
            raise InputError(
                "no precision is named: pass --fp32, --fp16, --int8, or --int8 --fp16 for the rest in half"
            )
        if int8:
            return cls("int8", half_rest=fp16)
        return cls("fp16" if fp16 else "fp32")

    @property
    def label(self) -> str:
        """What stands in file names: ``"int8.fp16"`` for INT8 with the rest in half."""
        return f"{self.name}.fp16" if self.half_rest else self.name

    @property
    def flags(self) -> str:
        """The switches that ask for it."""
        return f"--{self.name} --fp16" if self.half_rest else f"--{self.name}"


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        batch: the optimisation profile.
        workspace_mib: most memory that one layer may use besides its tensors, in MiB; None leaves TensorRT's choice.
        optimization_level: 0 to 5; higher builds slower and may run faster; None leaves TensorRT's choice, 3.
        timing_cache: file with TensorRT's measurements, read and updated; it makes later builds faster.
        gpus: compute capabilities to build for, such as ``("sm86", "sm89")``; none is the flavour's default.
        version_compatible: whether later versions of TensorRT and the lean runtime shall read the engine.
        tf32: allow FP32 layers to round their inputs to TF32's 10 bits. It costs sign parity, so TensorRT's default is
            turned off.

    Raises:
        InputError: a value is out of range.
    """

    batch: BatchProfile = field(default_factory=lambda: BatchProfile(1, 8, 32))
    workspace_mib: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    gpus: tuple[str, ...] = ()
    version_compatible: bool = False
    tf32: bool = False

    def __post_init__(self) -> None:
        if self.batch.maximum > 65535:
            raise InputError(f"the largest batch {self.batch.maximum:,} is beyond 65,535: pass a smaller --batch")
        if self.workspace_mib is not None and not 1 <= self.workspace_mib <= 1 << 20:
            raise InputError(f"workspace {self.workspace_mib} MiB is not from 1 to 1,048,576: pass --workspace 2048")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise InputError(f"optimization level {self.optimization_level} is not from 0 to 5: leave it out for 3")
        wrong = [name for name in self.gpus if not re.fullmatch(r"sm\d{2,3}", name)]
        if wrong:
            raise InputError(f"GPU {wrong[0]!r} is not a compute capability: write it as sm89, or a list sm86,sm89")
        if len(set(self.gpus)) != len(self.gpus):
            raise InputError(f"--gpu {','.join(self.gpus)} names one twice: name each once")

    def check_files(self) -> None:
        """Check that the timing cache can be written.

        Raises:
            OutputError: its folder is missing or read-only, or something that is no file has the name.
        """
        if self.timing_cache is not None:
            try:
                check_target(self.timing_cache)
            except OutputError as error:
                raise OutputError(f"timing cache: {str(error).replace('with --out', 'with --timing-cache')}") from error


def parse_gpus(text: str | None) -> tuple[str, ...]:
    """Read ``sm80,sm89``; also ``8.9`` and ``89``, as NVIDIA's tables and tools write them."""
    if text is None:
        return ()
    names = [part.strip().lower() for part in text.split(",") if part.strip()]
    if not names:
        raise InputError(f"--gpu {text!r} names no GPU: write it as sm89, or a list sm86,sm89")
    return tuple(f"sm{name.replace('.', '')}" if re.fullmatch(r"\d+\.\d|\d{2,3}", name) else name for name in names)


def parse_layers(texts: Sequence[str]) -> tuple[bool, tuple[str, ...]]:
    """Read ``--keep-fp32``: whether ``auto`` is wanted, and the layers that are named beside it.

    Raises:
        InputError: it is empty.
    """
    names = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    if not names and texts:
        raise InputError("--keep-fp32 is empty: write auto, or names of layers such as trunk.stem")
    return "auto" in names or not texts, tuple(name for name in names if name != "auto")
