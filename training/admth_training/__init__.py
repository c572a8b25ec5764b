"""Training of multi-length hashing networks with PyTorch.

::

    from admth_training import evaluate_run, fit, load_run, open_run_data

    fit(config, "runs/fashion")  # a RunConfig; model.safetensors, config.json, metrics.jsonl
    run = load_run("runs/fashion")
    dataset, splits = open_run_data(run)
    evaluate_run(run, dataset, splits).table()

Names are imported when they are first used, so importing this package does not import PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from admth_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from admth_training.checkpoint import RunConfig, TrainedRun, load_run
    from admth_training.config import DataConfig, FitConfig, NetworkConfig, ObjectiveConfig
    from admth_training.data import ImageDataset, open_dataset
    from admth_training.encode import encode_split, reference_logits
    from admth_training.evaluate import evaluate_run, open_run_data
    from admth_training.evaluation import Evaluation, evaluate_lengths
    from admth_training.fitting import FitResult, fit
    from admth_training.leakage import LeakageReport, check_leakage
    from admth_training.loader import PixelLoader
    from admth_training.metrics import RetrievalMetrics, evaluate_codes
    from admth_training.network import MultiLengthHashNetwork, build_network
    from admth_training.objective import LossTerms, admth_loss
    from admth_training.splits import Splits, choose_splits, make_splits

__all__ = [
    "DataConfig",
    "Evaluation",
    "FitConfig",
    "FitResult",
    "ImageDataset",
    "LeakageReport",
    "LossTerms",
    "MultiLengthHashNetwork",
    "NetworkConfig",
    "ObjectiveConfig",
    "PixelLoader",
    "RetrievalMetrics",
    "RunConfig",
    "Splits",
    "TrainedRun",
    "admth_loss",
    "build_network",
    "check_leakage",
    "choose_splits",
    "encode_split",
    "evaluate_codes",
    "evaluate_lengths",
    "evaluate_run",
    "fit",
    "load_run",
    "make_splits",
    "open_dataset",
    "open_run_data",
    "reference_logits",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "checkpoint": ("RunConfig", "TrainedRun", "load_run"),
        "config": ("DataConfig", "FitConfig", "NetworkConfig", "ObjectiveConfig"),
        "data": ("ImageDataset", "open_dataset"),
        "encode": ("encode_split", "reference_logits"),
        "evaluate": ("evaluate_run", "open_run_data"),
        "evaluation": ("Evaluation", "evaluate_lengths"),
        "fitting": ("FitResult", "fit"),
        "leakage": ("LeakageReport", "check_leakage"),
        "loader": ("PixelLoader",),
        "metrics": ("RetrievalMetrics", "evaluate_codes"),
        "network": ("MultiLengthHashNetwork", "build_network"),
        "objective": ("LossTerms", "admth_loss"),
        "splits": ("Splits", "choose_splits", "make_splits"),
    },
)
