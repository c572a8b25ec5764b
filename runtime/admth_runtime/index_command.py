"""``admth-run index``: build an index of encoded images, change it, search it, say what it is."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from admth_runtime.command_options import DEFAULT_MODEL, AsJson, Device, Model, Provider, SelfTest, Threads
from admth_runtime.console import note, parse_integers, print_json, progress, say
from admth_runtime.errors import InputError
from admth_runtime.handover_command import export

if TYPE_CHECKING:
    from admth_runtime.index import HashIndex, SearchHits
    from admth_runtime.packing import UInt8Array
    from admth_runtime.results import HashCodes

__all__ = ["index_app"]

index_app = typer.Typer(
    help="Build an index of encoded images, change it, search it, or hand it over.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Index = Annotated[Path, typer.Argument(metavar="INDEX", help="The folder of an index.")]
Sources = Annotated[
    list[Path], typer.Argument(metavar="SOURCE", help="Files and corpora that  admth-run encode  wrote.")
]
_HEX = "(?:[0-9a-fA-F]{2})+"


@index_app.command()
def build(
    sources: Sources,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to make.")],
    multi_index: Annotated[
        bool, typer.Option("--multi-index", help="Make tables for exact search of the longest code without a scan.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Build an index from encoded images."""
    from admth_runtime.index import build_index

    start = time.perf_counter()
    with progress("indexing", None, unit="images") as advance:
        index = build_index(sources, out, multi_index=multi_index, advance=advance)
    _report(out, index, time.perf_counter() - start, as_json=as_json)
    if not as_json:
        say(f"next:  admth-run index search {out} QUERY.jpg --model MODEL")


@index_app.command()
def add(
    index: Index,
    sources: Sources,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace images that are there under the same ids.")
    ] = False,
    renumber: Annotated[
        bool, typer.Option("--renumber", help="Give the new images ids after the largest that is there.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Add encoded images of the same model to an index."""
    from admth_runtime.index import add_sources

    if replace and renumber:
        raise InputError("--replace goes by ids and --renumber changes them: choose one")
    start = time.perf_counter()
    loaded = _open(index)
    before = len(loaded)
    with progress("indexing", None, unit="images") as advance:
        added = add_sources(loaded, sources, replace=replace, renumber=renumber, advance=advance)
    loaded.save(index)
    _report(index, loaded, time.perf_counter() - start, as_json=as_json, before=before, added=added)


@index_app.command()
def delete(
    index: Index,
    ids: Annotated[str | None, typer.Option("--ids", help="Ids, such as 3,14,15.")] = None,
    ids_from: Annotated[Path | None, typer.Option("--ids-from", help="A file with an id a line.")] = None,
    as_json: AsJson = False,
) -> None:
    """Delete images from an index by id."""
    doomed = list(parse_integers(ids, name="--ids")) if ids is not None else []
    if ids_from is not None:
        doomed += _ids_in(ids_from)
    if not doomed:
        raise InputError("no ids were given: name them with --ids 3,14,15 or --ids-from FILE")
    start = time.perf_counter()
    loaded = _open(index)
    before = len(loaded)
    loaded.delete(doomed)
    loaded.save(index)
    _report(index, loaded, time.perf_counter() - start, as_json=as_json, before=before)


@index_app.command()
def search(
    index: Annotated[Path, typer.Argument(metavar="INDEX", help="An index; encoded images will do.")],
    queries: Annotated[list[str], typer.Argument(metavar="QUERY", help="Image files, or codes in hexadecimal.")],
    model: Model = DEFAULT_MODEL,
    length: Annotated[int | None, typer.Option(help="Code length in bits.  [default: the longest]")] = None,
    k: Annotated[int, typer.Option("-k", help="How many neighbours to show of each.")] = 10,
    mode: Annotated[str, typer.Option(help="exact, flat, multi-index, or coarse, which is faster on many.")] = "exact",
    rerank: Annotated[
        str | None, typer.Option(help="Order the nearest by the query's logits: weighted or asymmetric.")
    ] = None,
    recall: Annotated[float, typer.Option(help="The share of the nearest that --mode coarse aims at.")] = 0.99,
    threads: Threads = None,
    device: Device = "auto",
    provider: Provider = None,
    self_test: SelfTest = False,
    as_json: AsJson = False,
) -> None:
    """Find the nearest images of query images or codes."""
    from admth_runtime.index import HashIndex

    if k < 1:
        raise InputError(f"-k {k} is less than 1: ask for one neighbour or more")
    loaded = HashIndex.load(index)
    if len(loaded) == 0:
        raise InputError(f"{index} holds no images: add some first")
    if k > len(loaded):
        note(f"note: {index} holds {len(loaded):,} images, fewer than -k {k}: all are shown")
        k = len(loaded)
    codes = _query_codes(queries, loaded, length, model, threads, device, provider, self_test)
    start = time.perf_counter()
    hits = loaded.search(codes, k, length, mode=mode, rerank=rerank, recall=recall)
    milliseconds = 1e3 * (time.perf_counter() - start)
    used = (length or loaded.code_lengths[-1]) if isinstance(codes, Mapping) else 8 * codes.shape[1]
    compared = codes[used] if isinstance(codes, Mapping) else codes
    facts = {"images": len(loaded), "length": used, "k": k, "mode": mode, "rerank": rerank}
    _show(facts | {"milliseconds": round(milliseconds, 3)}, _answers(loaded, queries, compared, hits), as_json=as_json)


@index_app.command()
def info(
    index: Index,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with its SHA-256.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what an index is."""
    from admth_runtime.index import describe_index, verify_files

    facts = describe_index(index)
    if verify:
        facts["verified_files"] = verify_files(index)
    if as_json:
        print_json(facts)
        return
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        say(f"{name.replace('_', ' '):<{width}}{_plain(value)}")


index_app.command()(export)


def _open(path: Path) -> HashIndex:
    from admth_runtime.index import HashIndex, is_index

    if not is_index(path):
        raise InputError(f"{path} holds no index: make one with  admth-run index build SOURCE --out {path}")
    return HashIndex.load(path)


def _query_codes(
    queries: list[str],
    index: HashIndex,
    length: int | None,
    model: Path,
    threads: int | None,
    device: str,
    provider: str | None,
    self_test: bool,
) -> HashCodes | UInt8Array:
    """Return all that the model gives for image files, or the codes that are written in hexadecimal."""
    written = [not Path(query).exists() and re.fullmatch(_HEX, query) is not None for query in queries]
    if all(written):
        from admth_runtime.packing import from_hex

        codes = from_hex(queries)
        if length not in (None, 8 * codes.shape[1]):
            raise InputError(f"the code {queries[0]} has {8 * codes.shape[1]} bits, not --length {length}")
        return codes
    if any(written):
        raise InputError(f"{queries[written.index(True)]} is a code and others are images: ask for one kind at a time")
    if missing := [query for query in queries if not Path(query).exists()]:
        raise InputError(f"{missing[0]}: no such image file, and not a code in hexadecimal such as 00ff12ab")
    if length is not None:
        index.check_length(length)
    from admth_runtime.runtime import HashRuntime

    with HashRuntime(model, device=device, provider=provider, threads=threads, self_test=self_test) as runtime:
        index.check_model(runtime.model_sha256)
        return runtime.encode(queries)


def _answers(index: HashIndex, queries: list[str], codes: UInt8Array, hits: SearchHits) -> list[dict[str, Any]]:
    answers = []
    for number, query in enumerate(queries):
        ids = hits.ids[number]
        rows: list[dict[str, Any]] = [
            {"rank": rank, "distance": distance, "id": image, "uri": uri}
            for rank, (distance, image, uri) in enumerate(
                zip(hits.distances[number].tolist(), ids.tolist(), index.uris_of(ids), strict=True), start=1
            )
        ]
        if hits.scores is not None:
            for row, score in zip(rows, hits.scores[number].tolist(), strict=True):
                row["score"] = round(score, 4)
        answers.append({"query": query, "code": codes[number].tobytes().hex(), "hits": rows})
    return answers


def _show(facts: dict[str, Any], answers: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json({**facts, "queries": answers})
        return
    for answer in answers:
        say(f"{answer['query']}: nearest of {facts['images']:,} images at {facts['length']} bits")
        scored = facts["rerank"] is not None
        say(f"{'rank':>4}  {'distance':>8}  {'  score  ' if scored else ''}uri")
        for row in answer["hits"]:
            score = f"{row['score']:>7.2f}  " if scored else ""
            say(f"{row['rank']:>4}  {row['distance']:>8}  {score}{row['uri']}")


def _report(path: Path, index: HashIndex, seconds: float, *, as_json: bool, **more: int) -> None:
    facts = index.facts()
    if as_json:
        print_json({"index": str(path), **facts, **more, "seconds": round(seconds, 3)})
        return
    images = f"{facts['images']:,} images"
    if "before" in more:
        images += f" ({facts['images'] - more['before']:+,})"
    say(f"wrote {path}: {images}, {facts['distinct_codes']:,} distinct codes, {seconds:.1f} s")


def _ids_in(path: Path) -> list[int]:
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): pass a text file with an id a line") from error
    try:
        return [int(line) for line in lines]
    except ValueError as error:
        raise InputError(f"{path}: {error}: write an id a line") from error


def _plain(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
