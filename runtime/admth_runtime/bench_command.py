"""``admth-run bench``: latency and throughput of a model on this machine, in the shape of MLPerf Inference."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from admth_runtime.command_options import AsJson, Device, Provider, SelfTest, Threads
from admth_runtime.console import print_json, progress, say
from admth_runtime.errors import InputError

if TYPE_CHECKING:
    from admth_runtime.bench import SingleStream
    from admth_runtime.bench_offline import Offline
    from admth_runtime.runtime import HashRuntime

__all__ = ["bench"]


def bench(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX model or TensorRT engine.")],
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH", help="Images to measure with; without any, JPEGs are made."),
    ] = None,
    queries: Annotated[int, typer.Option(help="Single stream: queries that are measured, one image each.")] = 1024,
    warmup: Annotated[int, typer.Option(help="Single stream: queries before them that are not.")] = 16,
    samples: Annotated[int, typer.Option(help="Offline: images that each stage takes; 0 leaves it out.")] = 1024,
    batch: Annotated[int, typer.Option(help="Offline: images in one inference call.")] = 32,
    threads: Threads = None,
    device: Device = "auto",
    provider: Provider = None,
    self_test: SelfTest = False,
    picture: Annotated[Path | None, typer.Option(help="Draw the result into this file, .svg.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure single-stream latency and offline throughput, stage by stage."""
    from admth_runtime.bench import check_least, generated_pictures, measure_single_stream
    from admth_runtime.bench_offline import measure_offline
    from admth_runtime.encoding import list_images
    from admth_runtime.files import check_target, write_text
    from admth_runtime.runtime import HashRuntime

    check_least(queries=(queries, 1), warmup=(warmup, 0), samples=(samples, 0), batch=(batch, 1))
    if picture is not None:
        if picture.suffix.lower() != ".svg":
            raise InputError(f"--picture {picture} is drawn as SVG: name it {picture.with_suffix('.svg').name}")
        check_target(picture)
    with ExitStack() as stack:
        runtime = stack.enter_context(
            HashRuntime(model, device=device, provider=provider, threads=threads, batch_size=batch, self_test=self_test)
        )
        files: list[Any] = list_images(paths) if paths else stack.enter_context(generated_pictures())
        with progress("single stream", queries + warmup, unit="queries") as advance:
            stream = measure_single_stream(runtime, files, queries=queries, warmup=warmup, advance=advance)
        offline = None
        if samples:
            with progress("offline", 4 * samples, unit="images") as advance:
                offline = measure_offline(runtime, files, samples=samples, advance=advance)
        facts = _facts(runtime, files if paths else None)
    facts |= {"batch": batch, "queries": queries, "warmup": warmup}
    if picture is not None:
        from admth_runtime.bench_picture import bench_svg

        write_text(picture, bench_svg(stream, offline, f"admth-run bench {model.name}", _lines(facts)))
    if as_json:
        print_json({**facts, **_figures(stream, offline), "picture": None if picture is None else str(picture)})
        return
    _say(facts, stream, offline)
    if picture is not None:
        say(f"wrote {picture}")


def _facts(runtime: HashRuntime, files: list[Any] | None) -> dict[str, Any]:
    """Name all that a figure depends on: model, engine, machine, versions, pictures."""
    import platform

    import numpy as np
    import PIL

    from admth_runtime._version import __version__
    from admth_runtime.bench import GENERATED_SIZE
    from admth_runtime.cpu import cpu_flags, cpu_name, usable_cores
    from admth_runtime.decoding import jpeg_decoder

    return {
        "model": str(runtime.model_path),
        "model_sha256": runtime.model_sha256,
        "precision": runtime.manifest.precision,
        "code_lengths": list(runtime.code_lengths),
        "input": list(runtime.manifest.preprocessing.shape),
        "engine": f"{runtime.engine.name} {runtime.engine.version}",
        "device": runtime.device,
        "threads": runtime.threads,
        "decode_threads": runtime.decode_threads,
        "jpeg_decoder": jpeg_decoder(),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "cpu_flags": list(cpu_flags()),
        "versions": {
            "admth": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
        "platform": f"{platform.system()} {platform.machine()}",
        "pictures": f"generated JPEGs of {'x'.join(map(str, GENERATED_SIZE))}" if files is None else _files(len(files)),
    }


def _figures(stream: SingleStream, offline: Offline | None) -> dict[str, Any]:
    from admth_runtime.bench import LEAST_QUERIES

    times = stream.times
    whole = times["end to end"]
    single = {
        "queries": stream.queries,
        "least_queries": LEAST_QUERIES,
        "conforms": stream.conforms,
        "p90_milliseconds": whole.p90,
        "images_per_second": 1000 / whole.mean,
    }
    whole_set: dict[str, Any] | None = None
    if offline is not None:
        rates = {stage.replace(" ", "_"): rate for stage, rate in offline.rates.items()}
        whole_set = {"samples": offline.samples, "batch": offline.batch, "images_per_second": rates}
    return {
        "single_stream": single,
        "milliseconds": {stage.replace(" ", "_"): asdict(stage_times) for stage, stage_times in times.items()},
        "offline": whole_set,
        "images_per_second": offline.rates["end to end"] if offline is not None else single["images_per_second"],
    }


def _say(facts: dict[str, Any], stream: SingleStream, offline: Offline | None) -> None:
    from admth_runtime.bench import LEAST_QUERIES

    for line in (facts["model"], f"SHA-256 {facts['model_sha256']}", *_lines(facts)):
        say(line)
    shortfall = "" if stream.conforms else f"; not conforming, since MLPerf asks for {LEAST_QUERIES:,} or more"
    say(f"\nsingle stream, {stream.queries:,} queries of one image{shortfall}")
    say(f"{'ms a query':<12} {'p50':>9} {'p90':>9} {'p99':>9} {'max':>9}")
    for stage, t in stream.times.items():
        say(f"{stage:<12} {t.p50:>9.3f} {t.p90:>9.3f} {t.p99:>9.3f} {t.max:>9.3f}")
    if offline is not None:
        say(f"\noffline, {offline.samples:,} images in batches of {offline.batch}")
        say(f"{'images/s':<12} {'':>9}")
        for stage, rate in offline.rates.items():
            say(f"{stage:<12} {rate:>9,.1f}")


def _lines(facts: dict[str, Any]) -> list[str]:
    """Say in a few lines what the figures depend on."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    threads = facts["threads"]
    return [
        f"{facts['engine']} on {facts['device']}, {threads} thread{'s' * (threads != 1)}, {facts['precision']}, "
        f"codes of {', '.join(map(str, facts['code_lengths']))} bits",
        f"{facts['cpu']}, {facts['cores']} usable cores, {facts['platform']}",
        f"{facts['pictures']}, decoded by {facts['jpeg_decoder']}; {versions}",
    ]


def _files(count: int) -> str:
    return f"{count:,} file{'s' * (count != 1)}"
