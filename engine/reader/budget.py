"""Bound the bytes of files that are read ahead."""

from __future__ import annotations

import threading

from engine.reader.jobs import ReadJob


class ByteBudget:
    """Bytes that may be held at once. The batch that the consumer waits for always passes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._closed = limit, 0, False
        self._first: ReadJob | None = None
        self._changed = threading.Condition()

    def acquire(self, size: int, job: ReadJob) -> None:
        with self._changed:
            while self._used + size > self._limit and job is not self._first and not self._closed:
                self._changed.wait()
            self._used += size

    def release(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def set_first(self, job: ReadJob) -> None:
        with self._changed:
            self._first = job
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
