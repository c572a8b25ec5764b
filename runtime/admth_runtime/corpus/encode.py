"""Encoding a corpus from its sources to its summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from admth_runtime.corpus.beginning import Progress, begin_or_go_on, no_progress
from admth_runtime.corpus.ending import engines_of, totals_of, write_errors
from admth_runtime.corpus.layout import CORPUS_FILE, LOCK_FILE, SUMMARY_FILE, remove_leftovers, sync_folder
from admth_runtime.corpus.lock import locked
from admth_runtime.corpus.options import CorpusOptions, default_batch
from admth_runtime.corpus.parts import PartFacts, part_facts
from admth_runtime.corpus.plan import CorpusPlan
from admth_runtime.corpus.scheduling import ErrorLimit, WorkerPool, run_shards
from admth_runtime.corpus.shard_encoder import ShardStats, WorkerConfig
from admth_runtime.corpus.sources import recognise
from admth_runtime.cpu import usable_cores
from admth_runtime.encoding import TooManyUnreadableError
from admth_runtime.engine import EngineOptions
from admth_runtime.engine_file import read_engine_file
from admth_runtime.engine_kind import is_engine
from admth_runtime.errors import InputError, require
from admth_runtime.files import make_folder, write_json
from admth_runtime.model import read_model
from admth_runtime.runtime import HashRuntime

__all__ = ["CorpusSummary", "encode_corpus"]


@dataclass(frozen=True)
class CorpusSummary:
    """A corpus that is finished, as ``summary.json`` keeps it.

    Attributes:
        folder: the corpus.
        images: images of the listing.
        errors: those that could not be read.
        parts: files of codes.
        image_bytes: bytes of the images.
        part_bytes: bytes of the parts.
        worker_seconds: seconds of all workers together, over all runs.
        code_lengths: bits of each code.
        logits: logits were kept.
        model_sha256: SHA-256 of the model file.
        listing_sha256: digest of the listing.
        runner: ``"local"`` or ``"ray"``, of the last run that encoded something.
        workers: workers of that run.
        images_encoded: images that the last run encoded; the rest was there.
        seconds: what it took, listing included.
        images_per_second: images that it encoded through the seconds that it encoded.
    """

    folder: str
    images: int
    errors: int
    parts: int
    image_bytes: int
    part_bytes: int
    worker_seconds: float
    code_lengths: tuple[int, ...]
    logits: bool
    model_sha256: str
    listing_sha256: str
    runner: str
    workers: int
    images_encoded: int
    seconds: float
    images_per_second: float


def encode_corpus(
    sources: Sequence[str | Path],
    model: str | Path,
    folder: str | Path,
    options: CorpusOptions | None = None,
    *,
    progress: Progress = no_progress,
    notify: Callable[[str], None] = lambda line: None,
) -> CorpusSummary:
    """Encode the images of folders, lists, globs, tars and Parquet files into a corpus, or go on with one.

    Args:
        sources: where the images are; see docs/corpus.md.
        model: an ONNX model, or a TensorRT engine with its sidecar.
        folder: the corpus's folder, made when it is not there. One that was begun the same way is gone on with.
        options: how.
        progress: makes progress bars.
        notify: called with lines about the work.

    Returns:
        The totals, once every image has a row in a part.

    Raises:
        InputError: a source is missing, damaged, changed or holds no image, or the folder's corpus is another one.
        ModelError: the model is missing or broken.
        TooManyUnreadableError: more images are unreadable than ``max_error_rate`` allows; whole parts stay.
        WorkerLostError: three workers died on one shard; whole parts stay.
        OutputError: the folder cannot be written, holds something else, or another run writes in it.
        MissingExtraError: pyarrow, the engine, or Ray is not installed.
    """
    start = time.perf_counter()
    options = options or CorpusOptions()
    EngineOptions(device=options.device, provider=options.provider)  # checks both
    require("pyarrow.parquet", extra="parquet", purpose="a corpus")
    if not sources:
        raise InputError("no sources were given: pass at least one folder, list, glob, tar, Parquet file or image")
    recognised = [recognise(str(source)) for source in sources]
    described = read_engine_file(model) if is_engine(model) else read_model(model)
    if options.self_test and options.ray is None:
        # Every worker tests its own; this one is before anything is written.
        with HashRuntime(model, device=options.device, provider=options.provider, self_test=True):
            pass
    with _opened(Path(folder)) as place:
        gpu, shape = _on_gpu(Path(model), options), described.manifest.preprocessing.shape
        batch = default_batch(*shape[:2], gpu=gpu)
        plan = begin_or_go_on(place, recognised, described, options, batch=batch, progress=progress)
        run = _Run(place, Path(model), plan, options, notify, gpu=gpu)
        run.encode(progress)
        return run.end(start)


class _Run:
    """One run over the shards that are missing."""

    def __init__(
        self,
        folder: Path,
        model: Path,
        plan: CorpusPlan,
        options: CorpusOptions,
        notify: Callable[[str], None],
        *,
        gpu: bool,
    ) -> None:
        self._folder, self._model, self._gpu = folder, model, gpu
        self._plan, self._options, self._notify = plan, options, notify
        found = {shard: part_facts(folder, shard) for shard in range(plan.shards)}
        # Rows of unreadable images in a part that is whole: where a shard is missing here, its part is to be made.
        self._errors = {
            shard: facts.errors for shard, facts in found.items() if facts is not None and self._keeps(facts)
        }
        self._missing = [shard for shard in range(plan.shards) if shard not in self._errors]
        self._engines = engines_of(folder, self._errors) if self._missing else set()
        self._encoded = 0
        self._seconds = 0.0
        self._workers = 0

    def encode(self, progress: Progress) -> None:
        """Encode what is missing; see :func:`run_shards` for what it raises."""
        covered = sum(len(self._plan.span(shard)) for shard in self._errors)
        limit = ErrorLimit(self._plan.images, self._options.max_error_rate, sum(self._errors.values()))
        if self._missing:
            (self._folder / SUMMARY_FILE).unlink(missing_ok=True)
            if covered:
                self._notify(f"going on: {covered:,} of {self._plan.images:,} images are encoded already")
            begin = time.perf_counter()
            try:
                limit.check(0, covered)
                with closing(self._pool()) as pool, progress("encoding", self._plan.images - covered) as advance:
                    run_shards(
                        pool,
                        self._plan,
                        self._missing,
                        workers=self._workers,
                        limit=limit,
                        covered=covered,
                        advance=advance,
                        finished=self._finish,
                    )
            except KeyboardInterrupt:
                self._notify(f"{self._state()}; the same command goes on from there")
                raise
            except TooManyUnreadableError:
                self._write_errors()
                raise
            self._seconds = time.perf_counter() - begin
        self._write_errors()
        limit.check_whole()

    def end(self, start: float) -> CorpusSummary:
        """Write ``summary.json`` and return it."""
        plan = self._plan
        summary = CorpusSummary(
            folder=str(self._folder),
            images=plan.images,
            errors=sum(self._errors.values()),
            parts=plan.shards,
            **asdict(totals_of(self._folder, range(plan.shards))),
            code_lengths=plan.code_lengths,
            logits=plan.logits,
            model_sha256=plan.model_sha256,
            listing_sha256=plan.listing_sha256,
            runner="local" if self._options.ray is None else "ray",
            workers=self._workers,
            images_encoded=self._encoded,
            seconds=round(time.perf_counter() - start, 3),
            images_per_second=round(self._encoded / self._seconds, 1) if self._seconds else 0.0,
        )
        if self._missing or not (self._folder / SUMMARY_FILE).exists():
            write_json(self._folder / SUMMARY_FILE, {**asdict(summary), "code_lengths": list(plan.code_lengths)})
            sync_folder(self._folder)
        return summary

    def _keeps(self, facts: PartFacts) -> bool:
        return facts.corpus == self._plan.identity and not (self._options.retry_errors and facts.errors)

    def _pool(self) -> WorkerPool:
        options, shards = self._options, len(self._missing)
        if options.ray is not None:
            from admth_runtime.corpus.ray_workers import RayWorkers

            threads = options.threads or 1
            pool = RayWorkers(self._config(threads, decoders=threads), address=options.ray, gpu=self._gpu)
            self._workers = min(options.workers or pool.room, shards)
            return pool
        from admth_runtime.corpus.local_workers import LocalWorkers

        cores = usable_cores()
        self._workers = min(options.workers or (1 if self._gpu else cores), shards)
        share = max(1, cores // self._workers)
        return LocalWorkers(self._config(options.threads or share, decoders=share))

    def _config(self, threads: int, decoders: int) -> WorkerConfig:
        return WorkerConfig(
            folder=str(self._folder.absolute()),
            model=str(self._model.absolute()),
            device=self._options.device,
            provider=self._options.provider,
            threads=threads,
            decoders=decoders,
            believe_unopened=self._options.max_error_rate == 1.0,
            self_test=self._options.self_test,
        )

    def _finish(self, stats: ShardStats) -> None:
        self._errors[stats.shard] = stats.errors
        self._encoded += stats.images
        if self._engines and stats.engine not in self._engines:
            known = ", ".join(sorted(self._engines))
            self._notify(f"warning: parts made before ran on {known}, now {stats.engine} runs: few bits may differ")
        self._engines.add(stats.engine)

    def _write_errors(self) -> None:
        write_errors(self._folder, self._plan, sorted(shard for shard, errors in self._errors.items() if errors))

    def _state(self) -> str:
        whole = sum(1 for _ in self._folder.glob("part-*.parquet"))  # with those of which no worker could tell yet
        return f"{whole:,} of {self._plan.shards:,} parts in {self._folder} are whole"


@contextmanager
def _opened(folder: Path) -> Iterator[Path]:
    """Make a corpus's folder, hold its lock, and leave no trace of a corpus that was not begun."""
    made, known = not folder.exists(), (folder / LOCK_FILE).exists()
    make_folder(folder)
    with locked(folder):
        remove_leftovers(folder)
        try:
            yield folder
        finally:
            with suppress(OSError):
                remove_leftovers(folder)
            if not known and not (folder / CORPUS_FILE).exists():
                with suppress(OSError):
                    (folder / LOCK_FILE).unlink()
                    if made:
                        folder.rmdir()


def _on_gpu(model: Path, options: CorpusOptions) -> bool:
    """Tell whether workers will need a GPU each."""
    if is_engine(model) or options.device.startswith("cuda") or options.provider not in (None, "cpu"):
        return True
    if options.device == "cpu" or options.provider == "cpu":
        return False
    ort = require("onnxruntime", extra="cpu", purpose="running a model")
    return "CUDAExecutionProvider" in ort.get_available_providers()
