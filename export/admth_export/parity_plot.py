"""The picture of a parity report: how far the reference logits are from zero, and where the flips are among them.

Only Figure objects are used, never pyplot, so no global state is kept and no display is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from admth_export.parity import MARGIN_EDGES, LengthParity
from admth_export.parity_report import ParityReport
from admth_runtime.errors import require
from admth_training.plots import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["parity_figure", "save_parity_figure"]

_INK, _MUTED, _BARS, _FLIPS = "#26323c", "#8a97a3", "#9db4c6", "#c2571a"
_COLUMNS = 2
_MARKED_FLIPS = 500


def parity_figure(report: ParityReport) -> Figure:
    """Draw a histogram of the margins |z| of all bits for each code length, with the flips marked.

    Both axes are logarithmic. The dashed line is the noise threshold: flips to its left are noise, one to its right
    fails the gate.

    Returns:
        A Matplotlib figure, a panel a code length.

    Raises:
        MissingExtraError: Matplotlib is not installed.
    """
    figures = require("matplotlib.figure", extra="export", purpose="drawing the parity picture")
    lengths = report.runs[0].lengths
    rows = -(-len(lengths) // _COLUMNS)
    columns = min(_COLUMNS, len(lengths))
    figure: Figure = figures.Figure(figsize=(5.4 * columns, 0.9 + 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True)
    left, right = _limits(report)
    for axes, parity in zip(panels.flat, lengths.values(), strict=False):
        _draw_length(axes, parity, report.gate.noise_threshold)
        axes.set_xlim(left, right)
    for axes in panels.flat[len(lengths) :]:
        axes.set_axis_off()
    for place, axes in enumerate(panels.flat):
        if place + columns >= len(lengths):
            axes.set_xlabel("margin |z| of the PyTorch logit", color=_INK, fontsize=9)
            axes.tick_params(labelbottom=True)
    verdict = "passed" if report.passed else "FAILED"
    figure.suptitle(
        f"{report.model.file}: sign parity {verdict}\n"
        f"{report.images.images:,} images of {report.images.dataset}, {report.engine.name} {report.engine.version} "
        f"against PyTorch {report.torch_version}",
        x=0.01,
        ha="left",
        color=_INK if report.passed else _FLIPS,
        fontsize=11,
    )
    return figure


def save_parity_figure(report: ParityReport, path: str | Path) -> None:
    """Write the figure as PNG or SVG, as the path's ending says, by rename.

    Raises:
        InputError: the path ends otherwise.
        OutputError: the file cannot be written.
        MissingExtraError: Matplotlib is not installed.
    """
    save_figure(parity_figure(report), path)


def _draw_length(axes: Axes, parity: LengthParity, noise_threshold: float | None) -> None:
    style: dict[str, Any] = {"fontsize": 8.5, "color": _INK}
    axes.stairs(parity.margin_counts, MARGIN_EDGES, fill=True, color=_BARS, label="all bits")
    if parity.flips:
        axes.stairs(parity.flip_counts, MARGIN_EDGES, fill=True, color=_FLIPS, label="flipped bits")
        marked = [max(flip.margin, MARGIN_EDGES[0]) for flip in parity.flips[:_MARKED_FLIPS]]
        # Just above the axis, so that a single flip among thousands of bits is seen.
        axes.plot(marked, [0.03] * len(marked), "v", color=_FLIPS, markersize=5, transform=axes.get_xaxis_transform())
    if noise_threshold:
        axes.axvline(noise_threshold, color=_INK, linestyle="--", linewidth=1)
        axes.text(
            noise_threshold,
            0.97,
            f" noise threshold {noise_threshold:g}",
            transform=axes.get_xaxis_transform(),
            va="top",
            **style,
        )
    axes.set(xscale="log", yscale="log")
    axes.set_ylim(0.7, 3.0 * max(parity.margin_counts))
    flips = "no flip" if not parity.flips else f"{len(parity.flips):,} flip{'s' * (len(parity.flips) != 1)}"
    axes.set_title(
        f"{parity.code_length} bits: {flips} among {parity.bit_count:,}", loc="left", fontsize=10, color=_INK
    )
    axes.set_ylabel("bits", color=_INK, fontsize=9)
    axes.tick_params(labelsize=8.5, colors=_INK)
    axes.grid(color="#e4e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_MUTED)
    if parity.flips:
        axes.legend(loc="center left", fontsize=8.5, frameon=False)


def _limits(report: ParityReport) -> tuple[float, float]:
    """Return the x axis of all panels: from the smallest margin or half the threshold to the largest margin."""
    used = [
        place for parity in report.runs[0].lengths.values() for place, count in enumerate(parity.margin_counts) if count
    ]
    left, right = MARGIN_EDGES[min(used)], MARGIN_EDGES[max(used) + 1]
    if report.gate.noise_threshold:
        left = min(left, report.gate.noise_threshold / 2)
        right = max(right, report.gate.noise_threshold * 10)
    return left, right
