"""``admth-run browse``: a local web page to search an index by eye."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from admth_runtime.command_options import DEFAULT_MODEL, AsJson, Device, Model, Provider, SelfTest, Threads
from admth_runtime.console import note, print_json, say, warn
from admth_runtime.errors import InputError

if TYPE_CHECKING:
    from admth_runtime.browse import CorpusFiles

__all__ = ["browse"]

_MEBIBYTE = 1 << 20


def browse(
    index: Annotated[
        Path, typer.Argument(metavar="INDEX", help="An index, or encoded images: .parquet, .npz, folder.")
    ],
    model: Model = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen at; the default is reached from this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes any that is free.")] = 8642,
    root: Annotated[
        Path | None,
        typer.Option(
            help="Folder that relative paths start from; nothing outside it is shown.  [default: the corpus's]"
        ),
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Column of Parquet sources that holds the images.  [default: the corpus's]")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the web browser.")] = False,
    upload_limit: Annotated[int, typer.Option(help="The most MiB of an image that is dropped on the page.")] = 32,
    threads: Threads = None,
    device: Device = "auto",
    provider: Provider = None,
    self_test: SelfTest = False,
    as_json: AsJson = False,
) -> None:
    """Open a local web page: drop an image, see the nearest at each code length side by side. Ctrl-C stops it."""
    from admth_runtime.browse import Browser, BrowseServer
    from admth_runtime.index import HashIndex
    from admth_runtime.runtime import HashRuntime

    if upload_limit < 1:
        raise InputError(f"--upload-limit {upload_limit} is less than 1 MiB")
    files = _files(index, root, column)
    loaded = HashIndex.load(index)
    with HashRuntime(model, device=device, provider=provider, threads=threads, self_test=self_test) as runtime:
        browser = Browser(loaded, runtime, files, name=str(index))
        server = BrowseServer(browser, host=host, port=port, upload_limit=upload_limit * _MEBIBYTE)
        try:
            if not server.loopback:
                warn(f"there is no password: whoever reaches {host} sees the images; --host 127.0.0.1 keeps them here")
            if as_json:
                print_json({"url": server.url, "images": len(loaded), "code_lengths": list(loaded.code_lengths)})
            else:
                say(f"{len(loaded):,} images at {server.url}  (Ctrl-C stops)")
            if open_page:
                _open_page(server.url)
            server.serve_forever()
        except KeyboardInterrupt:
            note("stopped")
        finally:
            server.server_close()


def _open_page(url: str) -> None:
    import webbrowser

    if not webbrowser.open(url):
        warn(f"no web browser could be started: open {url} yourself")


def _files(index: Path, root: Path | None, column: str | None) -> CorpusFiles:
    """Open images where the corpus says that they are, unless the options say otherwise."""
    from admth_runtime.browse import CorpusFiles
    from admth_runtime.corpus.layout import CORPUS_FILE

    start = None
    if (index / CORPUS_FILE).is_file():
        from admth_runtime.corpus.plan import read_plan

        plan = read_plan(index)
        start, column = plan.working_folder, column or plan.column
    return CorpusFiles(root, start=start, column=column or "image")
