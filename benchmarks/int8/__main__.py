"""``make bench-int8``: networks, INT8 models, figures, docs/int8.md and docs/int8.json."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from _harness import ROOT, machine

from admth_runtime.console import note, run_app, track
from admth_runtime.errors import AdmthError, DataError, InputError
from admth_runtime.files import write_json, write_text
from int8.page import all_rows, page
from int8.processes import WorkError
from int8.settings import CASES, Settings

PAGE = ROOT / "docs" / "int8.md"
RESULTS = ROOT / "docs" / "int8.json"
PARTS = (*CASES, "remedies", "memory")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_DEFAULTS = Settings()


@app.command()
def bench(
    only: Annotated[str | None, typer.Option(help=f"Parts, with commas between: {', '.join(PARTS)}.")] = None,
    fashion_mnist: Annotated[Path, typer.Option(help="Folder of Fashion-MNIST's files.")] = _DEFAULTS.fashion,
    full_fashion_mnist: Annotated[
        Path, typer.Option(help="Folder of the full data set; its other images are those that the gate is measured on.")
    ] = _DEFAULTS.full_fashion,
    emoji: Annotated[Path | None, typer.Option(help="Folder of the unpacked npm package.  [default: download]")] = None,
    nncf_python: Annotated[
        Path | None, typer.Option(help="Interpreter that has NNCF and OpenVINO.  [default: a new environment]")
    ] = None,
    cache: Annotated[Path, typer.Option(help="Folder for networks and models.")] = _DEFAULTS.cache,
    fresh: Annotated[bool, typer.Option("--fresh", help="Make INT8 models that exist already anew.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of every engine.")] = _DEFAULTS.threads,
    qat: Annotated[bool, typer.Option("--qat/--no-qat", help="Measure quantisation-aware training too.")] = True,
    page_only: Annotated[
        bool, typer.Option("--page-only", help="Write the page from the results, measure nothing.")
    ] = False,
) -> None:
    """Measure INT8 models of admth, ONNX Runtime and NNCF, and write docs/int8.md and docs/int8.json."""
    parts = _parts(only)
    settings = replace(
        _DEFAULTS,
        cache=cache.resolve(),
        fashion=fashion_mnist,
        full_fashion=full_fashion_mnist,
        emoji=emoji,
        nncf_python=nncf_python,
        fresh=fresh,
        threads=threads,
        qat=qat,
    )
    _check(settings)
    results = _stored()
    if not page_only:
        settings.cache.mkdir(parents=True, exist_ok=True)
        _tell(parts, results)
        for part in track(parts, "parts"):
            started = time.monotonic()
            _measure(part, settings, results)
            results["minutes"][part] = round((time.monotonic() - started) / 60, 1)
            # After every part, so that an interruption costs one part.
            write_json(RESULTS, results)
    for row in all_rows(results):
        state = {True: "met   ", False: "MISSED", None: "none  "}[row.met]
        note(f"{state}  {row.figure}: {row.measured} ({row.target})")
    write_text(PAGE, page(results))
    note(f"wrote {PAGE.relative_to(ROOT)} and {RESULTS.relative_to(ROOT)}")


def _parts(only: str | None) -> list[str]:
    parts = list(PARTS) if only is None else [part.strip() for part in only.split(",") if part.strip()]
    if not parts:
        raise InputError(f"--only {only!r} names no part: use {', '.join(PARTS)}")
    if unknown := [part for part in parts if part not in PARTS]:
        raise InputError(f"--only {unknown[0]!r} is no part: use {', '.join(PARTS)}")
    return parts


def _check(settings: Settings) -> None:
    """Refuse before the first hour of work what could only fail after it."""
    if settings.threads < 1:
        raise InputError(f"--threads {settings.threads} is not positive: use 1 or more")
    for option, path in (
        ("--fashion-mnist", settings.fashion),
        ("--emoji", settings.emoji),
        ("--nncf-python", settings.nncf_python),
    ):
        if path is not None and not path.exists():
            raise InputError(f"{option} {path} does not exist: pass another path, or leave it out")


def _stored() -> dict[str, Any]:
    try:
        results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    except ValueError as error:
        raise DataError(f"{RESULTS} is broken ({error}): remove it, and measure everything again") from error
    return {"machine": {}, "versions": {}, "cases": {}, "minutes": {}, **results}


def _tell(parts: list[str], results: dict[str, Any]) -> None:
    known = [results["minutes"][part] for part in parts if part in results["minutes"]]
    took = f"; the last time this took {sum(known):.0f} minutes" if len(known) == len(parts) else ""
    note(f"measuring {', '.join(parts)}{took}")


def _measure(part: str, settings: Settings, results: dict[str, Any]) -> None:
    from int8.case import measure_case
    from int8.memory import measure_memory
    from int8.recipes import nncf_versions
    from int8.remedies import measure_remedies

    try:
        if part == "memory":
            results["memory"] = measure_memory(settings)
        elif part == "remedies":
            results["remedies"] = measure_remedies(settings)
        else:
            case = measure_case(CASES[part], settings)
            # The page's order, whatever was measured first.
            results["cases"] = {
                name: case if name == part else results["cases"][name]
                for name in CASES
                if name == part or name in results["cases"]
            }
            results["versions"] = nncf_versions(settings)
    except WorkError as error:
        raise AdmthError(f"{part}: {error}") from error
    results["machine"] = machine() | {
        name: results["versions"][name] for name in ("nncf", "openvino") if name in results["versions"]
    }


if __name__ == "__main__":
    run_app(app)
