"""``corpus.json``: what a corpus is, fixed when it is begun and compared when it is gone on with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from admth_runtime._version import __version__
from admth_runtime.corpus.layout import CORPUS_FILE
from admth_runtime.corpus.sources import Source
from admth_runtime.errors import InputError, ManifestError
from admth_runtime.files import write_json
from admth_runtime.packing import check_code_lengths
from admth_runtime.preprocessing import PreprocessingSpec

__all__ = ["CORPUS_FORMAT_VERSION", "CorpusPlan", "read_plan"]

CORPUS_FORMAT_VERSION = 1
"""Raised when an older reader would read the folder wrongly."""

# Ids stay below 2^53, the largest integers that JSON keeps everywhere: 21 bits say which corpus, 32 which image.
_POSITION_BITS = 32
_CORPUS_BITS = 21


@dataclass(frozen=True)
class CorpusPlan:
    """What defines a corpus to the byte.

    Attributes:
        sources: where the images come from.
        working_folder: the folder that relative paths, and so the ``uri`` of images, are relative to.
        recursive: folders within folders were searched.
        column: the column of Parquet sources.
        images: images of the listing.
        listing_sha256: digest of the listing.
        shard_size: images in a shard.
        batch: images in one inference call.
        logits: logits are kept.
        code_lengths: bits of each code.
        model_sha256: SHA-256 of the model file.
        preprocessing: how images become pixels.
        created_by: the software that began it.
    """

    sources: tuple[Source, ...]
    working_folder: str
    recursive: bool
    column: str
    images: int
    listing_sha256: str
    shard_size: int
    batch: int
    logits: bool
    code_lengths: tuple[int, ...]
    model_sha256: str
    preprocessing: PreprocessingSpec
    created_by: str = field(default=f"admth {__version__}")

    def __post_init__(self) -> None:
        object.__setattr__(self, "code_lengths", check_code_lengths(self.code_lengths))
        if not 1 <= self.images <= 1 << _POSITION_BITS:
            raise InputError(f"{self.images:,} images are not 1 to {1 << _POSITION_BITS:,}: make several corpora")

    @property
    def shards(self) -> int:
        """How many shards, so parts, there are."""
        return -(-self.images // self.shard_size)

    @property
    def identity(self) -> str:
        """Digest of everything that the bytes of the parts depend on, 64 hexadecimal digits."""
        facts = [
            self.listing_sha256,
            self.model_sha256,
            self.preprocessing.digest(),
            list(self.code_lengths),
            self.logits,
            self.shard_size,
            self.batch,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def first_id(self) -> int:
        """The id of the first image; the others follow. It depends on the listing and the model alone."""
        digest = hashlib.sha256(f"{self.listing_sha256} {self.model_sha256}".encode()).digest()
        corpus = int.from_bytes(digest[:8], "big") >> (64 - _CORPUS_BITS)
        return corpus << _POSITION_BITS

    def span(self, shard: int) -> range:
        """Return the positions of a shard's images in the listing."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.images))

    def write(self, folder: Path) -> None:
        """Write ``corpus.json`` by rename.

        Raises:
            OutputError: it cannot be written.
        """
        facts = {
            "format_version": CORPUS_FORMAT_VERSION,
            "corpus": self.identity,
            "images": self.images,
            "shards": self.shards,
            **{each.name: getattr(self, each.name) for each in fields(self)},
            "sources": [asdict(source) for source in self.sources],
            "code_lengths": list(self.code_lengths),
            "preprocessing": self.preprocessing.to_dict(),
            "preprocessing_sha256": self.preprocessing.digest(),
        }
        write_json(folder / CORPUS_FILE, facts)


def read_plan(folder: Path) -> CorpusPlan:
    """Read and check ``corpus.json``.

    Raises:
        InputError: it is missing, damaged, of a newer format version, or was edited.
    """
    path = folder / CORPUS_FILE
    try:
        facts = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        state = "no such folder" if not folder.exists() else f"holds no {CORPUS_FILE}"
        raise InputError(f"{folder}: {state}: pass the folder of a corpus made by  admth-run encode") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error}): encode the corpus again with --restart") from error
    version = facts.get("format_version") if isinstance(facts, dict) else None
    if not isinstance(version, int):
        raise InputError(f"{path} names no format version: encode the corpus again with --restart")
    if version > CORPUS_FORMAT_VERSION:
        raise InputError(
            f"{path}: its format version {version} is newer than {CORPUS_FORMAT_VERSION}, which this admth reads: "
            "run  pip install -U admth"
        )
    try:
        plan = _from_facts(facts)
        if plan.identity != facts["corpus"]:
            raise InputError("its fields do not give its identity: it was edited")
    except (KeyError, TypeError, ValueError, ManifestError) as error:
        reason = f"it lacks {error}" if type(error) is KeyError else str(error)
        raise InputError(f"{path} is unusable ({reason}): encode the corpus again with --restart") from error
    return plan


def _from_facts(facts: Mapping[str, Any]) -> CorpusPlan:
    values = {each.name: facts[each.name] for each in fields(CorpusPlan)}
    for name, kind in (("images", int), ("shard_size", int), ("batch", int), ("logits", bool), ("code_lengths", list)):
        if type(values[name]) is not kind:
            raise InputError(f"{name} is {values[name]!r}")
    values["sources"] = tuple(Source(**source) for source in values["sources"])
    values["code_lengths"] = tuple(values["code_lengths"])
    values["preprocessing"] = PreprocessingSpec.from_dict(values["preprocessing"])
    return CorpusPlan(**values)
