"""Draw the picture of README.md from the demo's run: queries with their nearest images, and mAP at every length.

make demo
python examples/demo_picture.py runs/demo docs/images/demo.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from admth_runtime import HashIndex, load_image, read_codes
from admth_runtime.errors import AdmthError
from admth_runtime.files import atomic_path

INK, MUTED, GOOD, BAD = "#1b2733", "#5c6b78", "#1a7f4b", "#c2321f"
SERIES = ("#7cc3d4", "#2e86ab", "#226796", "#182f5e")
NEAREST = 10
QUERIES = 4


def draw(run: Path) -> Figure:
    """Return the figure of a run that has queries.parquet, database.parquet and evaluation.json."""
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    queries, index = read_codes(run / "queries.parquet"), HashIndex.load(run / "database.parquet")
    lengths = queries.code_lengths
    classes = [Path(uri).parent.name for uri in queries.uris]
    # The first query of every second class, so that the choice is not ours.
    chosen = [classes.index(name) for name in sorted(set(classes))[::2]][:QUERIES]
    figure = Figure(figsize=(11, 4.5), facecolor="white")
    rows = figure.add_gridspec(len(chosen), 1, hspace=0.12, left=0.03, right=0.745, top=0.92, bottom=0.02)
    for place, query in enumerate(chosen):
        # A query fills two lines, one a length: its own picture, and what was found.
        grid = rows[place].subgridspec(2, NEAREST + 2, wspace=0.06, hspace=0.06)
        axes = figure.add_subplot(grid[:, 0:2])
        show(axes, Path(queries.uris[query]))
        axes.set_ylabel(classes[query], fontsize=9, color=INK)
        for line, length in enumerate((lengths[0], lengths[-1])):
            hits = index.search(np.ascontiguousarray(queries.codes[length][query : query + 1]), NEAREST)
            for column, uri in enumerate(index.uris_of(hits.ids[0])):
                axes = figure.add_subplot(grid[line, 2 + column])
                show(axes, Path(uri))
                mark(axes, right=Path(uri).parent.name == classes[query])
                if column == 0:
                    axes.set_ylabel(f"{length} bits", fontsize=7, color=MUTED)
    figure.text(0.03, 0.95, "query", fontsize=10, color=INK, weight="bold")
    figure.text(0.158, 0.95, f"its {NEAREST} nearest of {len(index):,} images", fontsize=10, color=INK, weight="bold")
    draw_bars(figure.add_axes((0.79, 0.11, 0.2, 0.76)), evaluation)
    return figure


def show(axes: Axes, path: Path) -> None:
    """Show an image without ticks."""
    axes.imshow(np.asarray(load_image(path)))
    axes.set(xticks=[], yticks=[])


def mark(axes: Axes, *, right: bool) -> None:
    """Frame an image green with a tick, or red with a cross."""
    colour = GOOD if right else BAD
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=1.6, linestyle="-" if right else (0, (2, 1.2)))
    axes.add_patch(Rectangle((0.68, 0.02), 0.3, 0.3, transform=axes.transAxes, color="white"))
    axes.text(0.83, 0.16, "✓" if right else "✗", transform=axes.transAxes, ha="center", va="center", fontsize=8,
              color=colour, weight="bold", family="DejaVu Sans")  # fmt: skip


def draw_bars(axes: Axes, evaluation: dict) -> None:
    """Draw mAP@all, a bar a code length."""
    values = {length: metrics["map"]["all"] for length, metrics in evaluation["metrics"].items()}
    bars = axes.bar([f"{length}\nbits" for length in values], list(values.values()), 0.65, color=SERIES)
    axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=9, color=INK)
    axes.axhline(evaluation["protocol"]["random_baseline"], color=MUTED, linestyle="--", linewidth=1)
    axes.set(ylim=(0, 1.05))
    axes.set_title("mAP (dashed: random)", fontsize=10, color=INK, weight="bold", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)


def main() -> int:
    """Read the arguments, draw, and say what was written."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="the demo's folder, runs/demo")
    parser.add_argument("out", type=Path, help="the PNG file to write")
    arguments = parser.parse_args()
    try:
        figure = draw(arguments.run)
        with atomic_path(arguments.out) as temporary:
            figure.savefig(temporary, dpi=100, metadata={"Software": None})
    except (AdmthError, OSError) as error:
        print(f"error: {error}: run  make demo  first", file=sys.stderr)
        return 1
    print(f"wrote {arguments.out}, {arguments.out.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
