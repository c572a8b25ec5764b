"""From facts to one HTML page that needs nothing else: styles, charts and pictures are inside."""

from __future__ import annotations

import importlib.resources
from datetime import datetime, timezone
from pathlib import PurePath
from typing import Any

from admth_export.report import charts
from admth_export.report.facts import Missing, ReportFacts
from admth_export.report.neighbours import Neighbours
from admth_export.report.reproduce import commands_of
from admth_runtime._version import __version__
from admth_runtime.errors import require

__all__ = ["render"]


def render(facts: ReportFacts) -> str:
    """Return the page.

    Raises:
        MissingExtraError: Jinja2 or Matplotlib is not installed.
    """
    jinja2 = require("jinja2", extra="export", purpose="writing a report")
    templates = importlib.resources.files("admth_export.report") / "templates"
    # Autoescape: names of images, classes and folders come from anywhere.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(bytes=_bytes, percent=_percent, count=_count, short=_short)
    environment.tests["missing"] = lambda value: isinstance(value, Missing)
    page = environment.from_string((templates / "report.html.jinja").read_text(encoding="utf-8"))
    text: str = page.render(
        facts=facts,
        style=(templates / "report.css").read_text(encoding="utf-8"),
        version=__version__,
        date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        name=facts.run.resolve().name,
        lengths=list(facts.config.network.code_lengths),
        training_charts=_training_charts(facts),
        retrieval=_retrieval(facts.evaluation),
        parity=_parity(facts.parity),
        hits=_hits(facts.neighbours),
        commands=commands_of(facts.config, facts.run),
    )
    return text


def _training_charts(facts: ReportFacts) -> list[tuple[str, str]]:
    if isinstance(facts.training, Missing) or not facts.training:
        return []
    drawn = [("Loss and its terms", charts.loss_chart(facts.training))]
    if any(record.get("map") for record in facts.training):
        drawn.append(("mAP while training", charts.map_by_epoch_chart(facts.training)))
    else:
        drawn.append(("Learning rate", charts.learning_rate_chart(facts.training)))
    return drawn


def _retrieval(evaluation: dict[str, Any] | Missing) -> dict[str, Any] | None:
    """Shape ``evaluation.json`` for the page: rows of a table, protocol facts and charts."""
    if isinstance(evaluation, Missing):
        return None
    protocol = evaluation["protocol"]
    metrics = {int(length): values for length, values in evaluation["metrics"].items()}
    first = next(iter(metrics.values()))
    cutoff = "all" if "all" in first["map"] else next(iter(first["map"]))
    maps = {length: values["map"][cutoff] for length, values in metrics.items()}
    baseline = protocol["random_baseline"]
    drawn = [(f"mAP@{cutoff}", charts.map_chart(maps, baseline))]
    if first["precision_at"]:
        at = {length: {int(n): v for n, v in m["precision_at"].items()} for length, m in metrics.items()}
        drawn.append(("Precision of the first N", charts.precision_at_chart(at)))
    curves = {length: (m["pr_curve"]["recall"], m["pr_curve"]["precision"]) for length, m in metrics.items()}
    drawn.append(("Precision and recall by Hamming radius", charts.precision_recall_chart(curves, baseline)))
    return {
        "cutoff": cutoff,
        "cutoffs": list(first["map"]),
        "maps": maps,
        "metrics": metrics,
        "shown_at": [n for n in ("10", "100", "1000") if n in first["precision_at"]],
        "baseline": baseline,
        "protocol": protocol,
        "charts": drawn,
    }


def _parity(parity: dict[str, Any] | Missing) -> dict[str, Any] | None:
    """Shape the parity report for the page: totals of the run over all images, and the margin histogram."""
    if isinstance(parity, Missing):
        return None
    first = parity["runs"][0]
    lengths = {int(length): values for length, values in first["lengths"].items()}
    counts = {length: values["margins"]["bits"] for length, values in lengths.items()}
    edges = next(iter(lengths.values()))["margins"]["edges"]
    flips = [flip["margin"] for values in lengths.values() for flip in values["flips"]]
    return {
        "report": parity,
        "lengths": lengths,
        "bits": sum(values["bits"] for values in lengths.values()),
        "flips": sum(values["flip_count"] for values in lengths.values()),
        "images": first["images"],
        "others": parity["runs"][1:],
        "chart": charts.margin_chart(edges, counts, flips, parity["gate"]["noise_threshold"]),
    }


def _hits(neighbours: Neighbours | Missing) -> list[tuple[int, int, int]]:
    """Count right and known neighbours at each length shown."""
    if isinstance(neighbours, Missing):
        return []
    return [(length, *neighbours.right_share(length)) for length in neighbours.lengths]


def _short(name: str) -> str:
    """Keep the last two parts of a path: enough to find the image, and nothing about whose machine it was on."""
    return "/".join(PurePath(name).parts[-2:])


def _bytes(size: int) -> str:
    """Write a size in the unit that people read: 16.2 MB, with powers of ten as shops and df -H use them."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f}\N{NO-BREAK SPACE}{unit}"
        value /= 1000
    raise AssertionError("unreachable")


def _percent(share: float) -> str:
    """Write a share as a percentage without rounding a flaw away: only 1 itself is 100 %."""
    if share == 1:
        return "100\N{NO-BREAK SPACE}%"
    return f"{min(share * 100, 99.9999):.4f}".rstrip("0").rstrip(".") + "\N{NO-BREAK SPACE}%"


def _count(value: int) -> str:
    return f"{value:,}"
