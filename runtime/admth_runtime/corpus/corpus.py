"""Reading a corpus: what it is, and its codes part by part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from admth_runtime.codes_file import EncodedImages, read_codes
from admth_runtime.corpus.layout import CORPUS_FILE, SUMMARY_FILE, part_path
from admth_runtime.corpus.parquet_images import open_parquet
from admth_runtime.corpus.parts import OK, PartFacts, part_facts, part_schema
from admth_runtime.corpus.plan import CorpusPlan, read_plan
from admth_runtime.errors import InputError, require
from admth_runtime.results import HashCodes

__all__ = ["Corpus", "read_corpus"]


@dataclass(frozen=True)
class Corpus:
    """A corpus on disk; its codes are read when they are asked for.

    Attributes:
        folder: where it is.
        plan: what it is: images, listing, model, preprocessing, code lengths, and the working folder that relative
            uris are relative to.
        parts_facts: what each whole part says of itself, in order.
        complete: every image has its row, and the rate of unreadable ones was accepted.
    """

    folder: Path
    plan: CorpusPlan
    parts_facts: tuple[PartFacts, ...]
    complete: bool

    @property
    def model_sha256(self) -> str:
        """SHA-256 of the model file."""
        return self.plan.model_sha256

    @property
    def code_lengths(self) -> tuple[int, ...]:
        """The code lengths in bits, increasing."""
        return self.plan.code_lengths

    @property
    def paths(self) -> tuple[Path, ...]:
        """The part files, in order."""
        return tuple(part_path(self.folder, facts.shard) for facts in self.parts_facts)

    def __len__(self) -> int:
        """How many images have codes in the parts that are there."""
        return sum(facts.images - facts.errors for facts in self.parts_facts)

    def parts(self) -> Iterator[EncodedImages]:
        """Yield the readable images of each part that has any, with ascending ids.

        Raises:
            InputError: a part is damaged, or of another schema.
        """
        for path, facts in zip(self.paths, self.parts_facts, strict=True):
            if facts.images > facts.errors:
                yield read_codes(path)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[Any]:
        """Yield the readable images of each part as a ``pyarrow.Table``, for those who need no arrays.

        Args:
            columns: names of columns; all by default.

        Raises:
            InputError: a part is damaged, or of another schema.
        """
        import pyarrow.compute as pc

        wanted = part_schema(self.plan)
        for path in self.paths:
            try:
                with open_parquet(path) as file:
                    if not file.schema_arrow.equals(wanted):
                        raise InputError(f"{path} has another schema than its corpus: encode the corpus again")
                    names = list(columns) if columns is not None else wanted.names
                    table = file.read(columns=[*dict.fromkeys([*names, "status"])])
            except InputError:
                raise
            except Exception as error:  # Arrow's own errors
                raise InputError(f"{path} is damaged ({str(error).splitlines()[0]}): run the encoding again") from error
            yield table.filter(pc.equal(table["status"], OK)).select(names)

    def encoded(self) -> EncodedImages:
        """Return all readable images at once.

        Raises:
            InputError: a part is damaged, or no image is readable.
        """
        found = list(self.parts())
        if not found:
            raise InputError(f"{self.folder} holds no codes: encode its images first")
        return EncodedImages(
            ids=np.concatenate([part.ids for part in found]),
            uris=tuple(uri for part in found for uri in part.uris),
            codes=HashCodes.concatenate([part.codes for part in found]),
            model_sha256=self.plan.model_sha256,
            preprocessing_sha256=self.plan.preprocessing.digest(),
            created_by=self.plan.created_by,
        )


def read_corpus(folder: str | Path, *, model_sha256: str | None = None, allow_incomplete: bool = False) -> Corpus:
    """Open a corpus and check that its parts belong together; no code is read yet.

    Args:
        folder: a folder made by ``admth-run encode``.
        model_sha256: the model that must have made the codes, or None for any.
        allow_incomplete: accept a corpus that is still being encoded, with the parts that are there.

    Raises:
        InputError: it is no corpus, another model made it, it is not finished, or a part is damaged or of another one.
        MissingExtraError: pyarrow is not installed.
    """
    require("pyarrow.parquet", extra="parquet", purpose="a corpus")
    place = Path(folder)
    plan = read_plan(place)
    if model_sha256 is not None and plan.model_sha256 != model_sha256:
        raise InputError(
            f"{place} holds codes of another model (SHA-256 {plan.model_sha256[:12]}..., not {model_sha256[:12]}...): "
            "encode the images again with this model"
        )
    found = []
    for shard in range(plan.shards):
        facts = part_facts(place, shard)
        if facts is not None and (facts.corpus, facts.shard, facts.images) != (
            plan.identity,
            shard,
            len(plan.span(shard)),
        ):
            raise InputError(f"{part_path(place, shard)} belongs to another corpus than {place / CORPUS_FILE}")
        if facts is not None:
            found.append(facts)
        elif part_path(place, shard).exists():
            raise InputError(f"{part_path(place, shard)} is damaged: run the same encoding again, which mends it")
    complete = len(found) == plan.shards and (place / SUMMARY_FILE).exists()
    if not complete and not allow_incomplete:
        raise InputError(
            f"{place} is not finished, {len(found):,} of {plan.shards:,} parts are there: run the same  admth-run "
            "encode  again, which goes on"
        )
    return Corpus(place, plan, tuple(found), complete)
