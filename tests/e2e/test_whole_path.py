"""From pictures to a report by the public commands: the demo in small, on pictures that are made here."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from _rooms import FinishedRun, command

from admth_runtime import HashIndex, HashRuntime, read_codes


def test_training_leaves_a_run_without_pickles(finished_run: FinishedRun) -> None:
    names = {path.name for path in finished_run.folder.iterdir()}
    assert {"model.safetensors", "config.json", "metrics.jsonl", "evaluation.json", "evaluation.png"} <= names
    assert not [name for name in names if name.endswith((".pt", ".pth", ".pkl", ".ckpt", ".tmp"))]
    records = [json.loads(line) for line in (finished_run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(1, 7))
    assert records[-1]["loss"] < records[0]["loss"]


def test_codes_find_pictures_of_the_same_colour(finished_run: FinishedRun) -> None:
    evaluation = json.loads((finished_run.folder / "evaluation.json").read_text())
    assert evaluation["code_lengths"] == [16, 24, 64]
    assert evaluation["metrics"]["64"]["map"]["all"] > evaluation["protocol"]["random_baseline"] + 0.2


def test_export_proves_its_bits(finished_run: FinishedRun) -> None:
    parity = json.loads((finished_run.folder / "model.parity.json").read_text())
    assert parity["passed"] is True
    assert parity["runs"][0]["images"] == 30
    assert {run["batch_size"] for run in parity["runs"]} == {1, 3, 32}
    info = json.loads(command("admth-run", "info", str(finished_run.model), "--json"))
    weights = hashlib.sha256((finished_run.folder / "model.safetensors").read_bytes()).hexdigest()
    assert info["checkpoint_sha256"] == weights
    assert info["parity"]["passed"] is True


@pytest.fixture(scope="module")
def encoded(finished_run: FinishedRun) -> Path:
    """Encode all pictures, in the folder that the pictures are in, so that the addresses are short."""
    command(
        "admth-run", "encode", "pictures", "--model", str(finished_run.model), "--out", "runs/codes.parquet",
        cwd=finished_run.pictures.parent,
    )  # fmt: skip
    return finished_run.pictures.parent / "runs" / "codes.parquet"


def test_encoding_and_searching_agree_with_the_library(finished_run: FinishedRun, encoded: Path) -> None:
    images = read_codes(encoded)
    assert len(images) == 120
    base = finished_run.pictures.parent
    with HashRuntime(finished_run.model, threads=1) as runtime:
        codes = runtime.encode([base / uri for uri in images.uris])
        assert images.model_sha256 == runtime.model_sha256
    for length in (16, 24, 64):
        np.testing.assert_array_equal(images.codes[length], codes[length])
    printed = command(
        "admth-run", "search", images.uris[50], "--index", str(encoded), "--model", str(finished_run.model),
        "--length", "24", "-k", "7", "--json", cwd=base,
    )  # fmt: skip
    hits = json.loads(printed)["hits"]
    expected = HashIndex.load(encoded).search(codes[24][50:51], 7)
    assert [hit["id"] for hit in hits] == expected.ids[0].tolist()
    assert [hit["distance"] for hit in hits] == expected.distances[0].tolist()
    assert hits[0]["distance"] == 0


class Page(HTMLParser):
    """What the tests look for in a report: addresses, text, pictures without a text, and unclosed elements."""

    VOID = {"meta", "img", "link", "br", "path", "use", "rect", "hr", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.words: list[str] = []
        self.silent: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.addresses += [
            values[key] or "" for key in ("src", "href", "xlink:href", "data", "action") if key in values
        ]
        self.ids += [values["id"] or ""] if "id" in values else []
        if (tag == "img" and not values.get("alt")) or (tag == "svg" and not values.get("aria-label")):
            self.silent.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(finished_run: FinishedRun, *arguments: str, out: Path) -> Page:
    base = finished_run.pictures.parent
    command("admth-export", "report", str(finished_run.folder), *arguments, "--out", str(out), cwd=base)
    return Page(out.read_text(encoding="utf-8"))


def test_report_is_one_page_that_needs_nothing_else(finished_run: FinishedRun, encoded: Path, tmp_path: Path) -> None:
    codes = ("--database-codes", str(encoded), "--query-codes", str(encoded))
    page = report(finished_run, *codes, "--queries", "4", out=tmp_path / "report.html")
    assert not page.open
    assert not page.silent
    assert len(set(page.ids)) == len(page.ids)
    outside = [address for address in page.addresses if not address.startswith(("#", "data:image/"))]
    assert not outside
    inside = {address[1:] for address in page.addresses if address.startswith("#")}
    assert inside <= set(page.ids)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "url(http" not in text and "@import" not in text and "<script" not in text
    assert len(text.encode()) < 3_000_000
    # Four queries, each with ten neighbours at two lengths.
    assert sum(address.startswith("data:image/png") for address in page.addresses) == 4 * (1 + 2 * 10)
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_report_shows_what_the_other_files_say(finished_run: FinishedRun, encoded: Path, tmp_path: Path) -> None:
    codes = ("--database-codes", str(encoded), "--query-codes", str(encoded))
    page = report(finished_run, *codes, out=tmp_path / "report.html")
    evaluation = json.loads((finished_run.folder / "evaluation.json").read_text())
    parity = json.loads((finished_run.folder / "model.parity.json").read_text())
    for length in ("16", "24", "64"):
        assert f"{evaluation['metrics'][length]['map']['all']:.4f}" in page.text
    assert evaluation["protocol"]["tie_order"] in page.text
    bits = sum(values["bits"] for values in parity["runs"][0]["lengths"].values())
    assert f"of {bits:,} bits differ on 30 images" in page.text
    assert hashlib.sha256(finished_run.model.read_bytes()).hexdigest() in page.text
    assert "red & <dark>" in page.text
    assert "red & <dark>" not in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Not in this report" not in page.text


def test_report_marks_are_the_truth(finished_run: FinishedRun, encoded: Path, tmp_path: Path) -> None:
    codes = ("--database-codes", str(encoded), "--query-codes", str(encoded))
    report(finished_run, *codes, "--queries", "3", out=tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    marks = [mark == "right" for mark in re.findall(r'<li class="(right|wrong)">', text)]
    index, images = HashIndex.load(encoded), read_codes(encoded)
    classes = [Path(uri).parent.name for uri in images.uris]
    first_of_each = [classes.index(name) for name in dict.fromkeys(classes)]
    expected = []
    for row in first_of_each:
        for length in (16, 64):
            ids = index.search(np.ascontiguousarray(images.codes[length][row : row + 1]), 10).ids[0]
            expected += [classes[i] == classes[row] for i in ids]
    assert marks == expected


def test_the_commands_in_the_report_give_the_same_run(finished_run: FinishedRun, tmp_path: Path) -> None:
    page = report(finished_run, "--queries", "1", out=tmp_path / "report.html")
    line = next(line for line in "".join(page.words).splitlines() if line.startswith("admth-train fit"))
    words = shlex.split(line)
    place = words.index("--out") + 1
    assert words[place] == "runs/tiny"
    words[place] = "runs/again"
    command("admth-train", *words[1:], "--threads", "1", cwd=finished_run.pictures.parent)
    again = finished_run.pictures.parent / "runs" / "again"
    assert (again / "config.json").read_bytes() == (finished_run.folder / "config.json").read_bytes()
    assert (again / "model.safetensors").read_bytes() == (finished_run.folder / "model.safetensors").read_bytes()


def test_report_says_what_is_missing(finished_run: FinishedRun, tmp_path: Path) -> None:
    """A run without evaluation and model still has a report, which names the commands that complete it."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "metrics.jsonl", "model.safetensors"):
        (bare / name).write_bytes((finished_run.folder / name).read_bytes())
    printed = command("admth-export", "report", str(bare))
    assert "not in the report" in printed
    page = Page((bare / "report.html").read_text(encoding="utf-8"))
    assert "admth-train evaluate" in page.text
    assert "This run has no model.onnx yet." in page.text
    assert "not verified" in page.text


def test_report_says_that_parity_was_left_out(finished_run: FinishedRun, tmp_path: Path) -> None:
    unproved = tmp_path / "unproved.onnx"
    command("admth-export", "onnx", str(finished_run.folder), "--no-verify", "--out", str(unproved))
    page = report(finished_run, "--model", str(unproved), "--queries", "1", out=tmp_path / "report.html")
    assert "exported with --no-verify" in page.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{none}"], "is not a run's folder"),
        (["{run}", "--queries", "0"], "--queries 0 is not from 1 to 50"),
        (["{run}", "--query-codes", "{codes}"], "without --database-codes"),
        (["{run}", "--query-codes", "{none}", "--database-codes", "{codes}"], "none"),
        (["{run}", "--latency", "{run}/config.json"], "is not what"),
        (["{run}", "--model", "{run}/config.json"], "config.json"),
        (["{run}", "--out", "{run}"], "it is a folder"),
        (["{run}", "--out", "{run}/config.json/report.html"], "a part of the path is a file"),
    ],
)
def test_report_answers_bad_input_with_one_line(
    finished_run: FinishedRun, encoded: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"run": finished_run.folder, "codes": encoded, "none": tmp_path / "none"}
    words = [argument.format(**places) for argument in arguments]
    if "--out" not in words:
        words += ["--out", str(tmp_path / "report.html")]
    done = subprocess.run(
        [sys.executable, "-m", "admth_export", "report", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
