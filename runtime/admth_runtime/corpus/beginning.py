"""Beginning a corpus, or going on with the one that is there: never with another model, preprocessing or source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

from admth_runtime.corpus.layout import CORPUS_FILE, LISTING_FILE, forget_corpus, is_our_name, sync_folder
from admth_runtime.corpus.listing import write_listing
from admth_runtime.corpus.options import DEFAULT_SHARD_SIZE, CorpusOptions
from admth_runtime.corpus.plan import CorpusPlan, read_plan
from admth_runtime.corpus.sources import Source, single_line
from admth_runtime.engine_file import EngineFile
from admth_runtime.errors import InputError, OutputError
from admth_runtime.model import ModelFile

__all__ = ["Progress", "begin_or_go_on", "no_progress"]

Progress = Callable[[str, int | None], AbstractContextManager[Callable[[int], None]]]
"""Makes a progress bar: called with what is done and how much of it there is; gives what advances it."""


def no_progress(description: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
    """Show nothing."""
    return nullcontext(lambda steps: None)


def begin_or_go_on(
    folder: Path,
    sources: Sequence[Source],
    model: ModelFile | EngineFile,
    options: CorpusOptions,
    *,
    batch: int,
    progress: Progress = no_progress,
) -> CorpusPlan:
    """Return the plan of the corpus in a folder whose lock is held; list the sources where there is none yet.

    Args:
        folder: the corpus's folder.
        sources: where the images are.
        model: the model.
        options: what was asked for.
        batch: images in one inference call of a new corpus, when nobody said.
        progress: makes progress bars.

    Raises:
        InputError: the corpus there is another one, by model, preprocessing, sources or sizes; the message says which.
        OutputError: the folder holds something else.
    """
    if options.restart:
        forget_corpus(folder)
    if (folder / CORPUS_FILE).exists():
        plan = read_plan(folder)
        if different := [*_differences(plan, sources, model, options)]:
            raise InputError(
                f"{folder} was begun with {' and '.join(different)}: give the same again, choose another --out, or "
                "begin anew with --restart"
            )
        return plan
    if foreign := sorted(path.name for path in folder.iterdir() if not is_our_name(path.name)):
        raise OutputError(
            f"{folder} holds no corpus but {single_line(foreign[0])!r}: choose a new or an empty folder with --out"
        )
    forget_corpus(folder)  # what a killed --restart left
    shard_size = options.shard_size or DEFAULT_SHARD_SIZE
    with progress("listing", None) as advance:
        facts = write_listing(
            folder / LISTING_FILE,
            sources,
            column=options.column,
            recursive=options.recursive,
            shard_size=shard_size,
            advance=advance,
        )
    plan = CorpusPlan(
        sources=tuple(sources),
        working_folder=str(Path.cwd()),
        recursive=options.recursive,
        column=options.column,
        images=facts.images,
        listing_sha256=facts.sha256,
        shard_size=shard_size,
        batch=options.batch or batch,
        logits=options.logits,
        code_lengths=model.manifest.code_lengths,
        model_sha256=model.sha256,
        preprocessing=model.manifest.preprocessing,
    )
    plan.write(folder)
    sync_folder(folder)
    return plan


def _differences(
    plan: CorpusPlan, sources: Sequence[Source], model: ModelFile | EngineFile, options: CorpusOptions
) -> list[str]:
    """Say in words what of a corpus was other than what is asked for now."""
    found = []
    if plan.model_sha256 != model.sha256:
        found.append(f"another model (SHA-256 {plan.model_sha256[:12]}..., not {model.sha256[:12]}...)")
    now = asdict(model.manifest.preprocessing)
    changed = [
        f"{name} {value}, not {now[name]}" for name, value in asdict(plan.preprocessing).items() if value != now[name]
    ]
    if changed:
        found.append(f"another preprocessing ({'; '.join(changed)})")
    found += _other_sources(plan.sources, sources)
    if plan.logits != options.logits:
        found.append("--logits" if plan.logits else "no --logits")
    if plan.recursive != options.recursive:
        found.append("--recursive" if plan.recursive else "--no-recursive")
    if plan.column != options.column:
        found.append(f"--column {plan.column}, not {options.column}")
    for name, before, asked in (
        ("--shard-size", plan.shard_size, options.shard_size),
        ("--batch", plan.batch, options.batch),
    ):
        if asked is not None and asked != before:
            found.append(f"{name} {before}, not {asked}")
    return found


def _other_sources(before: Sequence[Source], now: Sequence[Source]) -> list[str]:
    if [(source.kind, source.place) for source in before] != [(source.kind, source.place) for source in now]:
        names = [", ".join(single_line(source.path) for source in each) for each in (before, now)]
        return [f"another source ({names[0]}, not {names[1]})"]
    return [
        f"another content of the list {single_line(source.path)}"
        for source, other in zip(before, now, strict=True)
        if source.sha256 != other.sha256
    ]
