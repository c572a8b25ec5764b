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

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

_HOME_OF = {
    "EngineOptions": "tensorrt.options",
    "EnginePrecision": "tensorrt.options",
    "EngineResult": "tensorrt.building",
    "ExportResult": "exporting",
    "Gate": "gate",
    "HalfChoice": "tensorrt.typed_model",
    "ImageChoice": "options",
    "OnnxOptions": "options",
    "ParityReport": "parity_report",
    "export_engine": "tensorrt.building",
    "export_onnx": "exporting",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
