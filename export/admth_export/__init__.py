"""Export of trained networks to ONNX and TensorRT, with the sign-parity gate.

::

    from admth_export import export_onnx, verify

    result = export_onnx("runs/fashion")  # runs/fashion/model.onnx, once its bits have proved to be PyTorch's
    result.parity.table()

    report = verify("runs/fashion/model.onnx")
    report.passed

    from admth_export import EnginePrecision, export_engine

    export_engine("runs/fashion/model.onnx", precision=EnginePrecision("fp16"))  # an engine and its sidecar

Names are imported when they are first used, so importing this package does not import PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from admth_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from admth_export.exporting import ExportResult, export_onnx
    from admth_export.gate import Gate
    from admth_export.options import ImageChoice, OnnxOptions
    from admth_export.parity_report import ParityReport
    from admth_export.tensorrt.building import EngineResult, export_engine
    from admth_export.tensorrt.options import EngineOptions, EnginePrecision
    from admth_export.tensorrt.typed_model import HalfChoice
    from admth_export.verification import verify

__all__ = [
    "EngineOptions",
    "EnginePrecision",
    "EngineResult",
    "ExportResult",
    "Gate",
    "HalfChoice",
    "ImageChoice",
    "OnnxOptions",
    "ParityReport",
    "export_engine",
    "export_onnx",
    "verify",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "exporting": ("ExportResult", "export_onnx"),
        "gate": ("Gate",),
        "options": ("ImageChoice", "OnnxOptions"),
        "parity_report": ("ParityReport",),
        "tensorrt.building": ("EngineResult", "export_engine"),
        "tensorrt.options": ("EngineOptions", "EnginePrecision"),
        "tensorrt.typed_model": ("HalfChoice",),
        "verification": ("verify",),
    },
)
