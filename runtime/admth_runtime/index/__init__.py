"""Search over several code lengths: exact, coarse to fine, filtered, reranked, in memory or mapped from disk.

::

    from admth_runtime.index import HashIndex, build_index

    index = build_index(["corpus/"], "photos.index")
    hits = index.search(runtime.encode("query.jpg"), 10, mode="coarse", rerank="asymmetric")

docs/search.md describes it. Names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from admth_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from admth_runtime.index.building import add_sources, build_index, read_sources
    from admth_runtime.index.hash_index import HashIndex
    from admth_runtime.index.hits import SearchHits
    from admth_runtime.index.query import MODES
    from admth_runtime.index.rerank import RERANKS
    from admth_runtime.index.storage import describe_index, is_index, verify_files

__all__ = [
    "MODES",
    "RERANKS",
    "HashIndex",
    "SearchHits",
    "add_sources",
    "build_index",
    "describe_index",
    "is_index",
    "read_sources",
    "verify_files",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "building": ("add_sources", "build_index", "read_sources"),
        "hash_index": ("HashIndex",),
        "hits": ("SearchHits",),
        "query": ("MODES",),
        "rerank": ("RERANKS",),
        "storage": ("describe_index", "is_index", "verify_files"),
    },
)
