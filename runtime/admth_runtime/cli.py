"""``admth-run``: encode images, search codes, look at models, check the machine, measure latency.

Everything heavy is imported inside the commands, so that ``--help`` is instant and runs in a bare environment.
"""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from admth_runtime.console import new_app, note, print_json, progress, run_app, say, warn
from admth_runtime.errors import InputError

if TYPE_CHECKING:
    from admth_runtime.encoding import UnreadableImage
    from admth_runtime.index import HashIndex
    from admth_runtime.packing import UInt8Array

__all__ = ["app", "main"]

app = new_app("Run admth models: images in, hash codes of every length out.")

Model = Annotated[
    Path, typer.Option("--model", "-m", help="The ONNX model, or a TensorRT engine, as admth-export writes them.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; only auto falls back to the CPU.")]
Provider = Annotated[
    str | None,
    typer.Option(help="ONNX Runtime's provider: cpu, cuda, tensorrt or rtx.  [default: the device's own]"),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads of one inference call.  [default: physical cores]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]

_DEFAULT_MODEL = Path("model.onnx")
_MOST_LISTED = 20


@app.command()
def encode(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH", help="Image files, and folders of them.")],
    model: Model = _DEFAULT_MODEL,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write: .parquet or .npz.")] = Path("codes.npz"),
    logits: Annotated[bool, typer.Option("--logits", help="Keep the logits of every length too.")] = False,
    batch: Annotated[int, typer.Option(help="Images in one inference call.")] = 32,
    threads: Threads = None,
    device: Device = "auto",
    provider: Provider = None,
    max_error_rate: Annotated[
        float, typer.Option(help="Share of unreadable images, 0 to 1, above which nothing is written.")
    ] = 0.01,
    recursive: Annotated[
        bool, typer.Option("--recursive/--no-recursive", help="Search folders within folders.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Encode images to codes of every length."""
    from admth_runtime.codes_file import check_codes_path, write_codes
    from admth_runtime.encoding import TooManyUnreadableError, encode_files, list_images
    from admth_runtime.files import check_target, write_json
    from admth_runtime.runtime import HashRuntime

    check_codes_path(out)
    check_target(out)
    errors_file = out.with_name(f"{out.name}.errors.json")
    start = time.perf_counter()
    uris = list_images(paths, recursive=recursive)
    with HashRuntime(model, device=device, provider=provider, threads=threads, batch_size=batch) as runtime:
        try:
            with progress("encoding", len(uris), unit="images") as advance:
                encoded, unreadable = encode_files(
                    runtime, uris, keep_logits=logits, max_error_rate=max_error_rate, advance=advance
                )
        except TooManyUnreadableError as error:
            _list_unreadable(error.unreadable, most=len(error.unreadable))
            raise
    write_codes(out, encoded)
    if unreadable:
        _list_unreadable(unreadable, most=_MOST_LISTED)
        write_json(errors_file, [asdict(image) for image in unreadable])
    else:
        errors_file.unlink(missing_ok=True)  # of an earlier run into the same file
    seconds = time.perf_counter() - start
    if as_json:
        print_json(
            {
                "out": str(out),
                "images": len(encoded),
                "unreadable": len(unreadable),
                "errors_file": str(errors_file) if unreadable else None,
                "code_lengths": list(encoded.code_lengths),
                "logits": logits,
                "model_sha256": encoded.model_sha256,
                "seconds": round(seconds, 3),
            }
        )
        return
    rate = len(encoded) / seconds
    say(f"wrote {out}: {_count(len(encoded))}, codes of {_bits(encoded.code_lengths)}, {rate:,.0f} images/s")
    if unreadable:
        say(f"wrote {errors_file}: {_count(len(unreadable))} left out")
    say(f"next:  admth-run search QUERY.jpg --index {out} --model {model}")


@app.command()
def search(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="An image file, or a code in hexadecimal.")],
    index: Annotated[Path, typer.Option("--index", "-i", help="Encoded images: .parquet or .npz.")],
    model: Model = _DEFAULT_MODEL,
    length: Annotated[
        int | None, typer.Option(help="Code length in bits.  [default: the longest, or the code's]")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many neighbours to show.")] = 10,
    threads: Threads = None,
    device: Device = "auto",
    provider: Provider = None,
    as_json: AsJson = False,
) -> None:
    """Find the nearest encoded images of a query image or code."""
    from admth_runtime.index import HashIndex

    if k < 1:
        raise InputError(f"-k {k} is less than 1: ask for one neighbour or more")
    loaded = HashIndex.load(index)
    if len(loaded) == 0:
        raise InputError(f"{index} holds no images: encode some first")
    codes, length = _query_codes(query, loaded, model, length, threads, device, provider)
    if k > len(loaded):
        note(f"note: {index} holds {_count(len(loaded))}, fewer than -k {k}: all are shown")
        k = len(loaded)
    hits = loaded.search(codes, k, length)
    rows = [
        {"rank": rank, "distance": int(distance), "id": int(image), "uri": uri}
        for rank, (distance, image, uri) in enumerate(
            zip(hits.distances[0], hits.ids[0], loaded.uris_of(hits.ids[0]), strict=True), start=1
        )
    ]
    if as_json:
        print_json({"query": query, "code": codes[0].tobytes().hex(), "length": length, "k": k, "hits": rows})
        return
    say(f"nearest of {_count(len(loaded))} at {length} bits")
    say(f"{'rank':>4}  {'distance':>8}  uri")
    for row in rows:
        say(f"{row['rank']:>4}  {row['distance']:>8}  {row['uri']}")


@app.command()
def info(
    file: Annotated[Path, typer.Argument(metavar="MODEL", help="A model, or a file of encoded images.")],
    as_json: AsJson = False,
) -> None:
    """Say what a model, or a file of encoded images, is."""
    from admth_runtime.info import describe_codes, describe_model

    facts = describe_codes(file) if file.suffix.lower() in (".parquet", ".npz") else describe_model(file)
    if as_json:
        print_json(facts)
    else:
        _say_facts(facts)


@app.command()
def doctor(as_json: AsJson = False) -> int:
    """Check the machine: engines, versions, conflicts, and what to install. Exits with 1 when no engine works."""
    from admth_runtime.doctor import diagnose

    found = diagnose()
    ready = found.engine_works or any(flavour.usable for flavour in found.tensorrt)
    status = 0 if ready else 1
    if as_json:
        print_json(found.to_dict())
        return status
    runtimes = ", ".join(f"{package.name} {package.version}" for package in found.onnxruntime) or "not installed"
    engine = f"{runtimes} ({', '.join(found.providers)})" if found.engine_works else f"{found.engine_problem}"
    cuda = found.cuda
    gpus = ", ".join(f"{name} ({capability})" for name, capability in cuda.gpus)
    tensorrt = {
        flavour.module: f"{flavour.version or 'unknown version'}, "
        + ("usable" if flavour.usable else f"not usable: {flavour.problem}")
        for flavour in found.tensorrt
    }
    _say_facts(
        {
            "admth": found.admth,
            "python": found.python,
            "platform": found.platform,
            "cpu": f"{found.cpu}, {found.cores} usable cores, {' '.join(found.cpu_flags) or 'no known vector flags'}",
            "onnxruntime": engine,
            **(tensorrt or {"tensorrt": "not installed"}),
            "cuda": cuda.problem or f"driver for CUDA {cuda.version}, {gpus}",
            "cuda python": ", ".join(f"{package.name} {package.version}" for package in found.cuda_python) or "none",
            **{name: version or "not installed" for name, version in found.optional.items()},
        }
    )
    for conflict in found.conflicts:
        warn(conflict)
    for line in found.advice:
        say(f"advice: {line}")
    if found.engine_works:
        say("ready: an engine ran a model just now")
    else:
        say("ready for TensorRT engines only" if ready else "not ready: no engine works")
    return status


@app.command()
def bench(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX model or TensorRT engine.")],
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH", help="Images to measure with; without any, JPEGs are made."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Images in one inference call.")] = 1,
    threads: Threads = None,
    device: Device = "auto",
    provider: Provider = None,
    queries: Annotated[int, typer.Option(help="Batches that are measured.")] = 256,
    warmup: Annotated[int, typer.Option(help="Batches before them that are not.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Measure the latency of decoding, preprocessing and inference."""
    from admth_runtime.bench import GENERATED_SIZE, generated_pictures, measure_latency
    from admth_runtime.cpu import cpu_name
    from admth_runtime.encoding import list_images
    from admth_runtime.runtime import HashRuntime

    with ExitStack() as stack:
        runtime = stack.enter_context(
            HashRuntime(model, device=device, provider=provider, threads=threads, batch_size=batch)
        )
        pictures: list[Any] = list_images(paths) if paths else stack.enter_context(generated_pictures())
        with progress("measuring", queries + warmup, unit="batches") as advance:
            times = measure_latency(runtime, pictures, batch=batch, queries=queries, warmup=warmup, advance=advance)
        facts = {
            "model": str(model),
            "model_sha256": runtime.model_sha256,
            "engine": f"{runtime.engine.name} {runtime.engine.version}",
            "device": runtime.device,
            "threads": runtime.threads,
            "cpu": cpu_name(),
            "pictures": f"{len(pictures)} files"
            if paths
            else f"generated JPEGs of {'x'.join(map(str, GENERATED_SIZE))}",
            "batch": batch,
            "queries": queries,
            "warmup": warmup,
        }
    per_second = 1000 * batch / times["end to end"].mean
    if as_json:
        stages = {stage.replace(" ", "_"): asdict(stage_times) for stage, stage_times in times.items()}
        print_json({**facts, "milliseconds": stages, "images_per_second": per_second})
        return
    _say_facts(facts)
    say(f"{'ms a batch':<12} {'p50':>9} {'p90':>9} {'p99':>9} {'max':>9}")
    for stage, t in times.items():
        say(f"{stage:<12} {t.p50:>9.3f} {t.p90:>9.3f} {t.p99:>9.3f} {t.max:>9.3f}")
    say(f"{per_second:,.0f} images/s, one batch after the other")


def main() -> None:
    """Run ``admth-run``."""
    run_app(app)


def _query_codes(
    query: str,
    index: HashIndex,
    model: Path,
    length: int | None,
    threads: int | None,
    device: str,
    provider: str | None,
) -> tuple[UInt8Array, int]:
    """Return the query's code, uint8 [1, L / 8], and its length: of an image file, or as hexadecimal text."""
    if not Path(query).exists() and re.fullmatch("(?:[0-9a-fA-F]{2})+", query):
        from admth_runtime.packing import from_hex

        code = from_hex([query])
        bits = 8 * code.shape[1]
        if length not in (None, bits):
            raise InputError(f"the code {query} has {bits} bits, not --length {length}: leave --length out")
        return code, bits
    from admth_runtime.runtime import HashRuntime

    if not Path(query).exists():
        raise InputError(f"{query}: no such image file, and not a code in hexadecimal such as 00ff12ab")
    length = index.code_lengths[-1] if length is None else length
    index.check_length(length)
    with HashRuntime(model, device=device, provider=provider, threads=threads) as runtime:
        index.check_model(runtime.model_sha256)
        return runtime.encode(query)[length], length


def _list_unreadable(unreadable: list[UnreadableImage] | tuple[UnreadableImage, ...], most: int) -> None:
    for image in unreadable[:most]:
        note(f"unreadable: {image.path}: {image.reason}")
    if len(unreadable) > most:
        note(f"unreadable: and {len(unreadable) - most:,} more")


def _say_facts(facts: dict[str, Any]) -> None:
    width = max(len(name) for name in facts) + 2
    for name, value in facts.items():
        say(f"{name.replace('_', ' '):<{width}}{_plain(value)}")


def _plain(value: Any) -> str:
    """Write a JSON value for people, on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_plain(inner) for inner in value) or "none"
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _count(images: int) -> str:
    return f"{images:,} image{'' if images == 1 else 's'}"


def _bits(lengths: tuple[int, ...]) -> str:
    *first, last = [str(length) for length in lengths]
    return f"{', '.join(first)} and {last} bits" if first else f"{last} bits"
