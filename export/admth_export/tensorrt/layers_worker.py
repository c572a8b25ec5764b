"""The layers of an engine, as TensorRT's inspector tells them, in a process of its own that may crash.

In: the engine's path. Out: one JSON object with ``layers`` or ``error`` (type and message). The engine is held against
its sidecar, the driver and the GPU before TensorRT sees it, as in the runtime.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from admth_runtime.driver import ask_driver
from admth_runtime.engine_file import load_engine
from admth_runtime.engines.cuda import check_driver
from admth_runtime.engines.flavours import choose_module, cuda_major_of
from admth_runtime.engines.trt_logger import messages_of
from admth_runtime.errors import AdmthError, DeviceError

__all__ = ["layer_table", "main"]

_PRECISIONS = {"float": "fp32", "half": "fp16", "fp32": "fp32", "fp16": "fp16", "int8": "int8", "bfloat16": "bf16"}


def main() -> None:
    """Serve one request from standard input."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        try:
            answer: dict[str, Any] = {"layers": _layers(Path(sys.stdin.read()))}
        except AdmthError as error:
            answer = {"error": {"type": type(error).__name__, "message": str(error)}}
        out.write(json.dumps(answer) + "\n")
        out.flush()
        os._exit(0)


def layer_table(information: dict[str, Any]) -> list[dict[str, str]]:
    """Turn the inspector's JSON into rows of ``name``, ``operator`` and ``precision``.

    Layers that were built without details are names alone. The precision is that of the first output.
    """
    rows = []
    for layer in information.get("Layers", []):
        if isinstance(layer, str):
            rows.append({"name": layer, "operator": "", "precision": ""})
            continue
        outputs = layer.get("Outputs") or [{}]
        text = str(outputs[0].get("Format/Datatype", outputs[0].get("Datatype", ""))).lower()
        precision = next((name for sign, name in _PRECISIONS.items() if sign in text), text)
        rows.append(
            {"name": str(layer.get("Name", "")), "operator": str(layer.get("LayerType", "")), "precision": precision}
        )
    return rows


def _layers(path: Path) -> list[dict[str, str]]:
    file, content = load_engine(path)
    assert file.sidecar is not None
    check_driver(needed_by="listing the layers of an engine")
    gpu = ask_driver().gpus[0][1]
    if gpu not in file.sidecar.compute_capabilities:
        raise DeviceError(
            f"{path} is for {', '.join(file.sidecar.compute_capabilities)} and the GPU here is {gpu}: list its layers "
            f"where it runs, or run  {file.sidecar.rebuild_command}"
        )
    module = choose_module(file)
    check_driver(cuda_major=cuda_major_of(module.name), needed_by=module.name)
    messages = messages_of(module.bindings)
    runtime = module.bindings.Runtime(messages.logger)
    if file.sidecar.version_compatible:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise DeviceError(f"{path} cannot be loaded ({messages.reason()}): run  {file.sidecar.rebuild_command}")
    inspector = engine.create_engine_inspector()
    if inspector is None:
        raise DeviceError(f"{module.name} {module.version} has no inspector: the sidecar says what stayed in FP32")
    return layer_table(json.loads(inspector.get_engine_information(module.bindings.LayerInformationFormat.JSON)))


if __name__ == "__main__":
    main()
