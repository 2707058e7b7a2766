"""Write a results folder on a disk and lock it with byte locks."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from engine.storage.atomic import atomic
from engine.storage.folders import LOCK_FILE, T
from engine.storage.locks import NumberedLocks, lock_file

_PART_LOCKS_FILE = ".locks"


class LocalFolder:
    def __init__(self, location: Path) -> None:
        self.location = location
        self._created = False
        self._lock = -1
        self._numbered: NumberedLocks | None = None  # 0: the run lock, from 1: parts; None unless shared
        self._writer_id = f".{uuid.uuid4().hex[:8]}"  # several processes may write one part

    def names(self) -> list[str]:
        try:
            return os.listdir(self.location)
        except FileNotFoundError:
            return []

    def exists(self, name: str) -> bool:
        return (self.location / name).exists()

    def read(self, name: str, parse: Callable[[pa.NativeFile], T]) -> T:
        with pa.OSFile(str(self.location / name), "rb") as file:
            return parse(file)

    def write(self, name: str, write_to: Callable[[Path], object]) -> None:
        with atomic(self.location / name, self._writer_id) as temporary:
            write_to(temporary)

    def delete(self, name: str) -> None:
        (self.location / name).unlink(missing_ok=True)

    def local(self, name: str) -> Path:
        return self.location / name

    def keep(self, name: str) -> None:
        """Do nothing: the file is in the folder already."""

    def lock(self, *, shared: bool = False) -> None:
        self._created = not self.location.exists()
        try:
            self._lock = self._open_lock(shared)
        except FileNotFoundError:  # another process that began no run has just removed the folder
            self._lock = self._open_lock(shared)
        if shared:
            self._numbered = NumberedLocks(self.location / _PART_LOCKS_FILE)
        else:  # shared, other processes may be writing temporary files
            self.delete_leftovers()

    def delete_leftovers(self) -> None:
        for leftover in self.location.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)

    def _open_lock(self, shared: bool) -> int:
        self.location.parent.mkdir(parents=True, exist_ok=True)
        self.location.mkdir(mode=0o700, exist_ok=True)  # rows may name patients
        return lock_file(self.location / LOCK_FILE, shared=shared)

    def unlock(self, *, remove_created: bool) -> None:
        if remove_created and self._is_only_holder():
            self.delete(_PART_LOCKS_FILE)
            self.delete(LOCK_FILE)
            if self._created:
                with suppress(OSError):  # another process added a file, or removed the folder
                    self.location.rmdir()
        if self._numbered:
            self._numbered.close()
        os.close(self._lock)

    def _is_only_holder(self) -> bool:
        if self._numbered:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return False
        return True

    def acquire_run_lock(self) -> bool:
        return self._numbered is None or self._numbered.acquire(0)

    def release_run_lock(self) -> None:
        if self._numbered:
            self._numbered.release(0)

    def claim(self, index: int) -> bool:
        return self._numbered is None or self._numbered.acquire(1 + index)

    def release(self, index: int) -> None:
        if self._numbered:
            self._numbered.release(1 + index)

    def is_claimed(self, index: int) -> bool:
        return self._numbered is not None and self._numbered.is_locked(1 + index)
