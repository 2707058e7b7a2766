"""Lock files between processes, on one machine or on a shared file system, until the process ends."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid


def lock_file(path: Path, *, shared: bool = False) -> int:
    """Lock the file `path`, created if absent, until the returned descriptor is closed.

    A `shared` lock excludes only exclusive ones. Raises BlockingIOError while another process excludes this
    one, and another OSError if the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            if _is_same_file(path, descriptor):
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the last holder has just deleted the file


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


class NumberedLocks:
    """Locks numbered from 0, each a byte of one file, so that no lock file has to be deleted.

    They belong to this object (open file description locks), not to the process.
    """

    def __init__(self, path: Path) -> None:
        """Open the file. Raises OSError if the file system has no such locks."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.is_locked(0)
        except OSError:
            os.close(self._file)
            raise

    def acquire(self, number: int) -> bool:
        """Acquire a lock; return False while another process holds it."""
        try:
            self._fcntl(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, number)
        except BlockingIOError:
            return False
        return True

    def release(self, number: int) -> None:
        self._fcntl(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, number)

    def is_locked(self, number: int) -> bool:
        """Return whether another process holds the lock."""
        kind: int = _FLOCK.unpack(self._fcntl(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, number))[0]
        return kind != fcntl.F_UNLCK

    def close(self) -> None:
        os.close(self._file)

    def _fcntl(self, command: int, kind: int, number: int) -> bytes:
        return fcntl.fcntl(self._file, command, _FLOCK.pack(kind, os.SEEK_SET, number, 1, 0))
