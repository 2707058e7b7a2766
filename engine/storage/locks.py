"""Locks between processes, on one machine or on a shared file system; they end with their process."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

_FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, pid


def lock_file(path: Path, *, shared: bool = False) -> int:
    """Lock the file `path`, made if absent, until the descriptor that this returns is closed.

    Those that hold it `shared` keep out only those that do not. Raises BlockingIOError while it can't be had,
    another OSError where nothing can be locked.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it last has deleted it meanwhile


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


class NumberedLocks:
    """Locks with numbers from 0, each a byte of one file, so that none of them is left behind or deleted.

    They belong to this object (open file description locks), not to the process, and end with it.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError where the file system has no such locks."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.is_locked(0)
        except OSError:
            os.close(self._file)
            raise

    def acquire(self, number: int) -> bool:
        """False while another holds it."""
        try:
            self._ask(fcntl.F_OFD_SETLK, fcntl.F_WRLCK, number)
        except BlockingIOError:
            return False
        return True

    def release(self, number: int) -> None:
        self._ask(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, number)

    def is_locked(self, number: int) -> bool:
        """Return whether another process holds it."""
        kind: int = _FLOCK.unpack(self._ask(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, number))[0]
        return kind != fcntl.F_UNLCK

    def close(self) -> None:
        os.close(self._file)

    def _ask(self, command: int, kind: int, number: int) -> bytes:
        return fcntl.fcntl(self._file, command, _FLOCK.pack(kind, os.SEEK_SET, number, 1, 0))
