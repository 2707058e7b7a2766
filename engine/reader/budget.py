"""Bound the bytes of files that are read ahead."""

from __future__ import annotations

import threading

from engine.reader.requests import ReadRequest


class ByteBudget:
    """The bytes that may be in memory at once. The request that the consumer waits for is always admitted."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._closed = limit, 0, False
        self._first: ReadRequest | None = None
        self._changed = threading.Condition()

    def acquire(self, size: int, request: ReadRequest) -> None:
        with self._changed:
            while self._used + size > self._limit and request is not self._first and not self._closed:
                self._changed.wait()
            self._used += size

    def release(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def set_first(self, request: ReadRequest) -> None:
        with self._changed:
            self._first = request
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
