"""The local web page of ``admth-run browse``: an image in, its nearest neighbours at every code length side by side.

``files.py`` opens the corpus's images, ``browser.py`` answers questions about index and model, ``server.py`` speaks
HTTP, ``page/`` is what the web browser gets. The standard library serves; nothing is fetched from elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from admth_runtime.lazy import lazy_names

if TYPE_CHECKING:
    from admth_runtime.browse.browser import Browser
    from admth_runtime.browse.files import CorpusFiles
    from admth_runtime.browse.server import BrowseServer

__all__ = ["BrowseServer", "Browser", "CorpusFiles"]

__getattr__, __dir__ = lazy_names(
    __name__, {"browser": ("Browser",), "files": ("CorpusFiles",), "server": ("BrowseServer",)}
)
