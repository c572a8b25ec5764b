"""Engine files, checked before anything of them is executed.

An engine is executable code, so it is held against its sidecar first: the header's magic number and version, the
size, and the SHA-256. Only a runtime that matches is then asked to load it, and it is given the very bytes that were
hashed, so that a file that is replaced in between changes nothing.

Header facts: a TensorRT plan starts with ``ftrt``, a TensorRT-RTX engine with ``vtrt``; bytes 24 to 27 are the
version's major, minor, patch and build (NVIDIA's documentation of the plan file's header; the same positions hold for
TensorRT-RTX 1.7).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from admth_runtime.engine_kind import ENGINE_MAGIC
from admth_runtime.errors import InputError, ManifestError, ModelError
from admth_runtime.files import sha256_of_bytes, sha256_of_file
from admth_runtime.manifest import Manifest
from admth_runtime.sidecar import Sidecar, read_sidecar, sidecar_path

__all__ = [
    "EngineFile",
    "EngineHeader",
    "check_engine",
    "load_engine",
    "read_engine_file",
    "read_header",
]

_HEADER_BYTES = 64
_NAMES = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}
_REBUILD = "build one with  admth-export trt"


@dataclass(frozen=True)
class EngineHeader:
    """What the first 64 bytes of an engine say.

    Attributes:
        flavour: ``"tensorrt"`` or ``"rtx"``.
        version: major, minor, patch and build of the TensorRT that wrote it.
    """

    flavour: str
    version: tuple[int, int, int, int]

    @property
    def version_text(self) -> str:
        """The version as text, such as ``"1.7.1.116"``."""
        return ".".join(str(part) for part in self.version)

    def __str__(self) -> str:
        return f"{_NAMES[self.flavour]} {self.version_text}"


@dataclass(frozen=True)
class EngineFile:
    """An engine on disk that has been held against its sidecar.

    Attributes:
        path: where it is.
        size: bytes.
        sha256: SHA-256 of the file, 64 hexadecimal digits.
        header: what its first bytes say.
        manifest: what the model inside says of itself.
        sidecar: the sidecar, or None for an engine that the caller trusts without one.
    """

    path: Path
    size: int
    sha256: str
    header: EngineHeader
    manifest: Manifest
    sidecar: Sidecar | None


def read_header(path: str | Path) -> EngineHeader:
    """Read what an engine's first bytes say.

    Raises:
        ModelError: the file is missing, empty, cut off, or no engine.
    """
    path = Path(path)
    _check_there(path)
    try:
        with path.open("rb") as file:
            return _header(path, file.read(_HEADER_BYTES))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error


def check_engine(path: str | Path, sidecar: Sidecar | None, *, trust_engine: bool = False) -> EngineHeader:
    """Hold an engine against its sidecar: magic number, flavour, version, size, SHA-256.

    The file is hashed in blocks and not kept; :func:`load_engine` returns the bytes that it hashed.

    Args:
        path: the engine.
        sidecar: what it should be, or None when there is no sidecar.
        trust_engine: accept an engine that has no sidecar. One that disagrees with its sidecar is refused all the same.

    Returns:
        What the engine's header says.

    Raises:
        ModelError: the engine is missing, empty, truncated, altered, foreign, or of another sidecar.
        ManifestError: there is no sidecar, and ``trust_engine`` is False.
    """
    path = Path(path)
    header = read_header(path)
    _check_trust(path, sidecar, trust_engine)
    if sidecar is not None:
        _check_header(path, header, sidecar)
        _check_size(path, path.stat().st_size, sidecar)
        try:
            _check_digest(path, sha256_of_file(path), sidecar)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error
    return header


def read_engine_file(path: str | Path, *, trust_engine: bool = False, manifest: Manifest | None = None) -> EngineFile:
    """Check an engine as :func:`check_engine` does, with the sidecar beside it, and return its facts.

    Args:
        path: the engine.
        trust_engine: accept an engine that has no sidecar.
        manifest: the model's manifest for such an engine, which does not say what images it takes.

    Raises:
        ModelError: as :func:`check_engine`.
        ManifestError: the sidecar is missing, malformed, too new or edited.
        InputError: a manifest was given for an engine that has a sidecar, or is missing for one that has none.
    """
    return load_engine(path, trust_engine=trust_engine, manifest=manifest)[0]


def load_engine(
    path: str | Path, *, trust_engine: bool = False, manifest: Manifest | None = None
) -> tuple[EngineFile, bytes]:
    """Read an engine into memory and check those bytes as :func:`read_engine_file` does.

    Returns:
        The engine's facts, and its bytes.

    Raises:
        AdmthError: as :func:`read_engine_file`.
    """
    path = Path(path)
    header = read_header(path)
    sidecar = _sidecar_of(path, trust_engine)
    if sidecar is not None:
        _check_header(path, header, sidecar)
        _check_size(path, path.stat().st_size, sidecar)
        if manifest is not None:
            raise InputError(f"{path} has a sidecar with its manifest: leave manifest out")
    elif manifest is None:
        raise InputError(
            f"{path} has no sidecar, so nothing says what images it takes: pass  "
            "manifest=read_model('model.onnx').manifest  of the model that it was built from"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error
    digest = sha256_of_bytes(content)
    if sidecar is not None:
        _check_digest(path, digest, sidecar)
    described = sidecar.manifest if sidecar is not None else manifest
    assert described is not None
    return EngineFile(path, len(content), digest, header, described, sidecar), content


def _sidecar_of(path: Path, trust_engine: bool) -> Sidecar | None:
    if trust_engine and not sidecar_path(path).exists():
        return None
    try:
        return read_sidecar(path)
    except ManifestError as error:
        if not sidecar_path(path).exists():
            _check_trust(path, None, trust_engine)
        raise error


def _check_trust(path: Path, sidecar: Sidecar | None, trust_engine: bool) -> None:
    if sidecar is None and not trust_engine:
        raise ManifestError(
            f"{path} has no sidecar {sidecar_path(path).name} and an engine is executable code: copy the sidecar "
            "along, build the engine again with  admth-export trt , or pass trust_engine=True if you know its origin"
        )


def _check_there(path: Path) -> None:
    if path.is_dir():
        raise ModelError(f"{path} is a folder: name the engine file in it, such as {path / 'model.fp16.plan'}")
    if not path.exists():
        raise ModelError(f"{path}: no such engine file; {_REBUILD}")
    if not path.is_file():
        raise ModelError(f"{path} is not a regular file: pass an engine file")


def _header(path: Path, start: bytes) -> EngineHeader:
    if not start:
        raise ModelError(f"{path} is empty: copy the engine again, or {_REBUILD}")
    flavour = ENGINE_MAGIC.get(start[:4])
    if flavour is None:
        raise ModelError(
            f"{path} is not a TensorRT engine (it starts with {start[:4].hex(' ')}, not with ftrt or vtrt): {_REBUILD}"
        )
    if len(start) < _HEADER_BYTES:
        raise ModelError(
            f"{path} is cut off after {len(start)} bytes, inside its header: copy the engine again, or {_REBUILD}"
        )
    major, minor, patch, build = start[24:28]
    return EngineHeader(flavour, (major, minor, patch, build))


def _check_header(path: Path, header: EngineHeader, sidecar: Sidecar) -> None:
    if header.flavour != sidecar.flavour:
        raise ModelError(
            f"{path} is a {_NAMES[header.flavour]} engine and its sidecar is of a {_NAMES[sidecar.flavour]} engine: "
            f"copy the two files together, or run  {sidecar.rebuild_command}"
        )
    stated = tuple(int(part) for part in sidecar.tensorrt_version.split("."))
    # A byte holds a part, and builds count beyond 255, so parts are compared as the header can hold them.
    if any(part % 256 != found for part, found in zip(stated, header.version, strict=False)):
        raise ModelError(
            f"{path} was built by {header} and its sidecar says {sidecar.tensorrt_version}: copy the two files "
            f"together, or run  {sidecar.rebuild_command}"
        )


def _check_size(path: Path, size: int, sidecar: Sidecar) -> None:
    if size != sidecar.engine_bytes:
        what = "is truncated" if size < sidecar.engine_bytes else "is not the engine of its sidecar"
        raise ModelError(
            f"{path} {what}: it has {size:,} bytes and its sidecar says {sidecar.engine_bytes:,}; copy both files "
            f"again, or run  {sidecar.rebuild_command}"
        )


def _check_digest(path: Path, digest: str, sidecar: Sidecar) -> None:
    if digest != sidecar.engine_sha256:
        raise ModelError(
            f"{path} was altered, or is not the engine of its sidecar: its SHA-256 is {digest[:12]}... and the "
            f"sidecar says {sidecar.engine_sha256[:12]}...; copy both files again, or run  {sidecar.rebuild_command}"
        )
