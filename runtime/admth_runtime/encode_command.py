"""``admth-run encode``: images to one file of codes, or to a corpus that survives being killed."""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from admth_runtime.command_options import DEFAULT_MODEL, AsJson, Device, Model, Provider, SelfTest
from admth_runtime.console import note, print_json, progress, say, warn
from admth_runtime.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from admth_runtime.corpus import CorpusSummary
    from admth_runtime.encoding import UnreadableImage

__all__ = ["EncodeCommand", "encode"]

_MOST_LISTED = 20
_FILE_BATCH = 32
# What follows --ray is its value only when it looks like an address; else it is a source.
_ADDRESS = re.compile(r"auto|local|ray://\S+|[\w.-]+:\d+|\[[0-9a-f:]+\]:\d+", re.IGNORECASE)
_FOR_CORPORA = "is for a corpus: give --out the name of a folder, without an ending"


class EncodeCommand(TyperCommand):
    """The command's parser: ``--ray`` may stand alone, which means ``--ray auto``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Complete a bare ``--ray``; see :class:`click.Command`."""
        completed = []
        for index, argument in enumerate(args):
            completed.append(argument)
            following = args[index + 1] if index + 1 < len(args) else ""
            if argument == "--ray" and not _ADDRESS.fullmatch(following):
                completed.append("auto")
        return super().parse_args(ctx, completed)


def encode(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Images and folders of them. For a corpus also lists of paths (.txt), globs in quotes, "
            "tars (WebDataset), Parquet files.",
        ),
    ],
    model: Model = DEFAULT_MODEL,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The file to write, .parquet or .npz, or the folder of a corpus.")
    ] = Path("codes.npz"),
    logits: Annotated[bool, typer.Option("--logits", help="Keep the logits of every length too.")] = False,
    batch: Annotated[
        int | None,
        typer.Option(help="Images in one inference call.  [default: 32; for a corpus on a CPU what its caches hold]"),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads of one inference call.  [default: cores, shared by workers]"),
    ] = None,
    device: Device = "auto",
    provider: Provider = None,
    self_test: SelfTest = False,
    max_error_rate: Annotated[
        float, typer.Option(help="Share of unreadable images, 0 to 1, above which the command fails.")
    ] = 0.01,
    recursive: Annotated[
        bool, typer.Option("--recursive/--no-recursive", help="Search folders within folders.")
    ] = True,
    workers: Annotated[
        int | None, typer.Option(help="Corpus: processes, or actors on Ray.  [default: one a core, one on a GPU]")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Corpus: run on Ray, on the cluster at ADDRESS or the one that Ray finds; 'local' starts one.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--restart", help="Corpus: go on with the one in the folder, or begin it anew.")
    ] = True,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Corpus: encode parts with unreadable images again.")
    ] = False,
    shard_size: Annotated[
        int | None, typer.Option(help="Corpus: images in a part.  [default: 10,000, or what the corpus has]")
    ] = None,
    column: Annotated[str, typer.Option(help="Corpus: the column of Parquet sources with images.")] = "image",
    as_json: AsJson = False,
) -> None:
    """Encode images to codes of every length: into one file, or into a folder that can be gone on with."""
    if _names_a_folder(out):
        from admth_runtime.corpus.options import CorpusOptions

        options = CorpusOptions(
            shard_size=shard_size,
            batch=batch,
            logits=logits,
            column=column,
            recursive=recursive,
            workers=workers,
            threads=threads,
            ray=ray,
            device=device,
            provider=provider,
            self_test=self_test,
            max_error_rate=max_error_rate,
            restart=not resume,
            retry_errors=retry_errors,
        )
        _encode_corpus(sources, model, out, options, as_json)
        return
    for name, given in (
        ("--workers", workers is not None),
        ("--ray", ray is not None),
        ("--restart", not resume),
        ("--retry-errors", retry_errors),
        ("--shard-size", shard_size is not None),
        ("--column", column != "image"),
    ):
        if given:
            raise InputError(f"{name} {_FOR_CORPORA}; {out} is one file")
    _encode_file(
        sources,
        model,
        out,
        keep_logits=logits,
        max_error_rate=max_error_rate,
        recursive=recursive,
        as_json=as_json,
        runtime={
            "device": device,
            "provider": provider,
            "threads": threads,
            "batch_size": _FILE_BATCH if batch is None else batch,
            "self_test": self_test,
        },
    )


def _names_a_folder(out: Path) -> bool:
    suffix = out.suffix.lower()
    if suffix in (".parquet", ".npz"):
        return False
    if suffix and not out.is_dir():
        raise InputError(
            f"{out}: encoded images are kept as .parquet or .npz: give the file one of these endings, or name a "
            "folder, without an ending, for a corpus"
        )
    return True


def _encode_corpus(sources: list[str], model: Path, out: Path, options: Any, as_json: bool) -> None:
    from admth_runtime.corpus import encode_corpus
    from admth_runtime.encoding import TooManyUnreadableError

    def notify(line: str) -> None:
        if line.startswith("warning: "):
            warn(line.removeprefix("warning: "))
        else:
            note(line)

    try:
        summary = encode_corpus(sources, model, out, options, progress=partial(progress, unit="images"), notify=notify)
    except TooManyUnreadableError as error:
        _list_unreadable(error.unreadable, most=_MOST_LISTED)
        raise
    if as_json:
        print_json({**asdict(summary), "code_lengths": list(summary.code_lengths)})
    else:
        _say_summary(summary, model)


def _say_summary(summary: CorpusSummary, model: Path) -> None:
    read = summary.images - summary.errors
    parts = f"{summary.parts:,} part{'' if summary.parts == 1 else 's'}"
    did = "all was encoded already"
    if summary.images_encoded:
        did = f"{summary.images_encoded:,} encoded now, {summary.images_per_second:,.0f} images/s"
    say(
        f"wrote {summary.folder}: {_count(read)} in {parts}, codes of {_bits(summary.code_lengths)}, "
        f"{_size(summary.image_bytes)} of images to {_size(summary.part_bytes)}; {did}"
    )
    if summary.errors:
        say(f"wrote {summary.folder}/errors.parquet: {_count(summary.errors)} could not be read")
    say(f"next:  admth-run search QUERY.jpg --index {summary.folder} --model {model}")


def _encode_file(
    paths: list[str],
    model: Path,
    out: Path,
    *,
    keep_logits: bool,
    max_error_rate: float,
    recursive: bool,
    as_json: bool,
    runtime: dict[str, Any],
) -> None:
    from admth_runtime.codes_file import check_codes_path, write_codes
    from admth_runtime.encoding import TooManyUnreadableError, encode_files, list_images
    from admth_runtime.files import check_target, write_json
    from admth_runtime.runtime import HashRuntime

    check_codes_path(out)
    check_target(out)
    errors_file = out.with_name(f"{out.name}.errors.json")
    start = time.perf_counter()
    uris = list_images([str(Path(path)) for path in paths], recursive=recursive)
    with HashRuntime(model, **runtime) as opened:
        try:
            with progress("encoding", len(uris), unit="images") as advance:
                encoded, unreadable = encode_files(
                    opened, uris, keep_logits=keep_logits, max_error_rate=max_error_rate, advance=advance
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
                "logits": keep_logits,
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


def _list_unreadable(unreadable: Sequence[UnreadableImage], most: int) -> None:
    for image in unreadable[:most]:
        note(f"unreadable: {image.path}: {image.reason}")
    if len(unreadable) > most:
        note(f"unreadable: and {len(unreadable) - most:,} more")


def _count(images: int) -> str:
    return f"{images:,} image{'' if images == 1 else 's'}"


def _bits(lengths: tuple[int, ...]) -> str:
    *first, last = [str(length) for length in lengths]
    return f"{', '.join(first)} and {last} bits" if first else f"{last} bits"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
