"""Rows to encoded bytes: many reads in flight, bounded by bytes; rows that cannot be read get their status.

On local storage one request reads a whole batch; on remote storage each file is a separate request. A read
that hangs fails only its own row: its batch is parked, and later batches overtake it. After `timeout_s` the
row times out, and another thread reads the rest of the batch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import nvtx

from engine.core.errors import EngineError
from engine.core.location import Url
from engine.core.overlap import Meter
from engine.core.records import Batch, Header, Part, Status
from engine.core.settings import Limits
from engine.formats import header
from engine.formats.common import HeaderError
from engine.reader.budget import ByteBudget
from engine.reader.requests import BatchReads, ReadAttempt, ReadRequest
from engine.storage.errors import ReadError
from engine.storage.images import ImageStorage

# One more thread reads for each of these in a file's mean latency. Files in the page cache need one thread,
# as more would only compete for the interpreter lock; slow storage gets all threads.
LATENCY_PER_THREAD_S = 0.000125
REMOTE_FILES_IN_FLIGHT = (64, 256)  # at least and at most, on remote storage
SLOW_READ_S = 1.0  # a batch whose file takes longer is parked
MAX_HUNG_READS = 64  # reads that timed out and still hang; with more, the run ends
RECENT_FILES = 8  # files read last that are checked again; if all are gone, the storage is lost


@dataclass(frozen=True)
class Reader:
    """Reads the files of parts in batches, with up to `threads` threads."""

    root: Path | Url
    batch_size: int
    threads: int  # for local files
    limits: Limits
    timeout_s: float = 60.0
    ahead: bool = True  # False: one batch after the other
    on_gpu: Callable[[bytes, Header], bool] | None = None  # whether an image is decoded on the GPU

    def stage(self, parts: Iterable[Part], meter: Meter) -> Iterator[Batch]:
        """Yield batches in manifest order, except those that a hanging read delays; each is of one part."""
        with meter.upstream(parts) as source, closing(_ReadScheduler(self, meter)) as reading:
            for part in source:
                for start in range(0, part.rows, self.batch_size):
                    reading.begin(part, start)
                    yield from reading.finished(leave=reading.ahead)
            yield from reading.finished(leave=0)
            yield from reading.drain_parked()


class _ReadScheduler:
    """The reads of one stage: threads, and requests that wait, run or are parked."""

    def __init__(self, reader: Reader, meter: Meter) -> None:
        self._reader, self._meter = reader, meter
        self._storage = ImageStorage(reader.root)
        self._budget = ByteBudget(reader.limits.encoded_bytes)
        self._pending: deque[ReadRequest] = deque()  # in manifest order
        self._waiting: deque[ReadRequest] = deque()  # pending requests that no thread has taken
        self._queue: queue.SimpleQueue[ReadRequest | None] = queue.SimpleQueue()  # to idle threads
        self._reading = 0  # threads that are not idle, except those whose request is parked
        self._parked: list[ReadRequest] = []
        self._recently_read: deque[str] = deque(maxlen=RECENT_FILES)
        self._remote, self._max_requests = False, reader.threads
        self._denied = 0  # refused reads before the first that succeeded
        self._hung = 0
        self._closed = False
        self._latency_s = 0.0  # of a file, running mean over requests
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        for _ in range(reader.threads):
            self._add_thread()

    @property
    def _wanted_threads(self) -> int:
        """Return how many threads the latency of the storage justifies."""
        if self._remote or not self._reader.ahead:
            return self._max_requests
        return min(self._max_requests, 1 + int(self._latency_s / LATENCY_PER_THREAD_S))

    @property
    def ahead(self) -> int:
        """Return how many requests may be in flight in addition to the next one that is delivered."""
        return 1 + self._wanted_threads if self._reader.ahead else 0

    def _switch_to_remote(self) -> None:
        """Make each file a separate request, with as many in flight as two batches have files."""
        fewest, most = REMOTE_FILES_IN_FLIGHT
        self._remote = True
        self._meter.lanes = self._max_requests = max(fewest, min(2 * self._reader.batch_size, most))
        while len(self._threads) < self._max_requests:
            self._add_thread()

    def begin(self, part: Part, start: int) -> None:
        paths = part.paths[start : start + self._reader.batch_size]
        rows = len(paths)
        batch = Batch(
            part,
            start,
            status=np.zeros(rows, np.uint8),
            width=np.zeros(rows, np.int32),
            height=np.zeros(rows, np.int32),
            encoded=[b""] * rows,
            headers=[None] * rows,
            on_gpu=[False] * rows,
        )
        if self._reader.ahead and not self._remote and self._storage.any_remote(paths):
            self._switch_to_remote()
        step = 1 if self._remote else rows
        reads = BatchReads(-(-rows // step))
        for position in range(0, rows, step):
            request = ReadRequest(batch, paths, position, position + step, step, reads)
            self._pending.append(request)
            self._waiting.append(request)
        self._wake()

    def _wake(self) -> None:
        """Give waiting requests to idle threads, up to the number of threads that are wanted."""
        with self._changed:
            while self._waiting and self._reading < self._wanted_threads:
                self._reading += 1
                self._queue.put(self._waiting.popleft())

    def _next(self) -> ReadRequest | None:
        """Return the next request for the calling thread, None if the thread becomes idle."""
        with self._changed:
            if self._waiting and self._reading <= self._wanted_threads:
                return self._waiting.popleft()
            self._reading -= 1
            return None

    def finished(self, leave: float) -> Iterator[Batch]:
        """Yield batches that are read, and wait for them, until at most `leave` requests are in flight."""
        while True:
            if self._parked:
                yield from self._finished_parked()
            if len(self._pending) <= leave:
                return
            request = self._pending[0]
            if request.done or self._wait(request):
                self._pending.popleft()
                yield from self._deliver(request)

    def drain_parked(self) -> Iterator[Batch]:
        """Yield the parked batches as they finish."""
        while self._parked:
            self._wait(self._parked[0])
            yield from self._finished_parked()

    def _finished_parked(self) -> Iterator[Batch]:
        for request in [request for request in self._parked if request.done]:
            self._parked.remove(request)
            yield from self._deliver(request)

    def _deliver(self, request: ReadRequest) -> Iterator[Batch]:
        """Yield the batch of `request` if all its requests are done."""
        self._meter.add(request.busy_s)
        self._latency_s += (request.busy_s / request.files - self._latency_s) / 16
        reads = request.reads
        reads.left -= 1
        reads.held += request.held
        if not reads.left:
            request.batch.release = lambda: self._budget.release(reads.held)
            yield request.batch

    def _wait(self, request: ReadRequest) -> bool:
        """Wait shortly for `request`; return whether it is done. Parks slow and times out hanging reads."""
        self._budget.set_first(request)
        with self._changed:
            if not request.done and not self._error:
                self._changed.wait(self._poll_s())
        if self._error:
            raise self._error
        if request.done:
            return True
        now = time.monotonic()
        if (
            request.attempt.slow_for(now) > SLOW_READ_S
            and not request.parked
            and len(self._parked) < self._max_requests
        ):
            self._park(request)
        for slow in {*self._parked, request}:
            overdue = slow.attempt.slow_for(now) > self._reader.timeout_s
            if overdue and slow.attempt.overdue:  # not at the first check: this process may have been paused
                self._abandon_read(slow)
            slow.attempt.overdue = overdue
        return False

    def _poll_s(self) -> float:
        return min(SLOW_READ_S, self._reader.timeout_s) / 4

    def _park(self, request: ReadRequest) -> None:
        """Let later requests overtake `request`. Its thread ends with it, so another one replaces it."""
        with request.lock:
            if request.done:
                return
            request.parked = True
        self._pending.remove(request)
        self._parked.append(request)
        with self._changed:
            self._reading -= 1
        self._add_thread()
        self._wake()

    def _abandon_read(self, request: ReadRequest) -> None:
        """Take a request from its hanging thread: its file times out, another thread reads the rest."""
        timeout_s = self._reader.timeout_s
        with request.lock:
            if request.done or request.attempt.slow_for(time.monotonic()) <= timeout_s:
                return  # the read has ended meanwhile
            request.attempt = ReadAttempt()
            error = f"the storage did not answer within {timeout_s:g} s (--read-timeout)"
            request.batch.fail(request.position, Status.TIMEOUT, error)
            request.position += 1
        with self._changed:
            self._hung += 1
        if self._hung > MAX_HUNG_READS:
            raise EngineError(
                f"the storage of the images does not answer: {self._hung} reads have taken longer than "
                f"{timeout_s:g} s; run the same command again when the storage answers"
            )
        self._add_thread()
        self._queue.put(request)

    def _add_thread(self) -> None:
        # daemon threads: a read that never ends must not keep the process
        thread = threading.Thread(target=self._work, name="read", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while (request := self._queue.get()) is not None:
            while request is not None:
                try:
                    continues = self._read_files(request)
                except BaseException as error:  # handed to the consumer, which raises it
                    self._error, continues = error, False
                with self._changed:
                    self._changed.notify_all()
                if not continues:
                    return
                request = self._next()

    @nvtx.annotate("read")  # type: ignore[untyped-decorator,unused-ignore]
    def _read_files(self, request: ReadRequest) -> bool:
        """Read the remaining files of a request. Return False if another thread has replaced this one."""
        start = time.perf_counter()
        attempt, data = request.attempt, b""
        while request.position < request.stop and not self._closed:
            attempt.since = time.monotonic()
            data, parsed, error = self._read_checked(request, attempt)
            with request.lock:
                if request.attempt is not attempt:
                    break
                self._record(request, data, parsed, error)
                attempt.since = None
        with request.lock, self._changed:
            if request.attempt is not attempt:
                self._budget.release(len(data))
                self._hung -= 1
                return False
            request.busy_s += time.perf_counter() - start
            request.done = True
            return not request.parked

    def _read_checked(
        self, request: ReadRequest, attempt: ReadAttempt
    ) -> tuple[bytes, Header | None, ReadError | HeaderError | None]:
        data = b""
        if request.batch.start + request.position in request.batch.part.crashed:
            message = "scoring this image crashes the worker process, even on its own"
            return data, None, ReadError(Status.CRASHED, message)
        try:
            data = self._read(request, attempt)
            return data, header.check(data, self._reader.limits.max_pixels), None
        except (ReadError, HeaderError) as error:
            return data, None, error

    def _record(
        self, request: ReadRequest, data: bytes, parsed: Header | None, error: ReadError | HeaderError | None
    ) -> None:
        batch, position = request.batch, request.position
        request.held += len(data)
        if parsed:
            on_gpu = self._reader.on_gpu is not None and self._reader.on_gpu(data, parsed)
            batch.keep(position, data, parsed, on_gpu=on_gpu)
        if error:
            if size := getattr(error, "size", None):
                batch.width[position], batch.height[position] = size
            batch.fail(position, error.status, str(error))
        request.position += 1

    def _read(self, request: ReadRequest, attempt: ReadAttempt) -> bytes:
        path, admitted = request.paths[request.position], 0

        def admit(size: int) -> None:
            nonlocal admitted
            limit = self._reader.limits.max_file_size
            if size > limit:
                message = f"the file has {size} bytes; --max-file-size allows {limit}"
                raise ReadError(Status.TOO_LARGE, message)
            attempt.since = None  # the wait for the budget does not count as reading
            if size > admitted:
                start = time.perf_counter()
                self._budget.acquire(size - admitted, request)
                request.busy_s -= time.perf_counter() - start
                admitted = size
            attempt.since = time.monotonic()

        def alive() -> None:
            attempt.since = time.monotonic()

        data = b""
        try:
            data = self._storage.read(path, admit, alive)
        except ReadError as error:
            if path and error.status in (Status.MISSING, Status.UNREADABLE):
                self._check_storage(path, error)
            raise
        finally:
            if len(data) < admitted:  # the read failed, or the file has become shorter
                self._budget.release(admitted - len(data))
        if path:
            self._recently_read.append(path)
        return data

    def _check_storage(self, path: str, error: ReadError) -> None:
        """Raise EngineError if the storage is lost, so that no row is recorded as missing.

        The storage is lost if none of the recently read files exists any more. Before the first file is read,
        it is lost if its root does not answer, or if it refuses a listing and RECENT_FILES reads.
        """
        if recently_read := list(self._recently_read):
            if any(self._storage.exists(recent_path) for recent_path in recently_read):
                return
            raise EngineError(
                f"the images have disappeared: {self._storage.where(path)} or a folder in it was removed or "
                "unmounted during the run; run the same command again when it is back"
            )
        trouble = self._storage.storage_error(path, retry=not error.transient)
        self._denied += error.denied
        if trouble and not self._recently_read and (not trouble.denied or self._denied >= RECENT_FILES):
            raise EngineError(
                f"the images at {self._storage.where(path)} cannot be read: {trouble}; fix this and run "
                "the same command again"
            )

    def close(self) -> None:
        self._closed = True
        self._budget.close()
        with self._changed:
            self._waiting.clear()
        for _ in self._threads:
            self._queue.put(None)
        deadline = time.monotonic() + 2 * SLOW_READ_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
