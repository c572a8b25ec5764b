"""``admth-run index export``: hand an index over to a search server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from admth_runtime.console import parse_integers, print_json, progress, say

__all__ = ["export"]


def export(
    index: Annotated[
        Path, typer.Argument(metavar="INDEX", help="An index, or encoded images: .parquet, .npz, folder.")
    ],
    to: Annotated[str, typer.Option("--to", help="milvus, pgvector, vespa or elasticsearch.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to make.")],
    name: Annotated[str, typer.Option(help="What the table, collection or index is called there.")] = "images",
    lengths: Annotated[
        str | None, typer.Option(help="Code lengths to hand over, such as 16,64.  [default: all of the index]")
    ] = None,
    rows_per_file: Annotated[
        int | None, typer.Option(help="The most rows in one file.  [default: what suits the server]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Write what a search server takes in bulk, with its schema and the queries that use it."""
    from admth_runtime.handover import export_index
    from admth_runtime.index import HashIndex

    loaded = HashIndex.load(index)
    chosen = None if lengths is None else parse_integers(lengths, name="--lengths")
    with progress(f"exporting to {to}", len(loaded), unit="images") as advance:
        made = export_index(loaded, to, out, name=name, lengths=chosen, rows_per_file=rows_per_file, advance=advance)
    if as_json:
        print_json(
            {"out": str(out), "to": to, "images": made.images, "bytes": made.total_bytes, "files": dict(made.files)}
        )
        return
    say(f"wrote {out}: {made.images:,} images for {to}, {len(made.files)} files, {made.total_bytes / 1e6:,.1f} MB")
    say(f"next:  {out / 'README.md'} says how to load and to ask")
