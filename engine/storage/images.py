"""Read an image by its path in the manifest, wherever it is stored.

There is one module per kind of storage: `local.py`, `archive.py` for members of archives, and `remote.py` for
URLs, which is imported when the first URL is read.
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
    """The files that a manifest names; relative paths start at `root`. Any thread may read."""

    def __init__(self, root: Path | Url) -> None:
        self.root = str(root)
        self._base = root if isinstance(root, Url) else None

    def any_remote(self, paths: Iterable[str | None]) -> bool:
        """Return whether one of the paths is not local."""
        return self._base is not None or any(path and "://" in path for path in paths)

    def read(
        self, path: str | None, admit: Callable[[int], None], alive: Callable[[], None] = lambda: None
    ) -> bytes:
        """Read one file. `admit` gets the size before the file is read and may wait, or raise ReadError.

        If a server sends no length, `admit` is called again for each chunk. `alive` is called from time to
        time while an archive is indexed. Raises ReadError with the status of the row.
        """
        if not path:
            raise ReadError(Status.MISSING, "the row has no path")
        location = self._resolve(path)
        if "::" in path:
            from engine.storage import archive

            return archive.read(_location_text(location), admit, alive)
        if isinstance(location, Url):
            from engine.storage import remote

            return remote.read(location, admit)
        return local.read(location, admit)

    def exists(self, path: str) -> bool:
        """Return whether the file, or the archive that contains it, exists and can be reached."""
        location = self._resolve(path)
        if "::" in path:
            from engine.storage import archive

            return archive.exists(_location_text(location))
        if isinstance(location, Url):
            from engine.storage import remote

            return remote.exists(location)
        return local.exists(location)

    def storage_error(self, path: str, *, retry: bool) -> ReadError | None:
        """Return why the storage of `path` cannot be read at all; None if it answers."""
        try:
            location = self._resolve(path)
        except ReadError:
            return None
        if isinstance(location, Url):
            from engine.storage import remote

            return remote.probe_location(location, retry=retry)
        return None if os.path.exists(self.root) else ReadError(Status.MISSING, "the folder has disappeared")

    def where(self, path: str) -> str:
        """Return the location of `path` for messages: the root, or the bucket or host of a URL."""
        try:
            location = self._resolve(path)
        except ReadError:
            return self.root
        return f"{location.scheme}://{location.host}" if isinstance(location, Url) else self.root

    def _resolve(self, path: str) -> str | Url:
        if self._base is None and "://" not in path:
            return os.path.join(self.root, path)
        if not is_url(path):
            return self._base / path if self._base and path[0] != "/" else os.path.join(self.root, path)
        try:
            location = parse(path)
        except SchemeError as error:
            raise ReadError(Status.UNSUPPORTED, str(error)) from None
        except ValueError as error:
            raise ReadError(Status.UNREADABLE, str(error)) from None
        return location if isinstance(location, Url) else str(location)


def _location_text(location: str | Url) -> str:
    return location.with_query if isinstance(location, Url) else location
