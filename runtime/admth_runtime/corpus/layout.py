"""The names in a corpus's folder, and writing them so that they survive a power cut."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

__all__ = [
    "CORPUS_FILE",
    "ERRORS_FILE",
    "LISTING_FILE",
    "LOCK_FILE",
    "SUMMARY_FILE",
    "forget_corpus",
    "is_our_name",
    "part_path",
    "remove_leftovers",
    "stats_path",
    "sync_folder",
]

CORPUS_FILE = "corpus.json"
LISTING_FILE = "listing.parquet"
ERRORS_FILE = "errors.parquet"
SUMMARY_FILE = "summary.json"
LOCK_FILE = ".lock"

_PART = r"part-\d{5,}(\.parquet|_stats\.json)"
_OURS = re.compile(rf"({_PART}|corpus\.json|listing\.parquet|errors\.parquet|summary\.json|\.lock)")
# What files.atomic_path calls a file before its rename.
_LEFTOVER = re.compile(r"\.(part-\d{5,}(_stats)?|corpus|listing|errors|summary)\.\w+\.tmp\.(parquet|json)")


def part_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard's codes."""
    return folder / f"part-{shard:05}.parquet"


def stats_path(folder: Path, shard: int) -> Path:
    """Return the path of what a shard took."""
    return folder / f"part-{shard:05}_stats.json"


def is_our_name(name: str) -> bool:
    """Tell whether a file of that name in a corpus's folder was written by us, whole or not."""
    return bool(_OURS.fullmatch(name) or _LEFTOVER.fullmatch(name))


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left. Call it only while the folder's lock is held."""
    for name in os.listdir(folder):  # noqa: PTH208  names are enough, and there may be very many
        if _LEFTOVER.fullmatch(name):
            with suppress(FileNotFoundError):
                (folder / name).unlink()


def forget_corpus(folder: Path) -> None:
    """Remove a corpus, and nothing else that is in its folder; what says that it is there goes first."""
    for name in (SUMMARY_FILE, CORPUS_FILE):
        (folder / name).unlink(missing_ok=True)
    for name in os.listdir(folder):  # noqa: PTH208
        if is_our_name(name) and name != LOCK_FILE:
            (folder / name).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system can."""
    with suppress(OSError):  # Windows opens no folders, and some network file systems sync none
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
