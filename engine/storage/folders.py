"""The folder that results are written to: on this machine, or in an object store.

Files appear whole or not at all.
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

LOCK_FILE = ".lock"  # names of all that locks a folder begin with it
T = TypeVar("T")


class StoreError(OSError):
    """An object store fails, for good or for longer than is waited."""

    def __init__(self, error: ReadError, place: Url) -> None:
        code = errno.ENOENT if error.status == Status.MISSING else errno.EIO
        super().__init__(code, str(error), str(place))


def error_text(error: OSError) -> str:
    """Describe an error in one line, without the location."""
    if isinstance(error, StoreError) or not error.errno:
        return " ".join(str(error.strerror or error).split())[:200]
    return os.strerror(error.errno)


class Folder(Protocol):
    """The folder of a run's files. Names contain no folders; all but `location` may raise OSError."""

    @property
    def location(self) -> Path | Url: ...

    def names(self) -> list[str]:
        """Empty when there is no such folder."""
        ...

    def exists(self, name: str) -> bool: ...

    def read(self, name: str, take: Callable[[pa.NativeFile], T]) -> T:
        """Return what `take` makes of a file. Raises FileNotFoundError."""
        ...

    def write(self, name: str, write_to: Callable[[Path], object]) -> None:
        """Make or replace a file by what `write_to` writes to a temporary one."""
        ...

    def delete(self, name: str) -> None:
        """Nothing happens where there is none."""
        ...

    def local(self, name: str) -> Path:
        """Return a path on this machine for a file; `keep` stores what was written there."""
        ...

    def keep(self, name: str) -> None: ...

    def lock(self, *, shared: bool = False) -> None:
        """Make the folder and keep other processes out; if `shared`, only those that do not share it.

        Raises BlockingIOError while one that can't be shared with is in there.
        """
        ...

    def delete_leftovers(self) -> None:
        """Delete what writers that were killed have left, when nobody else writes."""
        ...

    def unlock(self, *, remove_created: bool) -> None: ...

    def acquire_run_lock(self) -> bool:
        """Acquire the run lock of the folder; return False while another process has it."""
        ...

    def release_run_lock(self) -> None: ...

    def claim(self, index: int) -> bool:
        """Take a part in hand among those that share the folder. False while another has it."""
        ...

    def release(self, index: int) -> None: ...

    def is_claimed(self, index: int) -> bool:
        """Return whether another process has claimed this part."""
        ...
