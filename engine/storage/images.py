"""Read an image by its path in the manifest, wherever it is stored.

One module per kind of place: `local.py`; `archive.py` for members of archives; `remote.py` for URLs, which is
imported for the first of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from engine.core.location import SchemeError, Url, is_url, parse
from engine.core.records import Status
from engine.storage import local
from engine.storage.errors import ReadError

__all__ = ["ImageStorage", "ReadError", "Url"]


class ImageStorage:
    """The files that a manifest's paths name; relative ones start at `root`. Any thread may read."""

    def __init__(self, root: Path | Url) -> None:
        self.root = str(root)
        self._base = root if isinstance(root, Url) else None

    def any_remote(self, paths: Iterable[str | None]) -> bool:
        """Return whether one of the paths is not local."""
        return self._base is not None or any(path and "://" in path for path in paths)

    def read(
        self, path: str | None, admit: Callable[[int], None], alive: Callable[[], None] = lambda: None
    ) -> bytes:
        """Read one file. `admit` gets its size beforehand and may wait, or raise ReadError.

        It is called again, with more, where a server doesn't say how many will come. `alive` is called now
        and then while something other than this file takes long: an archive's index.
        Raises ReadError, whose status says what became of the row.
        """
        if not path:
            raise ReadError(Status.MISSING, "the row has no path")
        place = self._place(path)
        if "::" in path:
            from engine.storage import archive

            return archive.read(_location_text(place), admit, alive)
        if isinstance(place, Url):
            from engine.storage import remote

            return remote.read(place, admit)
        return local.read(place, admit)

    def exists(self, path: str) -> bool:
        """Return whether the location answers and has the file, or the archive that contains it."""
        place = self._place(path)
        if "::" in path:
            from engine.storage import archive

            return archive.exists(_location_text(place))
        if isinstance(place, Url):
            from engine.storage import remote

            return remote.exists(place)
        return local.exists(place)

    def trouble(self, path: str, *, patient: bool) -> ReadError | None:
        """Why nothing at all can be read where `path` is; None where the place answers."""
        try:
            place = self._place(path)
        except ReadError:
            return None
        if isinstance(place, Url):
            from engine.storage import remote

            return remote.probe_location(place, patient=patient)
        return None if os.path.exists(self.root) else ReadError(Status.MISSING, "it went away")

    def where(self, path: str) -> str:
        """Return the location of `path` for messages: the root, or the bucket or host of a URL."""
        try:
            place = self._place(path)
        except ReadError:
            return self.root
        return f"{place.scheme}://{place.host}" if isinstance(place, Url) else self.root

    def _place(self, path: str) -> str | Url:
        if self._base is None and "://" not in path:
            return os.path.join(self.root, path)
        if not is_url(path):
            return self._base / path if self._base and path[0] != "/" else os.path.join(self.root, path)
        try:
            place = parse(path)
        except SchemeError as error:
            raise ReadError(Status.UNSUPPORTED, str(error)) from None
        except ValueError as error:
            raise ReadError(Status.UNREADABLE, str(error)) from None
        return place if isinstance(place, Url) else str(place)


def _location_text(place: str | Url) -> str:
    return place.whole if isinstance(place, Url) else place
