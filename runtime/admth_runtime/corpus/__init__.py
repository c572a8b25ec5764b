"""Encoding a corpus: a folder of Parquet parts that may be killed and gone on with, on many processes or on Ray.

::

    from admth_runtime.corpus import CorpusOptions, encode_corpus, read_corpus

    encode_corpus(["photos/"], "model.onnx", "corpus/", CorpusOptions(workers=4))
    for part in read_corpus("corpus/").parts():
        part.codes[64]  # uint8 [n, 8]

docs/corpus.md describes the folder and the schema. Names are imported when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from admth_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from admth_runtime.corpus.corpus import Corpus, read_corpus
    from admth_runtime.corpus.encode import CorpusSummary, encode_corpus
    from admth_runtime.corpus.options import CorpusOptions
    from admth_runtime.corpus.scheduling import WorkerLostError

__all__ = ["Corpus", "CorpusOptions", "CorpusSummary", "WorkerLostError", "encode_corpus", "read_corpus"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "corpus": ("Corpus", "read_corpus"),
        "encode": ("CorpusSummary", "encode_corpus"),
        "options": ("CorpusOptions",),
        "scheduling": ("WorkerLostError",),
    },
)
