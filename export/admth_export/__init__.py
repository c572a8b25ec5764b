"""Export of trained networks to ONNX, with the sign-parity gate.

::

    from admth_export import export_onnx, verify

    result = export_onnx("runs/fashion")  # runs/fashion/model.onnx, once its bits have proved to be PyTorch's
    result.parity.table()

    report = verify("runs/fashion/model.onnx")
    report.passed

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
    from admth_export.verification import verify

__all__ = ["ExportResult", "Gate", "ImageChoice", "OnnxOptions", "ParityReport", "export_onnx", "verify"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "exporting": ("ExportResult", "export_onnx"),
        "gate": ("Gate",),
        "options": ("ImageChoice", "OnnxOptions"),
        "parity_report": ("ParityReport",),
        "verification": ("verify",),
    },
)
