"""The picture of a measurement: one SVG that needs nothing beside it and follows a viewer's light or dark colours."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from xml.sax.saxutils import escape

import numpy as np

from admth_runtime.bench import LEAST_QUERIES, STAGES, SingleStream
from admth_runtime.bench_offline import Offline

__all__ = ["bench_svg"]

_WIDTH = 960
_BINS = 48
_LINE = 120  # letters
_PARTS = STAGES[:-1]

_STYLE = """
svg { font: 13px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  --paper: #fdfdfc; --ink: #1c2430; --soft: #68717f; --line: #d9dde3; --bar: #4c78c8;
  --decode: #e39a3b; --preprocess: #8ab17d; --inference: #4c78c8; --mark: #c2412d; }
@media (prefers-color-scheme: dark) { svg { --paper: #14181f; --ink: #e8ebf0; --soft: #98a2b0; --line: #333b47;
  --bar: #6f9ae6; --decode: #e8ab5b; --preprocess: #9dc491; --inference: #6f9ae6; --mark: #f08872; } }
.paper { fill: var(--paper); } text { fill: var(--ink); } .soft { fill: var(--soft); }
.title { font-size: 20px; font-weight: 600; } .head { font-size: 15px; font-weight: 600; }
.number { font-variant-numeric: tabular-nums; } .end { text-anchor: end; } .middle { text-anchor: middle; }
.axis { stroke: var(--line); } .mark { stroke: var(--mark); stroke-dasharray: 4 3; } .marked { fill: var(--mark); }
.bar { fill: var(--bar); } .decode { fill: var(--decode); } .preprocess { fill: var(--preprocess); }
.inference { fill: var(--inference); } .whole { fill: var(--ink); }
"""


def bench_svg(stream: SingleStream, offline: Offline | None, title: str, facts: Sequence[str]) -> str:
    """Draw a measurement: a histogram of latencies, what a query's time is made of, and throughput.

    Args:
        stream: the single stream.
        offline: the offline throughput, or None where it was not measured.
        title: the first line, such as the model's name.
        facts: further lines: the machine, the engine, versions.

    Returns:
        The SVG document.
    """
    facts = [line for fact in facts for line in textwrap.wrap(fact, _LINE)]
    top = 58 + 20 * len(facts)
    parts = [
        _text(40, 40, title, "title"),
        *(_text(40, 64 + 20 * row, line, "soft") for row, line in enumerate(facts)),
        *_histogram(stream, 40, top + 26, 880, 190),
        *_composition(stream, 40, top + 296, 420 if offline else 880),
        *(_throughput(offline, 500, top + 296, 420) if offline else ()),
    ]
    height = top + 296 + 170
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n'
        f'<rect class="paper" width="{_WIDTH}" height="{height}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _histogram(stream: SingleStream, x: float, y: float, width: float, height: float) -> Iterator[str]:
    times = stream.seconds[STAGES[-1]] * 1e3
    percentiles = {share: float(np.percentile(times, share)) for share in (50, 90, 99)}
    shortfall = "" if stream.conforms else f", fewer than the {LEAST_QUERIES:,} that MLPerf asks for"
    yield _text(x, y, "Single stream: latency from file to codes", "head")
    yield _text(x + width, y, f"{stream.queries:,} queries of one image{shortfall}", "soft end")
    base, low, high = y + height, float(times.min()), max(percentiles[99] * 1.08, float(times.min()) * 1.01)
    counts, edges = np.histogram(times[times <= high], _BINS, (low, high))
    scale = width / (high - low)

    def place(value: float) -> float:
        return x + (value - low) * scale

    unit = (height - 50) / max(int(counts.max()), 1)
    for count, left in zip(counts, edges, strict=False):
        yield _bar("bar", place(left), base - unit * int(count), width / _BINS - 1.5, unit * int(count))
    yield f'<line class="axis" x1="{x}" x2="{x + width}" y1="{base}" y2="{base}"/>'
    for value in _ticks(low, high):
        yield _text(place(value), base + 18, f"{value:g}", "soft number middle")
    yield _text(x + width, base + 36, "milliseconds", "soft end")
    if slower := int((times > high).sum()):
        yield _text(x, base + 36, f"{slower:,} beyond, up to {times.max():.2f} ms", "soft")
    yield from _marks(percentiles, place, y + 22, base, x + width)


def _marks(
    percentiles: dict[int, float], place: Callable[[float], float], top: float, base: float, right: float
) -> Iterator[str]:
    """Draw the percentiles; labels of neighbours that would touch stand on lines of their own."""
    end, row = -1.0, 0
    for share, value in percentiles.items():
        at, label = place(value), f"p{share} {value:.2f} ms"
        row = row + 1 if at < end else 0
        width = 7.2 * len(label)
        end = at + width
        yield f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{top - 6 + 15 * row}" y2="{base}"/>'
        flipped = at + width > right
        yield _text(at - 5 if flipped else at + 5, top + 5 + 15 * row, label, f"marked number{' end' * flipped}")


def _composition(stream: SingleStream, x: float, y: float, width: float) -> Iterator[str]:
    times = stream.times
    yield _text(x, y, "What a query's time is made of", "head")
    whole = sum(times[stage].p50 for stage in _PARTS)
    at = x
    for stage in _PARTS:
        share = width * times[stage].p50 / whole
        yield _bar(stage, at, y + 16, max(share - 1.5, 0.5), 30)
        at += share
    columns = [x + width - 170, x + width - 85, x + width]
    for column, head in zip(columns, ("p50 ms", "p90 ms", "p99 ms"), strict=True):
        yield _text(column, y + 70, head, "soft end")
    for row, stage in enumerate(STAGES):
        line = y + 91 + 20 * row
        if stage in _PARTS:
            yield _bar(stage, x, line - 10, 11, 11)
        yield _text(x + 18, line, stage)
        stage_times = times[stage]
        for column, value in zip(columns, (stage_times.p50, stage_times.p90, stage_times.p99), strict=True):
            yield _text(column, line, f"{value:.2f}", "number end")


def _throughput(offline: Offline, x: float, y: float, width: float) -> Iterator[str]:
    yield _text(x, y, "Offline: images a second", "head")
    yield _text(x + width, y, f"{offline.samples:,} images in batches of {offline.batch}", "soft end")
    fastest = max(offline.rates.values())
    for row, stage in enumerate(STAGES):
        top = y + 24 + 33 * row
        length = max((width - 170) * offline.rates[stage] / fastest, 1.0)
        kind = stage if stage in _PARTS else "whole"
        yield _text(x, top + 14, stage)
        yield _bar(kind, x + 90, top, length, 20)
        yield _text(x + 98 + length, top + 14, _rate(offline.rates[stage]), "number")


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two limits, about eight of them."""
    rough = (high - low) / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    # Rounded, since 3 * 0.1 is not 0.3.
    return [round(number * step, 10) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _bar(style: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
