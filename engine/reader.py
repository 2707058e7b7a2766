"""Rows to encoded bytes: many reads in flight, bounded by bytes; bad rows get their status here."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine import header
from engine.overlap import Meter
from engine.records import Batch, Part, Status
from engine.settings import Limits

# One more batch is read ahead for each of these that reading a batch takes on average: files in the page
# cache need one thread, and more would only fight for the interpreter lock; slow storage gets all of them.
AHEAD_EVERY_S = 0.001


class _ReadError(Exception):
    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Budget:
    """Bytes that may be held at once. The oldest unread batch always passes, so nothing can lock up."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._closed = limit, 0, False
        self._head = 0
        self._changed = threading.Condition()

    def acquire(self, size: int, ticket: int) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._used + size <= self._limit or ticket == self._head or self._closed
            )
            self._used += size

    def release(self, size: int) -> None:
        with self._changed:
            self._used -= size
            self._changed.notify_all()

    def pass_head(self, ticket: int) -> None:
        """Batch `ticket` is read; the next one is the oldest now."""
        with self._changed:
            self._head = ticket + 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class _Latency:
    """Running mean of the time that reading a batch takes."""

    def __init__(self) -> None:
        self.mean_s = 0.0

    def see(self, taken_s: float) -> None:
        self.mean_s += (taken_s - self.mean_s) / 16


@dataclass(frozen=True)
class Reader:
    """Reads the files of parts in batches. `threads` 0 reads in the caller's thread."""

    root: Path
    batch_size: int
    threads: int
    memory: int  # bytes of encoded images held at once, beyond one batch
    max_pixels: int
    max_file_size: int  # bytes

    @classmethod
    def within(cls, limits: Limits, *, root: Path, batch_size: int, threads: int) -> Reader:
        """A reader that keeps to the limits."""
        return cls(root, batch_size, threads, limits.encoded_bytes, limits.max_pixels, limits.max_file_size)

    def stage(self, parts: Iterable[Part], meter: Meter) -> Iterator[Batch]:
        """Batches in manifest order; no batch crosses a part's border."""
        budget = _Budget(self.memory)
        with meter.upstream(parts) as source:
            tickets = enumerate(
                (part, start) for part in source for start in range(0, part.rows, self.batch_size)
            )
            latency = _Latency()
            if self.threads == 0:
                for ticket, (part, start) in tickets:
                    yield self._read_batch(part, start, ticket, budget, meter, latency)
                return
            pending: deque[Future[Batch]] = deque()
            pool = ThreadPoolExecutor(self.threads, thread_name_prefix="read")
            try:
                for ticket, (part, start) in tickets:
                    pending.append(pool.submit(self._read_batch, part, start, ticket, budget, meter, latency))
                    if len(pending) > min(self.threads, 1 + latency.mean_s / AHEAD_EVERY_S):
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                budget.close()
                pool.shutdown(cancel_futures=True)

    def _read_batch(
        self, part: Part, start: int, ticket: int, budget: _Budget, meter: Meter, latency: _Latency
    ) -> Batch:
        began = time.perf_counter()
        paths = part.paths[start : start + self.batch_size]
        rows = len(paths)
        batch = Batch(
            part,
            start,
            status=np.zeros(rows, np.uint8),
            width=np.zeros(rows, np.int32),
            height=np.zeros(rows, np.int32),
            encoded=[b""] * rows,
            headers=[None] * rows,
        )
        held = 0
        for position, path in enumerate(paths):
            try:
                data = self._read(path, ticket, budget)
                held += len(data)
                self._check(batch, position, data)
            except _ReadError as error:
                batch.fail(position, error.status, str(error))
            except header.HeaderError as error:
                batch.fail(position, error.status, str(error))
        budget.pass_head(ticket)
        batch.release = lambda: budget.release(held)
        taken = time.perf_counter() - began
        meter.add(taken)
        latency.see(taken)
        return batch

    def _read(self, path: str | None, ticket: int, budget: _Budget) -> bytes:
        if not path:
            raise _ReadError(Status.MISSING, "the row has no path")
        try:
            # O_NONBLOCK: opening a FIFO that nobody writes to must not hang
            descriptor = os.open(os.path.join(self.root, path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise _os_error(error) from None
        except ValueError:
            raise _ReadError(Status.UNREADABLE, "the path holds a NUL character") from None
        try:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise _ReadError(Status.UNREADABLE, f"a {_kind(info.st_mode)}, not a file")
            size = info.st_size
            if size == 0:
                raise _ReadError(Status.EMPTY, "the file has 0 bytes")
            if size > self.max_file_size:
                raise _ReadError(Status.TOO_LARGE, f"{size} bytes; at most {self.max_file_size} are read")
            budget.acquire(size, ticket)
            try:
                data = _read_all(descriptor, size)
            except OSError as error:
                budget.release(size)
                raise _os_error(error) from None
            if len(data) < size:  # it shrank meanwhile
                budget.release(size - len(data))
            return data
        finally:
            os.close(descriptor)

    def _check(self, batch: Batch, position: int, data: bytes) -> None:
        found = header.parse(data)
        batch.width[position], batch.height[position] = found.width, found.height
        if found.flags:
            batch.flags[position] = list(found.flags)
        if found.width * found.height > self.max_pixels:
            raise _ReadError(
                Status.TOO_LARGE,
                f"{found.width} x {found.height} pixels; --max-pixels allows {self.max_pixels}",
            )
        batch.encoded[position], batch.headers[position] = data, found


def _read_all(descriptor: int, size: int) -> bytes:
    data = os.read(descriptor, size)
    if len(data) == size:
        return data
    pieces = [data]
    size -= len(data)
    while size > 0 and data:
        data = os.read(descriptor, size)
        pieces.append(data)
        size -= len(data)
    return b"".join(pieces)


def _os_error(error: OSError) -> _ReadError:
    missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
    status = Status.MISSING if missing else Status.UNREADABLE
    return _ReadError(status, error.strerror or "read error")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")
