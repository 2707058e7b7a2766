"""Where images live: a path of the manifest to the bytes of one file.

One module per kind of place, each with `read(path, admit)` and `exists(path)`; imported when first needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from engine.errors import EngineError
from engine.records import Status
from engine.storage import local
from engine.storage.common import Place, ReadError, Url, local_path, place

__all__ = ["Place", "ReadError", "Storage", "Url", "place"]


class Storage:
    """The files that a manifest's paths name; relative ones start at `root`. Any thread may read."""

    def __init__(self, root: Place) -> None:
        self.root = root
        self._folder = str(root)

    def read(self, path: str | None, admit: Callable[[int], None]) -> bytes:
        """The bytes of one file. `admit` gets their number beforehand, where it is not known in pieces.

        It may wait, or raise ReadError.

        Raises ReadError, whose status says what became of the row.
        """
        if not path:
            raise ReadError(Status.MISSING, "the row has no path")
        if "::" in path:
            from engine.storage import archive

            if inside := archive.split(path):
                return archive.read(self._resolved(inside[0]), inside[1], admit)
        found = self._resolved(path)
        if isinstance(found, Url):
            from engine.storage import remote

            return remote.read(found, admit)
        return local.read(found, admit)

    def exists(self, path: str) -> bool:
        """Whether the place answers and has the file, or the archive that it is in."""
        found = self._resolved(self._file_of(path))
        if isinstance(found, Url):
            from engine.storage import remote

            return remote.exists(found)
        return local.exists(found)

    @staticmethod
    def _file_of(path: str) -> str:
        if "::" in path:
            from engine.storage import archive

            return (archive.split(path) or (path,))[0]
        return path

    def check(self, path: str | None) -> None:
        """Raises EngineError when the bucket, host or folder that `path` is in can't be had at all."""
        try:
            found = self._resolved(self._file_of(path)) if path else self.root
        except ReadError:  # no place at all
            return
        if isinstance(found, Url):
            from engine.storage import remote

            if not remote.reachable(found):
                raise EngineError(
                    f"{found.top.shown} does not answer, is not there or refuses the credentials; the same "
                    "command goes on when it can be reached"
                )
        elif not isinstance(self.root, Url) and not local.exists(self._folder):
            raise EngineError(f"the images have disappeared: {self._folder} is not there any more")

    def _resolved(self, path: str) -> str | Url:
        if "://" in path:
            try:
                found = place(path)
                return found if isinstance(found, Url) else local_path(path)
            except ValueError as error:
                raise ReadError(Status.UNREADABLE, str(error)) from None
        if isinstance(self.root, Url):
            return path if path.startswith("/") else self.root / path
        return os.path.join(self._folder, path)
