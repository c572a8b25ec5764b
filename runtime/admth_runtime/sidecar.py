"""The sidecar ``<engine>.json``: what a TensorRT engine is, since the engine itself cannot say it.

A plan holds no metadata that can be read without running it, and a header glued onto it would keep other tools from
reading it. So everything that a user must know stands beside it, in JSON: the model's manifest, what built the engine
and for which GPUs, which batches it takes, and its SHA-256. :mod:`admth_runtime.engine_file` holds an engine against
it before anything of the engine is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from admth_runtime._version import __version__
from admth_runtime.errors import AdmthError, InputError, ManifestError
from admth_runtime.files import sha256_of_bytes, write_json
from admth_runtime.manifest import Manifest

__all__ = ["FLAVOURS", "SIDECAR_VERSION", "BatchProfile", "Sidecar", "read_sidecar", "sidecar_path", "write_sidecar"]

SIDECAR_VERSION = 1
"""Raised when an older runtime would read a sidecar wrongly; fields that it may ignore do not raise it."""

FLAVOURS = ("tensorrt", "rtx")
"""TensorRT, whose plans the lean runtime reads too when they are version compatible; and TensorRT-RTX."""

_MEND = "build the engine again with  admth-export trt"
_HEX = re.compile("[0-9a-f]{64}")
_LARGEST = 16 << 20  # bytes; real ones have a few thousand


@dataclass(frozen=True)
class BatchProfile:
    """Batch sizes of one optimisation profile, in images.

    Attributes:
        minimum: the smallest batch that the engine takes.
        optimum: the batch that it is tuned for.
        maximum: the largest batch that it takes.

    Raises:
        InputError: a limit is no positive integer, or they are out of order.
    """

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        limits = (self.minimum, self.optimum, self.maximum)
        if any(isinstance(limit, bool) or not isinstance(limit, int) or limit < 1 for limit in limits):
            raise InputError(f"batch limits {limits} are not three positive integers: pass --batch MIN OPT MAX")
        if not self.minimum <= self.optimum <= self.maximum:
            raise InputError(f"batch limits {limits} are out of order: pass them as --batch MIN OPT MAX")

    def __str__(self) -> str:
        return f"{self.minimum}-{self.maximum} (best {self.optimum})"

    def to_dict(self) -> dict[str, int]:
        """Return the JSON form."""
        return {"min": self.minimum, "opt": self.optimum, "max": self.maximum}


@dataclass(frozen=True)
class Sidecar:
    """Everything a runtime must know of an engine before it may execute it.

    Attributes:
        manifest: the manifest of the model inside, with the engine's precision and target ``"tensorrt"``.
        flavour: ``"tensorrt"`` or ``"rtx"``.
        tensorrt_version: version of the TensorRT that built it, such as ``"10.13.3.9"`` or ``"1.7.1.116"``.
        compute_capabilities: GPUs that it runs on, such as ``("sm86", "sm89")``; for TensorRT the one it was built on.
        profiles: its optimisation profiles, at least one.
        engine_sha256: SHA-256 of the engine's file.
        engine_bytes: its size.
        source_name: file name, without folders, of the ONNX model that it was built from.
        source_sha256: SHA-256 of that model's file.
        source_bytes: its size.
        build_seconds: how long TensorRT took.
        layers_kept: precision, such as ``"fp32"``, of every layer that was kept out of the engine's own, by name.
        version_compatible: whether later versions of TensorRT, and the lean runtime, may run it.
        build_options: further options of the build, by name, such as ``workspace_mib``; ``precision`` holds the
            precision's command-line flags.
        predicted_parity: sign parity with PyTorch, measured on the typed ONNX model on the CPU before the build, or
            None when the gate was left out.
        measured_parity: sign parity of the engine itself, where the machine that built it could run it; else None.
        created_by: the software that wrote it.

    Raises:
        InputError: a value is out of range.
    """

    manifest: Manifest
    flavour: str
    tensorrt_version: str
    compute_capabilities: tuple[str, ...]
    profiles: tuple[BatchProfile, ...]
    engine_sha256: str
    engine_bytes: int
    source_name: str
    source_sha256: str
    source_bytes: int
    build_seconds: float
    layers_kept: Mapping[str, str] = field(default_factory=dict)
    version_compatible: bool = False
    build_options: Mapping[str, Any] = field(default_factory=dict)
    predicted_parity: Mapping[str, Any] | None = None
    measured_parity: Mapping[str, Any] | None = None
    created_by: str = f"admth {__version__}"

    def __post_init__(self) -> None:
        if self.flavour not in FLAVOURS:
            raise InputError(f"flavour {self.flavour!r} is unknown: use one of {', '.join(FLAVOURS)}")
        if not re.fullmatch(r"\d+(\.\d+){1,3}", self.tensorrt_version):
            raise InputError(f"tensorrt_version {self.tensorrt_version!r} is not a version such as 10.13.3.9")
        wrong = [name for name in self.compute_capabilities if not re.fullmatch(r"sm\d{2,3}", name)]
        if wrong or not self.compute_capabilities:
            raise InputError(f"compute_capabilities {list(self.compute_capabilities)} are not names such as sm89")
        if not self.profiles:
            raise InputError("profiles are empty: an engine has at least one")
        for name in ("engine_sha256", "source_sha256"):
            if not _HEX.fullmatch(getattr(self, name)):
                raise InputError(f"{name} {getattr(self, name)!r} is not 64 lower-case hexadecimal digits")
        for name in ("engine_bytes", "source_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} {getattr(self, name)} is not positive")
        if Path(self.source_name).name != self.source_name:
            raise InputError(f"source_name {self.source_name!r} is not a file name without folders")

    @property
    def max_batch(self) -> int:
        """The largest batch of any profile."""
        return max(profile.maximum for profile in self.profiles)

    @property
    def rebuild_command(self) -> str:
        """The command that builds such an engine again, on and for the machine where it is run."""
        flags = self.build_options.get("precision")
        if not isinstance(flags, str):
            flags = f"--{self.manifest.precision}"
        compatible = " --version-compatible" if self.version_compatible else ""
        return f"admth-export trt {self.source_name} {flags} --flavor {self.flavour}{compatible}"

    def with_measured_parity(self, parity: Mapping[str, Any]) -> Sidecar:
        """Return a copy with the parity of the engine itself."""
        return replace(self, measured_parity=parity)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, with the digest over all the rest that shows an edit."""
        fields: dict[str, Any] = {
            "format_version": SIDECAR_VERSION,
            "manifest": json.loads(self.manifest.to_json()),
            "flavour": self.flavour,
            "tensorrt_version": self.tensorrt_version,
            "compute_capabilities": list(self.compute_capabilities),
            "profiles": [profile.to_dict() for profile in self.profiles],
            "engine": {"sha256": self.engine_sha256, "bytes": self.engine_bytes},
            "source": {"name": self.source_name, "sha256": self.source_sha256, "bytes": self.source_bytes},
            "build_seconds": self.build_seconds,
            "build_options": dict(self.build_options),
            "layers_kept": dict(self.layers_kept),
            "version_compatible": self.version_compatible,
            "predicted_parity": None if self.predicted_parity is None else dict(self.predicted_parity),
            "measured_parity": None if self.measured_parity is None else dict(self.measured_parity),
            "created_by": self.created_by,
        }
        return {**fields, "digest": _digest(fields)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Sidecar:
        """Read and check the JSON form.

        Raises:
            ManifestError: a newer format version, an edited, missing or malformed field, or a value out of range.
        """
        _check_version(fields.get("format_version"))
        # Types first: a field that is missing is a better answer than a digest that differs.
        engine, source = _field(fields, "engine", dict), _field(fields, "source", dict)
        try:
            sidecar = cls(
                manifest=Manifest.from_json(json.dumps(_field(fields, "manifest", dict))),
                flavour=_field(fields, "flavour", str),
                tensorrt_version=_field(fields, "tensorrt_version", str),
                compute_capabilities=_strings(fields, "compute_capabilities"),
                profiles=tuple(_profile(entry) for entry in _field(fields, "profiles", list)),
                engine_sha256=_field(engine, "sha256", str),
                engine_bytes=_field(engine, "bytes", int),
                source_name=_field(source, "name", str),
                source_sha256=_field(source, "sha256", str),
                source_bytes=_field(source, "bytes", int),
                build_seconds=float(_field(fields, "build_seconds", (int, float))),
                build_options=_field(fields, "build_options", dict),
                layers_kept=_field(fields, "layers_kept", dict),
                version_compatible=_field(fields, "version_compatible", bool),
                predicted_parity=_optional(fields, "predicted_parity"),
                measured_parity=_optional(fields, "measured_parity"),
                created_by=_field(fields, "created_by", str),
            )
        except InputError as error:
            raise ManifestError(f"the sidecar is unusable: {error}") from error
        content = {name: value for name, value in fields.items() if name != "digest"}
        if _field(fields, "digest", str) != _digest(content):
            raise ManifestError(f"the sidecar was edited after it was written: {_MEND}")
        return sidecar


def sidecar_path(engine: str | Path) -> Path:
    """Return where an engine's sidecar is: ``model.fp16.plan.json`` for ``model.fp16.plan``."""
    engine = Path(engine)
    return engine.with_name(f"{engine.name}.json")


def write_sidecar(engine: str | Path, sidecar: Sidecar) -> Path:
    """Write the sidecar beside an engine, by rename, and return its path.

    Raises:
        OutputError: it cannot be written.
    """
    path = sidecar_path(engine)
    write_json(path, sidecar.to_dict())
    return path


def read_sidecar(engine: str | Path) -> Sidecar:
    """Read and check the sidecar of an engine, without looking at the engine.

    Args:
        engine: the engine's path; the sidecar is beside it.

    Raises:
        ManifestError: there is none, or it is malformed, too new or edited.
    """
    path = sidecar_path(engine)
    try:
        if path.stat().st_size > _LARGEST:
            raise ManifestError(f"{path} has {path.stat().st_size:,} bytes and is no sidecar: {_MEND}")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ManifestError(
            f"{engine} has no sidecar {path.name}, so nothing says what it is: copy it along, or {_MEND}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}): {_MEND}") from error
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        raise ManifestError(f"{path} is not JSON ({error}): {_MEND}") from error
    if not isinstance(fields, dict):
        raise ManifestError(f"{path} is a JSON {type(fields).__name__}, not a sidecar: {_MEND}")
    try:
        return Sidecar.from_dict(fields)
    except AdmthError as error:
        raise ManifestError(f"{path}: {error}") from error


def _digest(fields: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the fields as canonical JSON; it shows an edit and is no signature."""
    return sha256_of_bytes(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())


def _check_version(version: object) -> None:
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ManifestError(f"the sidecar's format version {version!r} is not a positive integer: {_MEND}")
    if version > SIDECAR_VERSION:
        raise ManifestError(
            f"the sidecar's format version {version} is newer than {SIDECAR_VERSION}, which this admth reads: "
            "run  pip install -U admth"
        )


def _field(fields: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    value = fields.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        found = "is missing" if name not in fields else f"is {value!r}"
        raise ManifestError(f"the sidecar's field {name!r} {found}: {_MEND}")
    return value


def _strings(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = _field(fields, name, list)
    if not all(isinstance(value, str) for value in values):
        raise ManifestError(f"the sidecar's field {name!r} is {values!r}, not a list of text: {_MEND}")
    return tuple(values)


def _optional(fields: Mapping[str, Any], name: str) -> Any:
    return None if fields.get(name) is None else _field(fields, name, dict)


def _profile(entry: object) -> BatchProfile:
    if not isinstance(entry, dict):
        raise ManifestError(f"the sidecar's profile {entry!r} is no object: {_MEND}")
    return BatchProfile(_field(entry, "min", int), _field(entry, "opt", int), _field(entry, "max", int))
