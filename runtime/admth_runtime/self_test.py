"""Golden vectors: a few synthetic pictures whose codes travel in the manifest, and the self-test that compares them.

The pictures come from a recipe in integers, so that every machine makes the same pixels and none is stored. The codes
are those of the model where it was made: PyTorch's own for FP32. Another processor rounds otherwise, and a logit near
zero may then fall on the other side. So a bit counts only where its logit lies well beyond the noise of the model's
precision, and in half and 8-bit precision a small share of those may differ too. What breaks a model in the field, such
as damaged weights, a kernel that is wrong, or an engine built for another model, turns far more bits than that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.errors import InputError, ManifestError, SelfTestError
from admth_runtime.manifest import Manifest
from admth_runtime.packing import from_hex, pack_bits, pack_logits, to_hex

if TYPE_CHECKING:
    from admth_runtime.runtime import HashRuntime

__all__ = [
    "GOLDEN_RECIPE",
    "GoldenVectors",
    "LengthCheck",
    "SelfTestReport",
    "golden_pixels",
    "golden_vectors",
    "golden_vectors_of",
    "run_self_test",
]

UInt8Array = NDArray[np.uint8]

GOLDEN_RECIPE = "integer-patterns-1"
"""Names what :func:`golden_pixels` draws. Its pixels never change: other pictures are another recipe."""

# Noise, as a share of a length's root mean square logit. Another processor moves FP32 logits by some 1e-6 of it, CUDA
# and TensorRT with TF32 by 1e-3, FP16 kernels by 1e-2; 8-bit kernels differ in rounding and saturation.
_NOISE = {"fp32": 0.02, "fp16": 0.1, "int8": 0.25, "int8-weights": 0.25, "int4-weights": 0.25}
_TOLERANCE = {"fp32": 0.0, "fp16": 0.01, "int8": 0.03, "int8-weights": 0.03, "int4-weights": 0.03}


@dataclass(frozen=True)
class GoldenVectors:
    """Codes of the golden pictures; the manifest's field ``golden`` is its JSON form.

    Attributes:
        recipe: which pictures.
        precision: of the model that gave the codes.
        codes: packed uint8 ``[n, L / 8]`` by code length L.
        reliable: packed like ``codes``: a 1 where the bit counts.
        tolerance: share of the bits that count, 0 to 1, that may differ.
    """

    recipe: str
    precision: str
    codes: Mapping[int, UInt8Array]
    reliable: Mapping[int, UInt8Array]
    tolerance: float

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, the inverse of :meth:`from_dict`: codes are hexadecimal, one text a picture."""
        return {
            "recipe": self.recipe,
            "precision": self.precision,
            "tolerance": self.tolerance,
            "codes": {str(length): to_hex(code) for length, code in self.codes.items()},
            "reliable": {str(length): to_hex(bits) for length, bits in self.reliable.items()},
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], code_lengths: tuple[int, ...]) -> GoldenVectors:
        """Read the JSON form.

        Raises:
            ManifestError: another recipe, a field that is missing or malformed, or other code lengths.
        """
        recipe = fields.get("recipe")
        if recipe != GOLDEN_RECIPE:
            raise ManifestError(
                f"golden vectors of the recipe {recipe!r} are unknown to this version, which knows {GOLDEN_RECIPE!r}: "
                "run  pip install -U admth"
            )
        try:
            codes = {length: from_hex(fields["codes"][str(length)]) for length in code_lengths}
            reliable = {length: from_hex(fields["reliable"][str(length)]) for length in code_lengths}
            vectors = cls(recipe, str(fields["precision"]), codes, reliable, float(fields["tolerance"]))
        except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ManifestError(f"the golden vectors are malformed ({error}): export the model again") from error
        counts = {array.shape for length in code_lengths for array in (codes[length], reliable[length])}
        if counts != {(_PICTURES, length // 8) for length in code_lengths} or not 0.0 <= vectors.tolerance < 1.0:
            raise ManifestError("the golden vectors do not fit the code lengths: export the model again")
        return vectors


@dataclass(frozen=True)
class LengthCheck:
    """The self-test at one code length, in bits over all golden pictures.

    Attributes:
        checked: bits that count.
        wrong: how many of them differ.
        allowed: how many may.
    """

    checked: int
    wrong: int
    allowed: int

    @property
    def passed(self) -> bool:
        """Whether no more bits differ than may."""
        return self.wrong <= self.allowed


@dataclass(frozen=True)
class SelfTestReport:
    """What a self-test found.

    Attributes:
        lengths: by code length.
    """

    lengths: Mapping[int, LengthCheck]

    @property
    def passed(self) -> bool:
        """Whether every code length passed."""
        return all(check.passed for check in self.lengths.values())

    def __str__(self) -> str:
        if self.passed:
            bits = sum(check.checked for check in self.lengths.values())
            wrong = sum(check.wrong for check in self.lengths.values())
            return f"passed: {wrong} of {bits:,} checked bits differ"
        failures = [
            f"at {length} bits {check.wrong} of {check.checked} checked bits differ and {check.allowed} may"
            for length, check in self.lengths.items()
            if not check.passed
        ]
        return "; ".join(failures)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form."""
        lengths = {
            str(length): {"checked": check.checked, "wrong": check.wrong, "allowed": check.allowed}
            for length, check in self.lengths.items()
        }
        return {"passed": self.passed, "bits": lengths}


def run_self_test(runtime: HashRuntime) -> SelfTestReport:
    """Encode the golden pictures and compare their codes with the manifest's; see :meth:`HashRuntime.self_test`.

    Raises:
        ManifestError: the manifest has no golden vectors, malformed ones, or those of a recipe of a later version.
        SelfTestError: more bits differ than may.
    """
    manifest = runtime.manifest
    if manifest.golden is None:
        raise ManifestError(
            f"{runtime.model_path} has no golden vectors to test itself with: export it again with this version, or "
            "leave the self-test out"
        )
    try:
        vectors = GoldenVectors.from_dict(manifest.golden, manifest.code_lengths)
    except ManifestError as error:
        raise ManifestError(f"{runtime.model_path}: {error}") from error
    codes = runtime.encode_pixels(golden_pixels(manifest.preprocessing.shape))
    report = SelfTestReport({length: _check(vectors, length, codes[length]) for length in manifest.code_lengths})
    if not report.passed:
        engine = runtime.engine
        raise SelfTestError(
            f"{runtime.model_path} fails its self-test with {engine.name} {engine.version} on {engine.device}: {report}"
            ": copy the model again, and run  admth-run doctor  if that does not help"
        )
    return report


def golden_vectors_of(runtime: HashRuntime) -> dict[str, Any]:
    """Return the golden vectors of a model as this machine runs it: the manifest's field ``golden``.

    For a model whose own arithmetic is the reference, such as an INT8 one::

        with HashRuntime("model.int8.onnx", device="cpu") as runtime:
            manifest = replace(runtime.manifest, golden=golden_vectors_of(runtime))
    """
    manifest = runtime.manifest
    codes = runtime.encode_pixels(golden_pixels(manifest.preprocessing.shape))
    return golden_vectors(codes.logits, manifest)


def golden_vectors(logits: Mapping[int, NDArray[np.float32]], manifest: Manifest) -> dict[str, Any]:
    """Return the golden vectors that these logits make: the manifest's field ``golden``.

    Args:
        logits: float32 ``[n, L]`` by code length, of :func:`golden_pixels` in order.
        manifest: of the model; it says the code lengths and the precision, and so the noise.

    Raises:
        InputError: a code length is missing, or a logit is not finite.
    """
    noise = _NOISE[manifest.precision]
    codes, reliable = {}, {}
    for length in manifest.code_lengths:
        values = np.asarray(logits[length], dtype=np.float64)
        if values.shape != (_PICTURES, length) or not np.isfinite(values).all():
            raise InputError(f"logits at {length} bits are {list(values.shape)} or not finite: pass golden_pixels'")
        codes[length] = pack_logits(values.astype(np.float32))
        reliable[length] = pack_bits(np.abs(values) > noise * math.sqrt(float(np.mean(values**2))))
    tolerance = _TOLERANCE[manifest.precision]
    return GoldenVectors(GOLDEN_RECIPE, manifest.precision, codes, reliable, tolerance).to_dict()


def golden_pixels(shape: tuple[int, int, int]) -> UInt8Array:
    """Draw the golden pictures: ramps, tiles, rings, and a mosaic of shaded tiles.

    Args:
        shape: of one picture, ``(H, W, 3)``.

    Returns:
        uint8 ``[4, H, W, 3]``, by integer arithmetic alone.
    """
    height, width, channels = shape
    y, x, c = np.meshgrid(*(np.arange(size, dtype=np.int64) for size in (height, width, channels)), indexing="ij")
    across, down = 255 * x // max(width - 1, 1), 255 * y // max(height - 1, 1)
    ramps = np.choose(c, (across, down, 255 - (across + down) // 2))
    tiles = _scattered((8 * y // height * 8 + 8 * x // width) * 3 + c) & 255
    # 256 units across the picture, so that rings look alike at every size.
    radius2 = (256 * y // height - 100) ** 2 + (256 * x // width - 140) ** 2
    rings = radius2 // (40 + 30 * c) & 255
    mosaic = (_scattered((3 * y // height * 3 + 3 * x // width) * 3 + c + 1000) & 127) + (
        across * (c + 1) + down * 3
    ) % 128
    return np.stack([ramps, tiles, rings, mosaic]).astype(np.uint8)


_PICTURES = 4


def _scattered(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Map integers to others that look random: a 32-bit mixer of shifts and multiplications."""
    mask = np.uint64(0xFFFFFFFF)
    mixed = (numbers.astype(np.uint64) * np.uint64(0x9E3779B1)) & mask
    mixed ^= mixed >> np.uint64(15)
    mixed = (mixed * np.uint64(0x85EBCA77)) & mask
    mixed ^= mixed >> np.uint64(13)
    return (mixed >> np.uint64(8)).astype(np.int64)


def _check(vectors: GoldenVectors, length: int, codes: UInt8Array) -> LengthCheck:
    counts = vectors.reliable[length]
    checked = int(np.unpackbits(counts).sum())
    wrong = int(np.unpackbits((codes ^ vectors.codes[length]) & counts).sum())
    return LengthCheck(checked, wrong, math.ceil(vectors.tolerance * checked))
