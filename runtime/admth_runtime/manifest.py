"""The manifest: what a model says of itself, as JSON in ``metadata_props["admth.manifest"]`` or an engine's sidecar."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from admth_runtime._version import __version__
from admth_runtime.errors import InputError, ManifestError
from admth_runtime.packing import check_code_lengths
from admth_runtime.preprocessing import PreprocessingSpec

__all__ = ["FORMAT_VERSION", "INPUT_NAME", "METADATA_KEY", "PRECISIONS", "TARGETS", "Manifest", "output_names"]

FORMAT_VERSION = 1
"""Raised when an older runtime would read a manifest wrongly; fields that it may ignore do not raise it."""

METADATA_KEY = "admth.manifest"
INPUT_NAME = "images"
PRECISIONS = ("fp32", "fp16", "int8", "int8-weights", "int4-weights")
TARGETS = ("any", "cpu", "tensorrt")
_BIT_ORDER = "msb"


def output_names(code_lengths: tuple[int, ...]) -> tuple[str, ...]:
    """Name the outputs of the deployed graph, in order: ``code_L`` and ``logits_L`` for every code length L."""
    return tuple(name for length in code_lengths for name in (f"code_{length}", f"logits_{length}"))


@dataclass(frozen=True)
class Manifest:
    """Everything a user of a model must know to trust and to feed it.

    Attributes:
        code_lengths: bits of each code, increasing multiples of 8.
        preprocessing: how an image becomes the input's pixels.
        network: facts of the network: backbone, split, hidden width, attention, normalisation inside the graph.
        precision: ``"fp32"``, ``"fp16"``, ``"int8"``, or ``"int8-weights"`` and ``"int4-weights"`` where weights alone
            are stored in fewer bits.
        target: what the model is made for: ``"any"``, ``"cpu"`` or ``"tensorrt"``.
        checkpoint_sha256: SHA-256 of the ``model.safetensors`` it came from, 64 hexadecimal digits.
        calibration: method and data digest of an INT8 model, else None.
        parity: summary of the sign-parity gate, or None when it was skipped with ``--no-verify``.
        golden: codes of synthetic pictures for the self-test, as :mod:`admth_runtime.self_test` makes them, or None.
            They hold for the precision that they name: a manifest of another one is made without them, so that a
            converted model cannot carry its source's.
        created_by: the software that wrote it.
    """

    code_lengths: tuple[int, ...]
    preprocessing: PreprocessingSpec
    network: Mapping[str, Any]
    checkpoint_sha256: str
    precision: str = "fp32"
    target: str = "any"
    calibration: Mapping[str, Any] | None = None
    parity: Mapping[str, Any] | None = None
    golden: Mapping[str, Any] | None = None
    created_by: str = field(default=f"admth {__version__}")

    def __post_init__(self) -> None:
        object.__setattr__(self, "code_lengths", check_code_lengths(self.code_lengths))
        if self.precision not in PRECISIONS:
            raise InputError(f"precision {self.precision!r} is unknown: use one of {', '.join(PRECISIONS)}")
        if self.target not in TARGETS:
            raise InputError(f"target {self.target!r} is unknown: use one of {', '.join(TARGETS)}")
        if not re.fullmatch("[0-9a-f]{64}", self.checkpoint_sha256):
            raise InputError(f"checkpoint_sha256 {self.checkpoint_sha256!r} is not 64 lower-case hexadecimal digits")
        if self.golden is not None and self.golden.get("precision") != self.precision:
            object.__setattr__(self, "golden", None)

    def to_json(self) -> str:
        """Return the JSON text, with sorted keys so that equal manifests are equal text."""
        fields = {
            "format_version": FORMAT_VERSION,
            "bit_order": _BIT_ORDER,
            "code_lengths": list(self.code_lengths),
            "preprocessing": self.preprocessing.to_dict(),
            "network": dict(self.network),
            "precision": self.precision,
            "target": self.target,
            "checkpoint_sha256": self.checkpoint_sha256,
            "calibration": None if self.calibration is None else dict(self.calibration),
            "parity": None if self.parity is None else dict(self.parity),
            "golden": None if self.golden is None else dict(self.golden),
            "created_by": self.created_by,
        }
        return json.dumps(fields, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read and check a manifest.

        Raises:
            ManifestError: not JSON, a newer format version, a missing field, or a value out of range.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
            raise ManifestError(f"the manifest is not JSON ({error}): export the model again") from error
        if not isinstance(fields, dict):
            raise ManifestError(
                f"the manifest is a JSON {type(fields).__name__}, not an object: export the model again"
            )
        _check_version(fields.get("format_version"))
        if fields.get("bit_order") != _BIT_ORDER:
            raise ManifestError(f"the manifest's bit order {fields.get('bit_order')!r} is not {_BIT_ORDER!r}")
        lengths, network = _field(fields, "code_lengths", list), _field(fields, "network", dict)
        preprocessing = PreprocessingSpec.from_dict(_field(fields, "preprocessing", dict))
        try:
            return cls(
                code_lengths=tuple(lengths),
                preprocessing=preprocessing,
                network=network,
                precision=_field(fields, "precision", str),
                target=_field(fields, "target", str),
                checkpoint_sha256=_field(fields, "checkpoint_sha256", str),
                calibration=_optional_field(fields, "calibration"),
                parity=_optional_field(fields, "parity"),
                golden=_optional_field(fields, "golden"),
                created_by=_field(fields, "created_by", str),
            )
        except InputError as error:
            raise ManifestError(f"the manifest is unusable: {error}") from error

    def check_outputs(self, names: tuple[str, ...]) -> None:
        """Check that a model's outputs are the ones that this manifest promises, in any order.

        Raises:
            ManifestError: an output is missing or is not announced.
        """
        expected = set(output_names(self.code_lengths))
        missing, extra = sorted(expected - set(names)), sorted(set(names) - expected)
        if missing or extra:
            detail = " and ".join(
                part for part in (f"lacks {missing}" if missing else "", f"has {extra} beside" if extra else "") if part
            )
            raise ManifestError(
                f"the manifest says code lengths {list(self.code_lengths)} but the model {detail}: export it again"
            )


def _check_version(version: object) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ManifestError(
            f"the manifest's format version {version!r} is not a positive integer: export the model again"
        )
    if version > FORMAT_VERSION:
        raise ManifestError(
            f"the manifest's format version {version} is newer than {FORMAT_VERSION}, which this admth reads: "
            "run  pip install -U admth"
        )


def _field(fields: Mapping[str, Any], name: str, kind: type) -> Any:
    if not isinstance(fields.get(name), kind):
        found = "is missing" if name not in fields else f"is {fields[name]!r}"
        raise ManifestError(
            f"the manifest's field {name!r} {found}, not a JSON {kind.__name__}: export the model again"
        )
    return fields[name]


def _optional_field(fields: Mapping[str, Any], name: str) -> Any:
    return None if fields.get(name) is None else _field(fields, name, dict)
