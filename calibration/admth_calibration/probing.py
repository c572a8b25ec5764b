"""Looking inside a model while it runs: ranges of tensors, and tensors themselves, in bounded memory.

The model is not changed and not copied in memory. In protobuf's wire format a message may be written in parts, one
behind the other, so a probed model is the model's bytes with a tail that adds nodes and outputs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from admth_runtime.cpu import usable_cores
from admth_runtime.errors import ModelError, require
from admth_runtime.manifest import INPUT_NAME

if TYPE_CHECKING:
    import onnx

__all__ = ["Probe", "Range", "activation_batches", "collect_ranges", "open_probe", "session_options"]

_ERRORS_ONLY = 3
_DISABLED_OPTIMIZERS = ["WeightBiasQuantization"]  # as the runtime: it changes float biases


@dataclass(frozen=True)
class Range:
    """Smallest and largest value of a tensor over some images; NaN where one was NaN."""

    low: float
    high: float

    @property
    def largest(self) -> float:
        """Largest absolute value."""
        return float(np.maximum(abs(self.low), abs(self.high)))

    def merged(self, other: Range) -> Range:
        """Return the range of both."""
        return Range(float(np.minimum(self.low, other.low)), float(np.maximum(self.high, other.high)))


@dataclass(frozen=True, eq=False)
class Probe:
    """An ONNX Runtime session that returns chosen tensors.

    Attributes:
        session: the session.
        names: the tensors, in the order in which :meth:`run` returns them.
    """

    session: Any
    names: tuple[str, ...]

    def run(self, pixels: NDArray[np.uint8]) -> list[NDArray[Any]]:
        """Run uint8 ``[n, H, W, 3]`` and return each tensor."""
        outputs: list[NDArray[Any]] = self.session.run(list(self.names), {INPUT_NAME: pixels})
        return outputs


def session_options(threads: int | None = None) -> Any:
    """Return options of a session that leaves the processor to others while it waits.

    Args:
        threads: CPU threads; None takes one a usable core.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or usable_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


@contextmanager
def open_probe(
    model: onnx.ModelProto | Path,
    names: Sequence[str],
    *,
    types: dict[str, int] | None = None,
    nodes: Sequence[onnx.NodeProto] = (),
    threads: int | None = None,
) -> Iterator[Probe]:
    """Open a model on the CPU so that it returns the named tensors.

    Args:
        model: the model, or its file.
        names: tensors of the graph or of ``nodes``.
        types: element type of those that are no outputs of the graph yet.
        nodes: nodes to add.
        threads: CPU threads; None takes one a usable physical core.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        ModelError: ONNX Runtime refuses the model.
    """
    import onnx

    ort = require("onnxruntime", extra="cpu", purpose="running a model on images")
    tail = onnx.ModelProto()
    tail.graph.node.extend(nodes)
    for name, kind in (types or {}).items():
        tail.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    options = session_options(threads)
    with tempfile.TemporaryDirectory(prefix="admth-") as folder:
        path = Path(folder, "probed.onnx")
        with path.open("wb") as file:
            if isinstance(model, Path):
                with model.open("rb") as source:
                    while block := source.read(1 << 22):
                        file.write(block)
            else:
                file.write(model.SerializeToString())
            file.write(tail.SerializeToString())
        try:
            session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=_DISABLED_OPTIMIZERS
            )
        except Exception as error:  # onnxruntime's errors share no base class but Exception
            reason = " ".join(str(error).split()).replace(str(path), "the model")
            raise ModelError(
                f"onnxruntime {ort.__version__} refuses the model ({reason[:300]}): export it again"
            ) from error
    yield Probe(session, tuple(names))


def collect_ranges(
    model: onnx.ModelProto | Path, names: Sequence[str], batches: Iterable[NDArray[np.uint8]]
) -> dict[str, Range]:
    """Return the range of each float32 tensor over all images.

    The extremes are taken inside the graph, so memory does not grow with the number of tensors or images.

    Args:
        model: the model, or its file.
        names: float32 tensors of the graph.
        batches: pixels, uint8 ``[n, H, W, 3]`` each.
    """
    from onnx import TensorProto, helper

    # A shape of one element, so that tensors of any rank reduce to the same thing.
    nodes: list[onnx.NodeProto] = []
    outputs: list[str] = []
    for index, name in enumerate(names):
        for operator, ending in (("ReduceMin", "low"), ("ReduceMax", "high")):
            output = f"admth.probe.{index}.{ending}"
            nodes.append(helper.make_node(operator, [name], [output], keepdims=0))
            outputs.append(output)
    ranges: dict[str, Range] = {}
    types = {name: int(TensorProto.FLOAT) for name in outputs}
    with open_probe(model, outputs, types=types, nodes=nodes) as probe:
        for pixels in batches:
            values = [float(value) for value in probe.run(pixels)]
            for index, name in enumerate(names):
                found = Range(values[2 * index], values[2 * index + 1])
                ranges[name] = ranges[name].merged(found) if name in ranges else found
    return ranges


def activation_batches(
    model: onnx.ModelProto | Path, types: dict[str, int], batches: Iterable[NDArray[np.uint8]]
) -> Iterator[dict[str, NDArray[Any]]]:
    """Yield the values of tensors, by name, for one batch of pixels after the other.

    Args:
        model: the model, or its file.
        types: element type of each tensor, none of which is an output of the graph.
        batches: pixels, uint8 ``[n, H, W, 3]`` each; memory holds the tensors of one batch.
    """
    with open_probe(model, list(types), types=types) as probe:
        for pixels in batches:
            yield dict(zip(probe.names, probe.run(pixels), strict=True))
