"""Figures: drawn from real results, the same bytes each time, and without pyplot."""

from __future__ import annotations

import io
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from admth_runtime.errors import InputError, MissingExtraError, OutputError
from admth_training.data.dataset import one_hot
from admth_training.evaluation import evaluate_lengths
from admth_training.plots import figure_bytes, retrieval_figure, save_figure, training_figure


def evaluation(lengths=(16, 32, 64), size=250):
    rng = np.random.default_rng(0)
    codes = {n: tuple(rng.integers(0, 256, (count, n // 8), dtype=np.uint8) for count in (10, size)) for n in lengths}
    labels = one_hot(np.arange(10) % 2, 2), one_hot(np.arange(size) % 2, 2)
    return evaluate_lengths(codes, *labels, map_cutoffs=(None, size // 2), dataset="toy")


def records(count, *, maps=False):
    fields = {"likelihood": 0.5, "consistency": 0.1, "images_per_second": 900.0}
    return [
        {"epoch": n, "loss": 5 / n, "learning_rate": 0.1 ** (n // 10 + 1), **fields}
        | ({"map": {"16": n / 100, "64": n / 90}} if maps and n % 5 == 0 else {})
        for n in range(1, count + 1)
    ]


def test_retrieval_figure_shows_the_figures():
    results = evaluation()
    figure = retrieval_figure(results)
    by_title = {axes.get_title(loc="left"): axes for axes in figure.axes}
    lines = {line.get_label(): line for line in by_title["mAP by code length"].lines}
    assert lines["mAP@all"].get_xdata().tolist() == [16, 32, 64]
    np.testing.assert_array_equal(
        lines["mAP@all"].get_ydata(), [m.mean_average_precision[None] for m in results.metrics.values()]
    )
    precision = {line.get_label(): line for line in by_title["Precision of the first N"].lines}
    assert precision["64 bits"].get_ydata().tolist() == list(results.metrics[64].precision_at.values())
    curve = {line.get_label(): line for line in by_title["Precision and recall by Hamming radius"].lines}
    assert curve["16 bits"].get_xdata()[-1] == 1.0
    bars = [bar.get_height() for bar in by_title["Within Hamming radius 2"].patches]
    assert bars[:3] == [m.precision_within_radius for m in results.metrics.values()]
    assert "toy: 10 queries against 250 images" in figure.get_suptitle()


@pytest.mark.parametrize(("lengths", "size"), [((8,), 250), ((16, 64), 40)])
def test_one_length_and_small_databases_are_drawn(lengths, size):
    assert len(figure_bytes(retrieval_figure(evaluation(lengths, size)), "png")) > 10_000


@pytest.mark.parametrize("count", [1, 3, 30])
def test_training_figure_panels(count):
    assert len(training_figure(records(count)).axes) == 3
    figure = training_figure(records(count, maps=True))
    assert len(figure.axes) == (4 if count >= 5 else 3)
    assert len(figure.axes[0].lines[0].get_xdata()) == count
    assert len(figure_bytes(figure, "png")) > 10_000


def test_training_records_are_checked():
    with pytest.raises(InputError, match="no training records"):
        training_figure([])
    with pytest.raises(InputError, match="lacks learning_rate, loss"):
        training_figure([{"epoch": 1, "likelihood": 1, "consistency": 1}])


def test_files_are_pictures_and_repeatable(tmp_path):
    for suffix in ("png", "svg"):
        one, two = (figure_bytes(training_figure(records(3)), suffix) for _ in range(2))
        assert one == two
        save_figure(training_figure(records(3)), tmp_path / f"curve.{suffix}")
        assert (tmp_path / f"curve.{suffix}").read_bytes() == one
    Image.open(io.BytesIO((tmp_path / "curve.png").read_bytes())).verify()
    assert ET.fromstring((tmp_path / "curve.svg").read_bytes()).tag.endswith("svg")


def test_bad_targets(tmp_path):
    figure = training_figure(records(1))
    with pytest.raises(InputError, match=r"name it \.png or \.svg"):
        save_figure(figure, tmp_path / "curve.gif")
    with pytest.raises(InputError, match="'gif' is unknown"):
        figure_bytes(figure, "gif")
    with pytest.raises(OutputError, match="its folder does not exist"):
        save_figure(figure, tmp_path / "nowhere" / "curve.png")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_is_answered_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'admth\[train\]'"):
        training_figure(records(1))


def test_no_global_state_is_left():
    code = (
        # Reading the key "backend" would itself choose one and import pyplot.
        "import sys, matplotlib\n"
        "def settings(): return {k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != 'backend'}\n"
        "before = settings()\n"
        "from admth_training.plots import figure_bytes, training_figure\n"
        "record = dict(epoch=1, loss=1.0, likelihood=1.0, consistency=0.0, learning_rate=0.1, images_per_second=9.0)\n"
        "figure_bytes(training_figure([record]), 'png')\n"
        "assert settings() == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
