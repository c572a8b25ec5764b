"""What a report is made of, read from a run's folder; a part that is not there yet is said, with the command for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from admth_export.report.neighbours import Neighbours, neighbours_of_files, neighbours_of_run
from admth_runtime.errors import CheckpointError, DataError, InputError, ModelError
from admth_runtime.files import sha256_of_file
from admth_runtime.info import describe_model
from admth_training.checkpoint import METRICS_FILE, WEIGHTS_FILE, RunConfig, load_run_config, read_metrics

__all__ = ["EVALUATION_FILE", "MODEL_FILE", "FileFact", "Missing", "ReportFacts", "ReportOptions", "gather", "measure"]

MODEL_FILE = "model.onnx"
EVALUATION_FILE = "evaluation.json"
_LATENCY_QUERIES = 200


@dataclass(frozen=True)
class Missing:
    """A part of the report that is not there.

    Attributes:
        what: one sentence that says so.
        command: what makes it, or an empty text.
    """

    what: str
    command: str = ""


@dataclass(frozen=True)
class FileFact:
    """A file of the run: its name, its size in bytes and its SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class ReportOptions:
    """What a report is about.

    Attributes:
        run: the run's folder.
        model: the ONNX model; None is ``model.onnx`` of the run, if it is there.
        database_codes: encoded images to search; None encodes the run's database.
        query_codes: encoded queries; None encodes some of the run's queries.
        queries: how many queries are shown.
        latency: what ``admth-run bench --json`` printed; None measures now, on this machine.
    """

    run: Path
    model: Path | None = None
    database_codes: Path | None = None
    query_codes: Path | None = None
    queries: int = 8
    latency: Path | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.queries <= 50:
            raise InputError(f"--queries {self.queries} is not from 1 to 50")
        if (self.database_codes is None) != (self.query_codes is None):
            given, other = ("database", "query") if self.query_codes is None else ("query", "database")
            raise InputError(f"--{given}-codes was given without --{other}-codes: encode and pass both, or neither")


@dataclass(frozen=True)
class ReportFacts:
    """Everything that the page shows.

    Attributes:
        run: the run's folder.
        config: its configuration.
        training: the records of ``metrics.jsonl``.
        evaluation: ``evaluation.json``.
        model_path: the ONNX model, or None where there is none.
        model: what ``admth-run info --json`` says of it.
        parity: the model's parity report.
        neighbours: queries and what they find.
        latency: what ``admth-run bench --json`` says.
        files: the run's files.
    """

    run: Path
    config: RunConfig
    training: list[dict[str, Any]] | Missing
    evaluation: dict[str, Any] | Missing
    model_path: Path | None
    model: dict[str, Any] | Missing
    parity: dict[str, Any] | Missing
    neighbours: Neighbours | Missing
    latency: dict[str, Any] | Missing
    files: list[FileFact]


def gather(options: ReportOptions) -> ReportFacts:
    """Read a run's folder, search its images, and measure the latency where no figures were given.

    Raises:
        CheckpointError: the folder is no run, or one of its files is broken.
        InputError: a file that was named is unusable.
        ModelError: the model is broken, or belongs to another run.
    """
    run = options.run
    config = load_run_config(run)
    weights = sha256_of_file(run / WEIGHTS_FILE) if (run / WEIGHTS_FILE).is_file() else None
    path = options.model
    if path is None and (run / MODEL_FILE).is_file():
        path = run / MODEL_FILE
    no_model = Missing(f"This run has no {MODEL_FILE} yet.", "admth-export onnx")
    model = describe_model(path) if path is not None else None
    if model is not None and weights is not None and model["checkpoint_sha256"] != weights:
        raise ModelError(
            f"{path} was exported from another checkpoint ({model['checkpoint_sha256'][:12]}...) than that of {run} "
            f"({weights[:12]}...): run  admth-export onnx {run}"
        )
    has_metrics = (run / METRICS_FILE).is_file()
    return ReportFacts(
        run=run,
        config=config,
        training=read_metrics(run) if has_metrics else Missing(f"The run has no {METRICS_FILE}.", "admth-train fit"),
        evaluation=_evaluation(run, weights),
        model_path=path,
        model=no_model if model is None else model,
        parity=no_model if path is None or model is None else _parity(path, model),
        neighbours=no_model if path is None or model is None else _neighbours(options, config, path, model),
        latency=no_model if path is None else _latency(options, path),
        files=_files(run, path),
    )


def measure(model: Path, queries: int = _LATENCY_QUERIES) -> dict[str, Any]:
    """Measure a model's latency with ``admth-run bench``, in a process of its own, where PyTorch is not loaded.

    Raises:
        ModelError: the measurement failed; the message is that of ``admth-run bench``.
    """
    command = [sys.executable, "-m", "admth_runtime", "bench", str(model), "--queries", str(queries), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False, text=True)
    if done.returncode != 0:
        raise ModelError(f"measuring the latency of {model} failed: run  admth-run bench {model}")
    return _latency_fields(done.stdout, f"admth-run bench {model}")


def _evaluation(run: Path, weights: str | None) -> dict[str, Any] | Missing:
    path = run / EVALUATION_FILE
    if not path.is_file():
        return Missing("Retrieval has not been evaluated yet.", f"admth-train evaluate {run}")
    fields = _read_json(path, f"admth-train evaluate {run}")
    if not {"protocol", "metrics"} <= set(fields):
        raise CheckpointError(f"{path} is no evaluation of admth: run  admth-train evaluate {run}")
    made_from = fields.get("checkpoint_sha256")
    if made_from is not None and weights is not None and made_from != weights:
        return Missing("The evaluation belongs to an earlier checkpoint of this run.", f"admth-train evaluate {run}")
    return fields


def _parity(model_path: Path, model: Mapping[str, Any]) -> dict[str, Any] | Missing:
    command = f"admth-export verify {model_path}"
    if model["parity"] is None:
        return Missing("The model was exported with --no-verify, so nothing is known of its sign parity.", command)
    path = model_path.with_suffix(".parity.json")
    if not path.is_file():
        return Missing(f"The model passed its gate, but {path.name} is not beside it.", command)
    return _read_json(path, command)


def _neighbours(
    options: ReportOptions, config: RunConfig, path: Path, model: Mapping[str, Any]
) -> Neighbours | Missing:
    if options.query_codes is not None and options.database_codes is not None:
        return neighbours_of_files(
            options.query_codes, options.database_codes, options.queries, model_sha256=model["sha256"]
        )
    try:
        return neighbours_of_run(options.run, config, path, options.queries)
    except DataError as error:
        # The rest of the report stands without the images, which may lie on the machine that trained.
        return Missing(
            f"The run's data cannot be used: {error}.",
            "admth-export report --query-codes FILE --database-codes FILE",
        )


def _latency(options: ReportOptions, model: Path) -> dict[str, Any]:
    if options.latency is None:
        return measure(model)
    try:
        text = options.latency.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{options.latency}: cannot be read ({error}): run  admth-run bench {model} --json") from error
    fields = _latency_fields(text, str(options.latency))
    measured, digest = fields.get("model_sha256"), sha256_of_file(model)
    if measured != digest:
        raise InputError(
            f"{options.latency}: measured another model ({str(measured)[:12]}, not {digest[:12]}): "
            f"run  admth-run bench {model} --json"
        )
    return fields


def _latency_fields(text: str, source: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
        stages = fields["milliseconds"]
        complete = all({"p50", "p90", "p99"} <= set(times) for times in stages.values()) and bool(stages)
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise InputError(f"{source}: is not what  admth-run bench MODEL --json  prints")
    return dict(fields)


def _files(run: Path, model: Path | None) -> list[FileFact]:
    paths = [run / WEIGHTS_FILE, *([model] if model is not None else [])]
    return [FileFact(path.name, path.stat().st_size, sha256_of_file(path)) for path in paths if path.is_file()]


def _read_json(path: Path, command: str) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): run  {command}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: is not a JSON object: run  {command}")
    return fields
