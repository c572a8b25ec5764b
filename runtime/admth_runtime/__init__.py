"""The lean runtime: images in, packed binary codes of every length out.

::

    from admth_runtime import HashRuntime

    with HashRuntime("model.onnx") as runtime:
        codes = runtime.encode(["a.jpg", "b.png"])  # one inference call
        codes[64]  # uint8 [2, 8]

Names are imported when they are first used, so importing this package costs nothing and importing
:class:`HashRuntime` does not start an inference engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from admth_runtime._version import __version__
from admth_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from admth_runtime.codes_file import EncodedImages, read_codes, write_codes
    from admth_runtime.engine import Engine
    from admth_runtime.engines.device_arrays import DeviceCodes
    from admth_runtime.errors import (
        AdmthError,
        CodeLengthError,
        DeviceError,
        ImageError,
        InputError,
        ManifestError,
        MissingExtraError,
        ModelError,
        OutputError,
        PipelineError,
        QueueFullError,
        SelfTestError,
    )
    from admth_runtime.index import HashIndex, SearchHits
    from admth_runtime.manifest import Manifest
    from admth_runtime.model import ModelFile, read_model
    from admth_runtime.onnx_file import OnnxFile, read_onnx
    from admth_runtime.packing import (
        from_hex,
        hamming_distance,
        hamming_matrix,
        pack_bits,
        pack_logits,
        to_hex,
        unpack_bits,
    )
    from admth_runtime.pipeline.options import PipelineOptions
    from admth_runtime.pipeline.pipeline import HashPipeline
    from admth_runtime.preprocessing import PreprocessingSpec, load_image, preprocess
    from admth_runtime.results import HashCodes
    from admth_runtime.runtime import HashRuntime
    from admth_runtime.sidecar import Sidecar, read_sidecar

__all__ = [
    "AdmthError",
    "CodeLengthError",
    "DeviceCodes",
    "DeviceError",
    "EncodedImages",
    "Engine",
    "HashCodes",
    "HashIndex",
    "HashPipeline",
    "HashRuntime",
    "ImageError",
    "InputError",
    "Manifest",
    "ManifestError",
    "MissingExtraError",
    "ModelError",
    "ModelFile",
    "OnnxFile",
    "OutputError",
    "PipelineError",
    "PipelineOptions",
    "PreprocessingSpec",
    "QueueFullError",
    "SearchHits",
    "SelfTestError",
    "Sidecar",
    "__version__",
    "from_hex",
    "hamming_distance",
    "hamming_matrix",
    "load_image",
    "pack_bits",
    "pack_logits",
    "preprocess",
    "read_codes",
    "read_model",
    "read_onnx",
    "read_sidecar",
    "to_hex",
    "unpack_bits",
    "write_codes",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "codes_file": ("EncodedImages", "read_codes", "write_codes"),
        "engine": ("Engine",),
        "engines.device_arrays": ("DeviceCodes",),
        "errors": (
            "AdmthError",
            "CodeLengthError",
            "DeviceError",
            "ImageError",
            "InputError",
            "ManifestError",
            "MissingExtraError",
            "ModelError",
            "OutputError",
            "PipelineError",
            "QueueFullError",
            "SelfTestError",
        ),
        "index": ("HashIndex", "SearchHits"),
        "manifest": ("Manifest",),
        "model": ("ModelFile", "read_model"),
        "onnx_file": ("OnnxFile", "read_onnx"),
        "packing": (
            "from_hex",
            "hamming_distance",
            "hamming_matrix",
            "pack_bits",
            "pack_logits",
            "to_hex",
            "unpack_bits",
        ),
        "pipeline.options": ("PipelineOptions",),
        "pipeline.pipeline": ("HashPipeline",),
        "preprocessing": ("PreprocessingSpec", "load_image", "preprocess"),
        "results": ("HashCodes",),
        "runtime": ("HashRuntime",),
        "sidecar": ("Sidecar", "read_sidecar"),
    },
)
