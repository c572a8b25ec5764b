"""``admth-run``: encode images, search codes, look at models, check the machine, measure latency.

Everything heavy is imported inside the commands, so that ``--help`` is instant and runs in a bare environment.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from admth_runtime.bench_command import bench
from admth_runtime.browse_command import browse
from admth_runtime.command_options import DEFAULT_MODEL, AsJson, Device, Model, Provider, SelfTest, Threads
from admth_runtime.console import new_app, note, print_json, run_app, say, warn
from admth_runtime.encode_command import EncodeCommand, encode
from admth_runtime.errors import InputError
from admth_runtime.index_command import index_app
from admth_runtime.stream_command import stream

if TYPE_CHECKING:
    from admth_runtime.index import HashIndex
    from admth_runtime.packing import UInt8Array

__all__ = ["app", "main"]

app = new_app("Run admth models: images in, hash codes of every length out.")


app.command(cls=EncodeCommand)(encode)


@app.command()
def search(
    query: Annotated[str, typer.Argument(metavar="QUERY", help="An image file, or a code in hexadecimal.")],
    index: Annotated[Path, typer.Option("--index", "-i", help="An index, or encoded images: .parquet, .npz, folder.")],
    model: Model = DEFAULT_MODEL,
    length: Annotated[
        int | None, typer.Option(help="Code length in bits.  [default: the longest, or the code's]")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many neighbours to show.")] = 10,
    threads: Threads = None,
    device: Device = "auto",
    provider: Provider = None,
    self_test: SelfTest = False,
    as_json: AsJson = False,
) -> None:
    """Find the nearest encoded images of a query image or code."""
    from admth_runtime.index import HashIndex

    if k < 1:
        raise InputError(f"-k {k} is less than 1: ask for one neighbour or more")
    loaded = HashIndex.load(index)
    if len(loaded) == 0:
        raise InputError(f"{index} holds no images: encode some first")
    codes, length = _query_codes(query, loaded, model, length, threads, device, provider, self_test)
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
    file: Annotated[Path, typer.Argument(metavar="MODEL", help="A model, encoded images, a corpus, or an index.")],
    self_test: Annotated[
        bool, typer.Option("--self-test", help="Run the model on its golden pictures and compare their codes.")
    ] = False,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Say what a model, a file of encoded images, a corpus, or an index is."""
    from admth_runtime.index import describe_index, is_index
    from admth_runtime.info import describe_codes, describe_corpus, describe_model

    encoded = file.suffix.lower() in (".parquet", ".npz")
    if self_test and (encoded or file.is_dir()):
        raise InputError(f"--self-test is for models and {file} is none: leave it out, or name the model")
    folder = describe_index if is_index(file) else describe_corpus
    describe = folder if file.is_dir() else describe_codes if encoded else describe_model
    facts = describe(file)
    if self_test:
        from admth_runtime.runtime import HashRuntime

        with HashRuntime(file, device=device) as runtime:
            report = runtime.self_test()
        facts["self_test"] = report.to_dict() if as_json else str(report)
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


app.command()(bench)
app.command()(stream)
app.command()(browse)
app.add_typer(index_app, name="index")


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
    self_test: bool,
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
    with HashRuntime(model, device=device, provider=provider, threads=threads, self_test=self_test) as runtime:
        index.check_model(runtime.model_sha256)
        return runtime.encode(query)[length], length


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
