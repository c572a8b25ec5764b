"""Pictures of a calibration: the Pareto front of a search, and the sensitivity of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from admth_calibration.gates import Gates
from admth_calibration.mixed import FrontPoint, pareto_front
from admth_calibration.sensitivity import LayerSensitivity
from admth_runtime.errors import require
from admth_runtime.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_front", "draw_sensitivity"]

_COLOURS = {"all INT8": "#b3402a", "ranked": "#2f6fab", "first layers": "#8a8f98", "chosen": "#2b8a3e"}
_LABELS = {
    "all INT8": "all layers in INT8",
    "ranked": "layers that cost most bits kept in float",
    "first layers": "first layers kept in float",
    "chosen": "fitted anew: the candidates for the answer",
}
_KINDS = {"depthwise": "#b3402a", "conv": "#2f6fab", "dense": "#2b8a3e"}
_MOST_LAYERS = 40


def draw_front(path: Path, points: Sequence[FrontPoint], chosen: FrontPoint | None, gates: Gates, title: str) -> None:
    """Draw parity over latency (or size), with size as the area of a point, the front, the gates and the choice.

    Args:
        path: the PNG file.
        points: everything measured.
        chosen: what was taken, or None.
        gates: drawn as lines.
        title: a line on top.
    """
    figure, axes = _figure(9.0, 5.6)
    timed = points[0].latency_ratio is not None
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("time of one image, FP32 = 1  (left is faster)" if timed else "size in MB  (left is smaller)")
    axes.set_ylabel("bits equal to FP32, worst code length, %")
    smallest = min(point.bytes for point in points)
    for family, colour in _COLOURS.items():
        some = [point for point in points if point.family == family]
        if some:
            axes.scatter(
                [_across(point) for point in some],
                [100 * point.score.least for point in some],
                s=[40 * point.bytes / smallest for point in some],
                color=colour,
                alpha=0.8,
                label=_LABELS[family],
                zorder=3,
            )
    for point in points:
        axes.annotate(
            str(len(point.kept)),
            (_across(point), 100 * point.score.least),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=7,
            color="#555555",
        )
    front = pareto_front(points)
    axes.step(
        [_across(point) for point in front],
        [100 * point.score.least for point in front],
        where="post",
        color="#333333",
        linewidth=1,
        label="Pareto front: no other is better in both",
        zorder=2,
    )
    if gates.min_bit_parity is not None:
        axes.axhline(100 * gates.min_bit_parity, color="#2b8a3e", linestyle="--", linewidth=1)
        axes.annotate(
            f" asked for: {100 * gates.min_bit_parity:g} %",
            (0, 100 * gates.min_bit_parity),
            xycoords=("axes fraction", "data"),
            va="bottom",
            fontsize=8,
            color="#2b8a3e",
        )
    if timed and gates.max_latency_ratio is not None:
        axes.axvline(gates.max_latency_ratio, color="#2b8a3e", linestyle="--", linewidth=1)
    if chosen is not None:
        axes.scatter(
            [_across(chosen)], [100 * chosen.score.least], s=320, facecolors="none", edgecolors="black", zorder=4
        )
        axes.annotate(
            f"written: {len(chosen.kept)} layers in float, {100 * chosen.score.least:.2f} %",
            (_across(chosen), 100 * chosen.score.least),
            xytext=(12, -16),
            textcoords="offset points",
            fontsize=9,
        )
    axes.legend(loc="lower right", fontsize=8, framealpha=0.9)
    figure.text(
        0.01,
        0.01,
        "Numbers beside points: layers kept in float. Area: size of the model. Each point is a model that was built "
        "and measured.",
        fontsize=7.5,
        color="#555555",
    )
    _save(figure, path)


def draw_sensitivity(path: Path, found: Sequence[LayerSensitivity], baseline: float, title: str) -> None:
    """Draw, for each of the most harmful layers, the bits that flip with it alone in INT8, and without it.

    Args:
        path: the PNG file.
        found: every layer.
        baseline: share of bits that flip with all layers in INT8.
        title: a line on top.
    """
    from matplotlib.patches import Patch

    worst = sorted(found, key=lambda item: item.error_alone, reverse=True)[:_MOST_LAYERS]
    shown = [item for item in found if item in worst]
    figure, axes = _figure(9.0, 1.6 + 0.19 * len(shown))
    rows = range(len(shown))
    axes.barh(
        rows,
        [100 * item.flips_alone for item in shown],
        color=[_KINDS[item.kind] for item in shown],
        height=0.7,
        zorder=2,
    )
    without = [(100 * item.flips_without, row) for row, item in enumerate(shown) if item.flips_without is not None]
    if without:
        shares, places = zip(*without, strict=True)
        axes.scatter(shares, places, marker="|", s=70, color="black", zorder=3)
    axes.axvline(100 * baseline, color="#8a8f98", linestyle="--", linewidth=1)
    axes.annotate(
        " all in INT8",
        (100 * baseline, 1),
        xycoords=("data", "axes fraction"),
        fontsize=8,
        color="#555555",
        va="bottom",
    )
    axes.set_yticks(list(rows), [item.layer for item in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("flipped bits, %; bar: the layer alone in INT8; stroke: every layer but this one in INT8")
    axes.set_title(title, loc="left", fontsize=11, pad=16)
    axes.legend(
        handles=[Patch(color=colour, label=kind) for kind, colour in _KINDS.items()], loc="lower right", fontsize=8
    )
    _save(figure, path)


def _across(point: FrontPoint) -> float:
    return point.bytes / 1e6 if point.latency_ratio is None else point.latency_ratio


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    require("matplotlib", extra="calibrate", purpose="drawing the pictures of a calibration")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    axes.grid(color="#e3e3e3", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))  # type: ignore[union-attr,call-arg]
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")
