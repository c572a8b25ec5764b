"""The report's parts on their own: charts, texts, the commands to reproduce a run, and a failed gate."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from _rooms import FinishedRun, command

from admth_export.report import charts
from admth_export.report.render import _bytes, _percent, _short
from admth_export.report.reproduce import fit_command
from admth_runtime.preprocessing import PreprocessingSpec
from admth_training.checkpoint import RunConfig
from admth_training.config import DataConfig, FitConfig, NetworkConfig, ObjectiveConfig

RECORDS = [
    {"epoch": epoch, "loss": 9.0 / epoch, "likelihood": 0.5 / epoch, "consistency": 0.1 / epoch,
     "learning_rate": 1e-3, "images_per_second": 900.0, "map": {"16": 0.1 * epoch, "64": 0.2 * epoch}}
    for epoch in (1, 2, 3)
]  # fmt: skip
CURVE = ([0.2, 0.6, 1.0], [None, 0.8, 0.1])
DRAWN = {
    "loss": lambda: charts.loss_chart(RECORDS),
    "one epoch": lambda: charts.loss_chart(RECORDS[:1]),
    "zero loss": lambda: charts.loss_chart([{**RECORDS[0], "consistency": 0.0}]),
    "rate": lambda: charts.learning_rate_chart(RECORDS),
    "map by epoch": lambda: charts.map_by_epoch_chart(RECORDS),
    "map": lambda: charts.map_chart({16: 0.5, 64: 0.875}, 0.1),
    "one length": lambda: charts.map_chart({64: 0.875}, 0.1),
    "precision at": lambda: charts.precision_at_chart({16: {100: 0.5}, 64: {100: 0.9, 200: 0.8}}),
    "precision recall": lambda: charts.precision_recall_chart({16: CURVE, 64: CURVE}, 0.1),
    "margins": lambda: charts.margin_chart([1e-3, 1e-2, 1.0], {16: [1, 4], 64: [0, 9]}, [2e-3], 1e-3),
    "no threshold": lambda: charts.margin_chart([1e-3, 1e-2, 1.0], {16: [1, 4]}, [], None),
}


@pytest.mark.parametrize("name", DRAWN)
def test_a_chart_takes_colours_and_font_from_the_page(name: str) -> None:
    text = DRAWN[name]()
    root = ElementTree.fromstring(text)
    assert root.tag == "svg" or root.tag.endswith("}svg")
    assert root.attrib["role"] == "img"
    assert len(root.attrib["aria-label"]) > 10
    assert not re.search(r"#[0-9a-fA-F]{3,6}\b(?![-\w])", re.sub(r'"#chart-[^"]*"|url\(#[^)]*\)', "", text))
    assert "var(--ink)" in text
    assert "DejaVu" not in text
    assert "<style" not in text and "<metadata" not in text
    styles = Path(charts.__file__).with_name("templates") / "report.css"
    defined = set(re.findall(r"(--[\w-]+):", styles.read_text(encoding="utf-8")))
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= defined


def test_equal_figures_give_equal_charts_and_their_ids_do_not_meet() -> None:
    assert DRAWN["map"]() == DRAWN["map"]()
    first, second = (set(re.findall(r'\sid="([^"]+)"', DRAWN[name]())) for name in ("map", "loss"))
    assert first and second
    assert not first & second


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100 %"), (0.9999999, "99.9999 %"), (1 - 1 / 160_000, "99.9994 %"), (0.5, "50 %"), (0.0, "0 %")],
)
def test_a_percentage_hides_no_flaw(share: float, text: str) -> None:
    assert _percent(share).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(("size", "text"), [(999, "999 B"), (25_078_139, "25.1 MB"), (3_000_000_000_000, "3000.0 GB")])
def test_a_size_has_a_unit(size: int, text: str) -> None:
    assert _bytes(size).replace("\N{NO-BREAK SPACE}", " ") == text


def test_a_path_is_shown_without_its_machine() -> None:
    assert _short("a/b/c/class/1.png") == "class/1.png"
    assert _short("1.png") == "1.png"


def run_config(tmp_path: Path, **parts: Any) -> RunConfig:
    network = parts.get("network", NetworkConfig())
    return RunConfig(
        network=network,
        objective=parts.get("objective", ObjectiveConfig()),
        fit=parts.get("fit", FitConfig()),
        preprocessing=parts.get("preprocessing", PreprocessingSpec(height=network.size, width=network.size)),
        data=parts.get("data", DataConfig(spec=f"folder:{tmp_path / 'pictures'}")),
        pretrained=parts.get("pretrained", network.backbone == "efficientnet_lite0"),
    )


CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "the paper": {
        "network": NetworkConfig(backbone="cnnf", split="fc6", hidden=1024, code_lengths=(8, 48)),
        "fit": FitConfig(optimizer="sgd", epochs=90, batch_size=64, decay_factor=0.01, clip_norm=FitConfig().clip_norm),
        "objective": ObjectiveConfig(alpha=10.0, beta=0.25, inner_product_scale=1.0),
    },
    "everything else": {
        "network": NetworkConfig(input_size=97, attention=False, dropout=0.1, map_direction="long-to-short", hidden=64),
        "fit": FitConfig(
            freeze_trunk=True, learning_rate=3e-4, weight_decay=0.0, decay_every=7, precision="bf16", flip=False,
            seed=9, trunk_learning_rate_factor=0.5,
        ),
        "preprocessing": PreprocessingSpec(height=97, width=97, fit="stretch", interpolation="bicubic"),
        "pretrained": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reproducing_command_means_the_same_configuration(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read the command with the real command line, up to where training would start, and compare."""
    import admth_training.fitting
    from admth_training.cli import app

    class StopError(Exception):
        pass

    made: list[RunConfig] = []

    def catch(config: RunConfig, *_: Any, **__: Any) -> None:
        made.append(config)
        raise StopError

    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    monkeypatch.setattr(admth_training.fitting, "fit", catch)
    config = run_config(tmp_path, **CONFIGS[name])
    config = replace(config, data=replace(config.data, seed=config.fit.seed))
    words = fit_command(config, "runs/again")
    assert words[:4] == ["admth-train", "fit", "--data", "folder:pictures"]
    with pytest.raises(StopError):
        typer.main.get_command(app)(words[1:], standalone_mode=False)
    assert made == [config]


def test_a_failed_gate_is_shown_as_one(finished_run: FinishedRun, tmp_path: Path) -> None:
    run = tmp_path / "failed"
    shutil.copytree(finished_run.folder, run)
    path = run / "model.parity.json"
    parity = json.loads(path.read_text())
    parity["passed"] = False
    parity["failures"] = ["bit 3 of image <b>7</b> flipped"]
    first = parity["runs"][0]["lengths"]["16"]
    first["flip_count"] = 1
    first["flips"] = [{"image": "7", "index": 7, "bit": 3, "reference": 0.5, "candidate": -0.1, "margin": 0.5}]
    path.write_text(json.dumps(parity))
    command("admth-export", "report", str(run), "--queries", "1")
    text = (run / "report.html").read_text(encoding="utf-8")
    assert 'class="verdict fail"' in text
    assert "bit 3 of image &lt;b&gt;7&lt;/b&gt; flipped" in text
    assert "1 of 3,120 bits differ on 30 images" in " ".join(re.sub("<[^>]*>", "", text).split())
    assert "100\N{NO-BREAK SPACE}%</div>" not in text


def test_a_broken_file_of_the_run_is_named(finished_run: FinishedRun, tmp_path: Path) -> None:
    run = tmp_path / "broken"
    shutil.copytree(finished_run.folder, run)
    (run / "evaluation.json").write_text("{")
    with pytest.raises(AssertionError, match=r"evaluation\.json: cannot be read .*: run  admth-train evaluate"):
        command("admth-export", "report", str(run))
