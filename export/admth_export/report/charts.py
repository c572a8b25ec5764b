"""The report's charts: Matplotlib figures as inline SVG whose colours and fonts are those of the page.

A figure is drawn in colours that stand for the page's own; in the SVG each becomes a CSS variable, so one file reads
well on a light and on a dark page, on a screen and on paper.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from admth_runtime.errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Chart",
    "learning_rate_chart",
    "loss_chart",
    "map_by_epoch_chart",
    "map_chart",
    "margin_chart",
    "precision_at_chart",
    "precision_recall_chart",
]

Chart = str
"""An ``<svg>`` element, safe to put into a page."""

_INK, _MUTED, _GRID, _ACCENT, _BAD = "#010101", "#020202", "#030303", "#040404", "#050505"
_RAMP = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04", "#0a0a05", "#0a0a06")
_VARIABLES = {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--line",
    _ACCENT: "--accent",
    _BAD: "--bad",
    **{colour: f"--series-{place}" for place, colour in enumerate(_RAMP, start=1)},
}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.5, 1.5)))
_STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.color": _MUTED,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
}


def loss_chart(records: Sequence[Mapping[str, Any]]) -> Chart:
    """Draw the weighted loss and its two unweighted terms by epoch, on a logarithmic scale."""

    def draw(axes: Axes) -> None:
        epochs = [record["epoch"] for record in records]
        for place, name in enumerate(("loss", "likelihood", "consistency")):
            values = [record[name] for record in records]
            axes.plot(
                epochs, values, color=_series(place, 3), linestyle=_DASHES[place], label=name, marker=_mark(epochs)
            )
        if all(record[name] > 0 for record in records for name in ("loss", "likelihood", "consistency")):
            axes.set_yscale("log")
        axes.set(xlabel="epoch")
        axes.margins(y=0.16)  # room for the legend above the curves
        _whole_numbers(axes)
        axes.legend(loc="upper right", ncols=3)

    first, last = records[0]["loss"], records[-1]["loss"]
    return _svg("loss", draw, f"Training loss by epoch: from {first:.4g} to {last:.4g} in {len(records)} epochs.")


def learning_rate_chart(records: Sequence[Mapping[str, Any]]) -> Chart:
    """Draw the learning rate by epoch."""

    def draw(axes: Axes) -> None:
        epochs, rates = zip(*((record["epoch"], record["learning_rate"]) for record in records), strict=True)
        axes.step(epochs, rates, where="mid", color=_ACCENT, marker=_mark(epochs))
        axes.set(xlabel="epoch", ylim=(0, max(rates) * 1.1 or 1))
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        _whole_numbers(axes)

    return _svg("rate", draw, "Learning rate by epoch.")


def map_by_epoch_chart(records: Sequence[Mapping[str, Any]]) -> Chart:
    """Draw mAP by epoch for every length, of the records that have it."""
    measured = [record for record in records if record.get("map")]
    lengths = sorted({int(length) for record in measured for length in record["map"]})

    def draw(axes: Axes) -> None:
        for place, length in enumerate(lengths):
            points = [(r["epoch"], r["map"][str(length)]) for r in measured if str(length) in r["map"]]
            axes.plot(
                *zip(*points, strict=True), **_line(place, len(lengths)), label=f"{length} bits", marker=_mark(points)
            )
        axes.set(xlabel="epoch", ylabel="mAP")
        _whole_numbers(axes)
        axes.legend(loc="lower right", ncols=2)

    return _svg("map-by-epoch", draw, "mAP by epoch for every code length.")


def map_chart(values: Mapping[int, float], baseline: float) -> Chart:
    """Draw a bar of mAP a code length, and the precision of a random ranking."""

    def draw(axes: Axes) -> None:
        places = range(len(values))
        colours = [_series(place, len(values)) for place in places]
        bars = axes.bar(places, list(values.values()), 0.6, color=colours)
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=10)
        axes.axhline(baseline, color=_MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.annotate("random\nranking", (len(values) - 0.45, baseline), (0, 3), textcoords="offset points", fontsize=9)
        axes.set(xticks=list(places), xticklabels=[f"{length} bits" for length in values], ylim=(0, 1.08), ylabel="mAP")
        axes.set_xlim(-0.6, len(values) + 0.15)
        axes.grid(visible=False, axis="x")

    listed = ", ".join(f"{value:.3f} at {length} bits" for length, value in values.items())
    return _svg("map", draw, f"Mean average precision: {listed}; a random ranking has {baseline:.3f}.")


def precision_at_chart(values: Mapping[int, Mapping[int, float]]) -> Chart:
    """Draw the precision of the first N neighbours, a line a code length."""

    def draw(axes: Axes) -> None:
        for place, (length, points) in enumerate(values.items()):
            axes.plot(*zip(*sorted(points.items()), strict=True), **_line(place, len(values)), label=f"{length} bits",
                      marker=_mark(points))  # fmt: skip
        low = min(value for points in values.values() for value in points.values())
        axes.set(xlabel="N nearest images", ylabel="precision", ylim=(max(0.0, low - 0.1), 1.0))
        axes.legend(loc="lower left", ncols=2)

    return _svg("precision-at", draw, "Precision of the first N neighbours by N, for every code length.")


def precision_recall_chart(
    values: Mapping[int, tuple[Sequence[float], Sequence[float | None]]], baseline: float
) -> Chart:
    """Draw precision against recall as the Hamming radius grows, a line a code length.

    Args:
        values: (recall, precision) by radius, for every length; a precision is None where nothing was found.
        baseline: precision of a random ranking.
    """

    def draw(axes: Axes) -> None:
        for place, (length, (recall, precision)) in enumerate(values.items()):
            points = [(r, p) for r, p in zip(recall, precision, strict=True) if p is not None]
            axes.plot(*zip(*points, strict=True), **_line(place, len(values)), label=f"{length} bits")
        axes.axhline(baseline, color=_MUTED, linestyle=(0, (4, 3)), linewidth=1.2)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.03))
        axes.legend(loc="center left")

    return _svg(
        "precision-recall", draw, "Precision against recall as the Hamming radius grows, for every code length."
    )


def margin_chart(
    edges: Sequence[float], counts: Mapping[int, Sequence[int]], flips: Sequence[float], threshold: float | None
) -> Chart:
    """Draw how many logits have which margin |z|, with the flipped ones and the noise threshold marked.

    Args:
        edges: n + 1 edges of the bins, increasing and positive.
        counts: n counts by code length.
        flips: margins of the bits that differ.
        threshold: up to it a flip is numerical noise; None where no threshold is set.
    """

    def draw(axes: Axes) -> None:
        for place, (length, values) in enumerate(counts.items()):
            axes.stairs(values, edges, color=_series(place, len(counts)), linestyle=_DASHES[place % 4], linewidth=1.6,
                        label=f"{length} bits")  # fmt: skip
        if threshold is not None:
            axes.axvline(threshold, color=_BAD, linestyle=(0, (4, 3)), linewidth=1.3, label=f"threshold {threshold:g}")
        axes.set(xscale="log", yscale="log", xlabel="margin |z| of the PyTorch logit", ylabel="bits", ylim=(0.7, None))
        axes.set_xlim(*_reach(edges, counts, [*flips, *([] if threshold is None else [threshold])]))
        if flips:
            axes.plot(flips, [0.85] * len(flips), "x", color=_BAD, markersize=7, markeredgewidth=1.8, clip_on=False,
                      label=f"flipped bits ({len(flips)})")  # fmt: skip
        axes.legend(loc="upper left")

    flipped = f"{len(flips)} flipped bits" if flips else "no flipped bit"
    return _svg("margins", draw, f"Histogram of logit margins for every code length, with {flipped}.")


def _whole_numbers(axes: Axes) -> None:
    ticker = require("matplotlib.ticker", extra="export", purpose="drawing the report's charts")
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))


def _reach(edges: Sequence[float], counts: Mapping[int, Sequence[int]], others: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the axis: the bins in use and the other values, with a little room."""
    used = [place for values in counts.values() for place, value in enumerate(values) if value]
    return min(edges[min(used)], *others) / 1.5 if others else edges[min(used)], edges[max(used) + 1] * 1.5


def _series(place: int, count: int) -> str:
    """Spread a few series over the whole ramp, so that neighbours differ."""
    return _RAMP[round(place * (len(_RAMP) - 1) / max(count - 1, 1))]


def _line(place: int, count: int) -> dict[str, Any]:
    """Tell lines apart by colour and by dashes, for readers who do not see the colours."""
    return {"color": _series(place, count), "linestyle": _DASHES[place % len(_DASHES)]}


def _mark(points: Any) -> str | None:
    """Mark single points, which would be no line at all."""
    return "o" if len(points) == 1 else None


def _svg(name: str, draw: Callable[[Axes], None], description: str) -> Chart:
    matplotlib = require("matplotlib", extra="export", purpose="drawing the report's charts")
    figures = require("matplotlib.figure", extra="export", purpose="drawing the report's charts")
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = figures.Figure(figsize=(5.0, 3.1), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _themed(buffer.getvalue(), name, description)


def _themed(text: str, name: str, description: str) -> Chart:
    """Turn Matplotlib's file into an element: the page's colours and font, ids of its own, a description."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r"<g id=\"[^\"]*\">", "<g>", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"(\sid=\"|url\(#|href=\"#)", rf"\g<1>chart-{name}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r"font: (\S+) [^;\"]*", r"font-size: \1; font-family: inherit", text)
    text = re.sub(r"\s*\n\s*", " ", text)
    attributes = re.search(r"<svg[^>]*?viewBox=\"([^\"]*)\"[^>]*>", text)
    assert attributes is not None
    opening = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{attributes[1]}" class="chart" role="img" '
        f'aria-label="{html.escape(description)}">'
    )
    return opening + text[attributes.end() :].strip()
