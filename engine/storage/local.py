"""Read files of this machine and of file systems mounted on it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from engine.core.records import Status
from engine.storage.errors import ReadError


def read(path: str, admit: Callable[[int], None]) -> bytes:
    try:
        descriptor, info = open_file(path)
        try:
            admit(info.st_size)
            return _read_all(descriptor, info.st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise to_read_error(error) from None


def open_file(path: str) -> tuple[int, os.stat_result]:
    """Open a file; return the descriptor and its status.

    Raises OSError, and ReadError if it is not a regular file.
    """
    try:
        # O_NONBLOCK: opening a FIFO without a writer must not hang
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError:
        raise ReadError(Status.UNREADABLE, "the path contains a NUL character") from None
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        os.close(descriptor)
        raise ReadError(Status.UNREADABLE, f"it is a {_kind(info.st_mode)}, not a file")
    return descriptor, info


def exists(path: str) -> bool:
    return os.path.exists(path)


def to_read_error(error: OSError) -> ReadError:
    missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
    return ReadError(Status.MISSING if missing else Status.UNREADABLE, error.strerror or "read error")


def _read_all(descriptor: int, size: int) -> bytes:
    """Read `size` bytes, or fewer if the file has become shorter."""
    data = os.read(descriptor, size)
    if len(data) == size:
        return data
    chunks = [data]
    size -= len(data)
    while size > 0 and data:
        data = os.read(descriptor, size)
        chunks.append(data)
        size -= len(data)
    return b"".join(chunks)


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")
