"""Pictures of a training run and of its retrieval figures, drawn with Matplotlib, as PNG or SVG.

Only Figure objects are used, never pyplot, so no global state is kept and no display is needed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from admth_runtime.errors import InputError, require
from admth_runtime.files import write_bytes
from admth_training.evaluation import Evaluation
from admth_training.metrics import RetrievalMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["figure_bytes", "retrieval_figure", "save_figure", "training_figure"]

_FORMATS = ("png", "svg")
_INK = "#26323c"
_MUTED = "#8a97a3"
_ACCENT = "#c2571a"
_STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e8ec",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.axisbelow": True,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    # Identifiers inside an SVG are random unless salted; equal figures are to give equal files.
    "svg.hashsalt": "admth",
}


def retrieval_figure(evaluation: Evaluation) -> Figure:
    """Draw mAP by code length, P@N, the precision-recall curve, and what lies within the Hamming radius.

    Returns:
        A Matplotlib figure of four panels.

    Raises:
        MissingExtraError: Matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_STYLE):
        figure = _new_figure((10.5, 7.6))
        axes = figure.subplots(2, 2)
        colours = _colours(evaluation.code_lengths)
        _draw_map(axes[0][0], evaluation)
        _draw_precision_at(axes[0][1], evaluation, colours)
        _draw_curve(axes[1][0], evaluation, colours)
        _draw_radius(axes[1][1], evaluation, colours)
        first = next(iter(evaluation.metrics.values()))
        figure.suptitle(
            f"{evaluation.dataset + ': ' if evaluation.dataset else ''}{first.query_size:,} queries against "
            f"{first.database_size:,} images",
            x=0.01,
            ha="left",
            color=_INK,
            fontsize=12.5,
        )
    return figure


def training_figure(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the training curve from the records of ``metrics.jsonl``.

    Args:
        records: an epoch each, with ``epoch``, ``loss``, ``likelihood``, ``consistency``, ``learning_rate`` and
            ``images_per_second``; some may have ``map``, a mAP by code length.

    Returns:
        A Matplotlib figure: loss, its two terms, learning rate with speed, and mAP where there is any.

    Raises:
        InputError: there are no records, or one lacks a field.
        MissingExtraError: Matplotlib is not installed.
    """
    if not records:
        raise InputError("there are no training records to draw: train for at least one epoch")
    for record in records:
        if missing := sorted({"epoch", "loss", "likelihood", "consistency", "learning_rate"} - set(record)):
            raise InputError(f"a training record lacks {', '.join(missing)}: it is no line of metrics.jsonl")
    measured = [record for record in records if record.get("map")]
    matplotlib = _matplotlib()
    with matplotlib.rc_context(_STYLE):
        panels = 4 if measured else 3
        figure = _new_figure((3.5 * panels, 3.3))
        axes = figure.subplots(1, panels)
        _draw_loss(axes[0], records)
        _draw_terms(axes[1], records)
        _draw_rate(axes[2], records)
        if measured:
            _draw_map_by_epoch(axes[3], measured)
        for panel in axes:
            panel.set_xlabel("epoch")
            panel.xaxis.get_major_locator().set_params(integer=True)
            if len(records) == 1:
                panel.set_xticks([records[0]["epoch"]])
    return figure


def figure_bytes(figure: Figure, file_format: str) -> bytes:
    """Return a figure as the bytes of a file; equal figures give equal bytes.

    Args:
        figure: from one of the functions above.
        file_format: ``"png"`` or ``"svg"``.

    Raises:
        InputError: the format is another one.
    """
    if file_format not in _FORMATS:
        raise InputError(f"picture format {file_format!r} is unknown: use one of {', '.join(_FORMATS)}")
    buffer = io.BytesIO()
    with _matplotlib().rc_context(_STYLE):
        # Neither a date nor a version, so that the same figures give the same file.
        metadata = {"Date": None} if file_format == "svg" else {"Software": None}
        figure.savefig(buffer, format=file_format, dpi=144, metadata=metadata, facecolor="white")
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG or SVG, as the path's ending says, by rename.

    Raises:
        InputError: the path ends otherwise.
        OutputError: the file cannot be written.
    """
    suffix = Path(path).suffix.lower().lstrip(".")
    if suffix not in _FORMATS:
        raise InputError(f"{path} ends in no picture format: name it .png or .svg")
    write_bytes(path, figure_bytes(figure, suffix))


def _matplotlib() -> Any:
    return require("matplotlib", extra="train", purpose="drawing figures")


def _new_figure(size: tuple[float, float]) -> Figure:
    figures = require("matplotlib.figure", extra="train", purpose="drawing figures")
    layouts = require("matplotlib.layout_engine", extra="train", purpose="drawing figures")
    layout = layouts.ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.1, wspace=0.04, hspace=0.06)
    figure: Figure = figures.Figure(figsize=size, layout=layout)
    return figure


def _colours(lengths: Sequence[int]) -> dict[int, Any]:
    """Give short codes light and long codes dark colours of one ramp, the same in every panel."""
    ramp = _matplotlib().colormaps["viridis_r"]
    steps = max(len(lengths) - 1, 1)
    return {length: ramp(0.2 + 0.7 * place / steps) for place, length in enumerate(lengths)}


def _draw_map(axes: Axes, evaluation: Evaluation) -> None:
    lengths = list(evaluation.code_lengths)
    first = evaluation.metrics[lengths[0]]
    markers = "osD^vP"
    for place, cutoff in enumerate(first.mean_average_precision):
        values = [evaluation.metrics[length].mean_average_precision[cutoff] for length in lengths]
        name = f"mAP@{'all' if cutoff is None else format(cutoff, ',')}"
        axes.plot(lengths, values, marker=markers[place % len(markers)], color=_shade(place), label=name)
        if place == 0:
            for length, value in zip(lengths, values, strict=True):
                axes.annotate(
                    f"{value:.3f}", (length, value), (0, -15), textcoords="offset points", ha="center", color=_INK
                )
    axes.axhline(first.random_baseline, color=_MUTED, linestyle="--", linewidth=1, label="random ranking")
    axes.set(title="mAP by code length", xlabel="bits", xticks=lengths, ylim=(0, 1.08))
    axes.legend(loc="lower right")


def _shade(place: int) -> str:
    return (_ACCENT, "#2f6f9f", "#5b8c3a", "#7a4f9a")[place % 4]


def _draw_precision_at(axes: Axes, evaluation: Evaluation, colours: Mapping[int, Any]) -> None:
    axes.set(title="Precision of the first N", xlabel="N", ylim=(0, 1.08))
    for length, metrics in evaluation.metrics.items():
        if metrics.precision_at:
            marker = "o" if len(metrics.precision_at) == 1 else None
            counts, values = list(metrics.precision_at), list(metrics.precision_at.values())
            axes.plot(counts, values, color=colours[length], label=f"{length} bits", marker=marker)
    if next(iter(evaluation.metrics.values())).precision_at:
        axes.legend(loc="lower left", ncols=2)
    else:
        _say(axes, "the database is smaller than the smallest N")


def _draw_curve(axes: Axes, evaluation: Evaluation, colours: Mapping[int, Any]) -> None:
    axes.set(
        title="Precision and recall by Hamming radius", xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.08)
    )
    for length, metrics in evaluation.metrics.items():
        recall, precision = _curve_points(metrics)
        axes.plot(recall, precision, color=colours[length], label=f"{length} bits", marker=".", markersize=4)
    baseline = next(iter(evaluation.metrics.values())).random_baseline
    axes.axhline(baseline, color=_MUTED, linestyle="--", linewidth=1, label="random ranking")
    axes.legend(loc="lower left", ncols=2)


def _curve_points(metrics: RetrievalMetrics) -> tuple[list[float], list[float]]:
    pairs = zip(metrics.curve.recall, metrics.curve.precision, strict=True)
    found = [(recall, precision) for recall, precision in pairs if precision is not None]
    return [recall for recall, _ in found], [precision for _, precision in found]


def _draw_radius(axes: Axes, evaluation: Evaluation, colours: Mapping[int, Any]) -> None:
    lengths = list(evaluation.code_lengths)
    radius = evaluation.metrics[lengths[0]].hamming_radius
    precision = [evaluation.metrics[length].precision_within_radius for length in lengths]
    recall = [evaluation.metrics[length].recall_within_radius for length in lengths]
    places = list(range(len(lengths)))
    bars = axes.bar([p - 0.2 for p in places], precision, 0.36, color=[colours[n] for n in lengths])
    pale = axes.bar([p + 0.2 for p in places], recall, 0.36, color=[colours[n] for n in lengths], alpha=0.4)
    for group in (bars, pale):
        axes.bar_label(group, fmt="%.2f", padding=2, fontsize=8.5, color=_INK)
    axes.set(title=f"Within Hamming radius {radius}", xlabel="bits: precision left, recall right (pale)")
    axes.set(xticks=places, xticklabels=[str(length) for length in lengths], ylim=(0, 1.08))
    axes.grid(visible=False, axis="x")


def _draw_loss(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    axes.plot(_column(records, "epoch"), _column(records, "loss"), color=_ACCENT, marker=_marker(records))
    axes.set(title="Loss")


def _draw_terms(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    epochs = _column(records, "epoch")
    for place, name in enumerate(("likelihood", "consistency")):
        axes.plot(epochs, _column(records, name), color=_shade(place), marker=_marker(records), label=name)
    axes.set(title="Terms, unweighted")
    axes.legend()


def _draw_rate(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    epochs = _column(records, "epoch")
    rates = _column(records, "learning_rate")
    axes.step(epochs, rates, color=_shade(1), where="mid", marker=_marker(records))
    axes.set(title="Learning rate")
    # Steps by factors of ten are flat on a linear axis; a schedule that ends at 0 has no place on the other.
    if min(rates) > 0 and max(rates) >= 10 * min(rates):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.1 * max(rates) or 1)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    speeds = sorted(record["images_per_second"] for record in records if record.get("images_per_second"))
    if speeds:
        axes.set_title(f"{speeds[len(speeds) // 2]:,.0f} images/s (median)", loc="right", fontsize=8.5, color=_MUTED)


def _draw_map_by_epoch(axes: Axes, measured: Sequence[Mapping[str, Any]]) -> None:
    lengths = sorted({int(length) for record in measured for length in record["map"]})
    colours = _colours(lengths)
    for length in lengths:
        known = [(record["epoch"], record["map"][str(length)]) for record in measured if str(length) in record["map"]]
        axes.plot(*zip(*known, strict=True), color=colours[length], marker=_marker(known), label=f"{length} bits")
    axes.set(title="mAP")
    axes.legend(ncols=2)


def _column(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [record[name] for record in records]


def _marker(records: Sequence[object]) -> str | None:
    """Mark the points where there are few; a single one would be no line at all."""
    return "o" if len(records) <= 20 else None


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_MUTED)
