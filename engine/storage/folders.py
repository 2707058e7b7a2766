"""Define the folder that results are written to, on this machine or in an object store.

Files are written atomically.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import pyarrow as pa

from engine.core.location import Url
from engine.core.records import Status
from engine.storage.errors import ReadError

LOCK_FILE = ".lock"  # prefix of the names of all lock files
T = TypeVar("T")


class StoreError(OSError):
    """An object store failed, also after retries."""

    def __init__(self, error: ReadError, location: Url) -> None:
        code = errno.ENOENT if error.status == Status.MISSING else errno.EIO
        super().__init__(code, str(error), str(location))


def error_text(error: OSError) -> str:
    """Describe an error in one line, without the location."""
    if isinstance(error, StoreError) or not error.errno:
        return " ".join(str(error.strerror or error).split())[:200]
    return os.strerror(error.errno)


class Folder(Protocol):
    """The folder of a run's files. Names contain no slash; all methods may raise OSError."""

    @property
    def location(self) -> Path | Url: ...

    def names(self) -> list[str]:
        """Return the names of the files; empty if the folder does not exist."""
        ...

    def exists(self, name: str) -> bool: ...

    def read(self, name: str, parse: Callable[[pa.NativeFile], T]) -> T:
        """Open a file and return `parse(file)`. Raises FileNotFoundError."""
        ...

    def write(self, name: str, write_to: Callable[[Path], object]) -> None:
        """Create or replace a file: `write_to` writes a temporary file, which is then renamed or uploaded."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        ...

    def local(self, name: str) -> Path:
        """Return a path on this machine for a file; `keep` stores what is written there."""
        ...

    def keep(self, name: str) -> None: ...

    def lock(self, *, shared: bool = False) -> None:
        """Create the folder and lock it; a `shared` lock excludes only exclusive ones.

        Raises BlockingIOError while another process holds a lock that excludes this one.
        """
        ...

    def delete_leftovers(self) -> None:
        """Delete the files of killed writers. Call only while no other process writes."""
        ...

    def unlock(self, *, remove_created: bool) -> None: ...

    def acquire_run_lock(self) -> bool:
        """Acquire the run lock of the folder; return False while another process has it."""
        ...

    def release_run_lock(self) -> None: ...

    def claim(self, index: int) -> bool:
        """Claim a part for this process; return False while another process has it."""
        ...

    def release(self, index: int) -> None: ...

    def is_claimed(self, index: int) -> bool:
        """Return whether another process has claimed this part."""
        ...
