"""Where images live: a path of the manifest to the bytes of one file.

One module per kind of place, each with `read(path, admit)` and `exists(path)`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from engine.records import Status
from engine.storage import local
from engine.storage.common import ReadError

__all__ = ["ReadError", "Storage"]


class Storage:
    """The files that a manifest's paths name; relative ones start at `root`. Any thread may read."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)

    def read(self, path: str | None, admit: Callable[[int], None]) -> bytes:
        """The bytes of one file. `admit` gets their number beforehand and may wait, or raise ReadError.

        Raises ReadError, whose status says what became of the row.
        """
        if not path:
            raise ReadError(Status.MISSING, "the row has no path")
        return local.read(os.path.join(self.root, path), admit)

    def exists(self, path: str) -> bool:
        """Whether the place answers and has the file."""
        return local.exists(os.path.join(self.root, path))
